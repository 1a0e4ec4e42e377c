"""`fastblocks train`: a network learns digits or a folder of pictures, and the run can be stopped at any moment."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import fastblocks
from fastblocks.bench.files import replace, replace_text
from fastblocks.bench.stock import stock_model
from fastblocks.cli.errors import UserError, need
from fastblocks.cli.training import checkpoint as checkpoints
from fastblocks.cli.training.data import Data, batches, load_data
from fastblocks.cli.training.distributed import World, joined
from fastblocks.cli.training.loop import OnStep, evaluate, finite, learning_rate_factor, train_epoch
from fastblocks.cli.training.progress import Reporter

__all__ = ["Settings", "train"]


@dataclass(frozen=True)
class Settings:
    """The options of `fastblocks train` that decide what is computed."""

    model: str = "mobilenet_v2"
    data: str = "digits"
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    resolution: int | None = None
    width_mult: float | None = None
    seed: int = 0
    stock: bool = False


def train(
    settings: Settings,
    out: str | Path | None = None,
    *,
    resume: bool = True,
    threads: int | None = None,
    data: Data | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train a network, and keep a checkpoint, the history and the curves in a folder.

    Args:
        settings: what to compute. With the arguments of a checkpoint that is gone on with, except that `epochs` may be
            another number.
        out: the folder; None: ``runs/`` and the network's name.
        resume: whether to go on from the folder's checkpoint, if it has one.
        threads: CPU threads; None: torch's.
        data: taken instead of `settings.data`, whose name it then stands for.
        on_step: called after each step with epoch, step, loss and images.

    Returns:
        The history: ``step_losses``, and ``epochs``, a row for each.

    Raises:
        UserError: what the user can mend. The checkpoint of the last whole epoch stays.
    """
    _check(settings)
    folder = Path(out if out is not None else f"runs/{settings.model}")
    if threads is not None:
        torch.set_num_threads(threads)
    with joined() as world:
        return _train(settings, folder, world, resume, data, on_step)


def _train(
    settings: Settings, folder: Path, world: World, resume: bool, data: Data | None, on_step: OnStep | None
) -> dict[str, Any]:
    """One process's part. No wrapped network outlives it: that would hold the process group beyond its end."""
    try:
        data = data or load_data(settings.data, settings.resolution, settings.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(data.train) < 2 * world.size:
        raise UserError(f"{len(data.train)} pictures to train on: BatchNorm needs two in each process")
    run = _Run(settings, data, folder, world)
    if world.rank:
        return run.run(resume, on_step)
    with checkpoints.owned(folder):
        return run.run(resume, on_step)


def _check(settings: Settings) -> None:
    names = fastblocks.models.list()
    if settings.model not in names:
        raise UserError(f"no network {settings.model!r}, expected one of {', '.join(names)}")
    takes = inspect.signature(getattr(fastblocks.models, settings.model)).parameters
    if settings.width_mult is not None and "width_mult" not in takes:
        raise UserError(f"{settings.model} takes no --width-mult: its name says its width")
    need("train", "the picture of the curves", "matplotlib")


class _Run:
    """One training: what it has in hand, and the files it writes."""

    def __init__(self, settings: Settings, data: Data, folder: Path, world: World) -> None:
        self.settings, self.data, self.folder, self.world = settings, data, folder, world
        self.path = folder / "checkpoint.pt"
        self.arguments = {
            "model": settings.model,
            "width_mult": settings.width_mult,
            "network": "stock torch" if settings.stock else "fastblocks",
            "data": data.identity,
            "resolution": data.resolution,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "lr": settings.lr,
            "momentum": settings.momentum,
            "weight_decay": settings.weight_decay,
            "processes": world.size,
        }
        self.history: dict[str, Any] = {"epochs": [], "step_losses": []}
        self.saved = 0  # epochs in the checkpoint
        self.model = _build(settings, len(data.classes))
        torch.manual_seed(settings.seed + world.rank)  # for dropout and crops: of its own in each process
        self.wrapped = world.wrap(self.model)
        self.optimizer = SGD(
            self.model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )
        steps = settings.epochs * len(self.batches(1))
        self.scheduler = LambdaLR(self.optimizer, functools.partial(learning_rate_factor, steps=steps))

    def batches(self, epoch: int) -> list[torch.Tensor]:
        return batches(len(self.data.train), self.settings.batch_size, self.settings.seed, epoch, self.world)

    def run(self, resume: bool, on_step: OnStep | None) -> dict[str, Any]:
        done = self.load() if resume and self.path.exists() else 0
        if self.world.mean(done) != done:
            raise UserError(f"the processes do not see the same {self.path}")
        with Reporter(self.world.rank == 0, self.settings.epochs) as reporter:
            reporter.line(self.title())
            if done:
                reporter.line(f"going on from {self.path}, epochs done: {done}")
                self.writing(self.describe)  # the last process may have been killed before it did

            def told(epoch: int, step: int, loss: float, images: int) -> None:
                reporter.step(loss, images)
                if on_step:
                    on_step(epoch, step, loss, images)

            for epoch in range(done + 1, self.settings.epochs + 1):
                reporter.begin(epoch, len(self.batches(epoch)))
                try:
                    row = self.epoch(epoch, told)
                except UserError as error:
                    kept = f"{self.path} holds epoch {self.saved}" if self.saved else "no epoch is saved yet"
                    raise UserError(f"{error.message}; {kept}") from error
                reporter.end(row)
            reporter.line(f"{self.folder}: checkpoint.pt, history.json, curves.png", "dim")
        return self.history

    def epoch(self, epoch: int, on_step: OnStep) -> dict[str, Any]:
        """Train and evaluate, and write the files; the new row of the history."""
        rate = self.optimizer.param_groups[0]["lr"]
        losses, speed = train_epoch(
            self.wrapped,
            self.optimizer,
            self.scheduler,
            self.data.train,
            self.batches(epoch),
            epoch,
            self.world,
            on_step,
        )
        self.world.share_buffers(self.model)
        if not finite(self.model):
            raise UserError(f"epoch {epoch}, step {len(losses)}: the weights are no longer finite")
        val_loss, accuracy = evaluate(self.model, self.data.val, self.settings.batch_size, self.world)
        row = {
            "epoch": epoch,
            "train_loss": sum(losses) / len(losses),
            "val_loss": val_loss,
            "val_accuracy": accuracy,
            "lr": rate,
            "images_per_second": speed,
        }
        self.history["epochs"].append(row)
        self.history["step_losses"] += losses
        states = self.world.random_states()
        self.writing(lambda: self.save(epoch, states))
        self.writing(self.describe)
        return row

    def writing(self, write: Callable[[], object]) -> None:
        """Let the first process write; a UserError says why it cannot."""
        if self.world.rank == 0:
            try:
                write()
            except OSError as error:
                raise UserError(f"cannot write to {self.folder} ({error.strerror or error})") from error

    def save(self, epoch: int, random_states: list[torch.Tensor]) -> None:
        """Write the checkpoint."""
        checkpoints.save(
            self.path,
            {
                "arguments": self.arguments,
                "epoch": epoch,
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random_states": random_states,
                "scheduler": self.scheduler.state_dict(),
            },
        )
        self.saved = epoch

    def describe(self) -> None:
        """Write the history and the curves."""
        text = json.dumps({"arguments": self.arguments, **self.history}, indent=1)
        replace_text(self.folder / "history.json", text)

        from fastblocks.cli.training.curves import (
            draw_curves,
        )  # matplotlib takes a while, and only one process needs it

        title = f"{self.arguments['model']} ({self.arguments['network']}), {self.data.name}"
        replace(self.folder / "curves.png", lambda file: draw_curves(self.history, title, file))

    def load(self) -> int:
        """Take over the folder's checkpoint; the number of epochs that it holds."""
        try:
            found = checkpoints.load(self.path)
            checkpoints.check_same(self.path, found["arguments"], self.arguments)
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.scheduler.load_state_dict(found["scheduler"])
            torch.set_rng_state(found["random_states"][self.world.rank])
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
        except (
            RuntimeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # what torch raises for entries of another form
            raise UserError(f"{self.path} does not fit {self.settings.model} ({str(error).splitlines()[0]})") from error
        self.history, self.saved = found["history"], found["epoch"]
        return self.saved

    def title(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        size, data = self.data.resolution, self.data
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        return (
            f"{self.settings.model} ({self.arguments['network']}), {parameters:.2f} M parameters; {data.name}: "
            f"{len(data.train)} + {len(data.val)} pictures of {len(data.classes)} classes, {size} x {size}; "
            f"threads: {torch.get_num_threads()}{processes}"
        )


def _build(settings: Settings, classes: int) -> nn.Module:
    """The network in training mode; the same seed gives the same weights, stock or not."""
    torch.manual_seed(settings.seed)
    options = {} if settings.width_mult is None else {"width_mult": settings.width_mult}
    try:
        model = fastblocks.models.create(settings.model, num_classes=classes, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    if settings.stock:
        stock = stock_model(model.state_dict(), torch.channels_last)
        pairs = zip(*([m for m in net.modules() if isinstance(m, nn.Dropout)] for net in (stock, model)), strict=True)
        for theirs, ours in pairs:
            theirs.p = ours.p
        model = stock
    return model.train()
