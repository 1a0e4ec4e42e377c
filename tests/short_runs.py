"""What the tests of `fastblocks train` share: small data, short runs, a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastblocks import cli
from fastblocks.cli.train import Settings, train
from fastblocks.cli.training import checkpoint as checkpoints
from fastblocks.cli.training.data import Data, Split

SETTINGS = Settings(model="mobilenet_v1_x0_25", epochs=3, batch_size=8, lr=0.01)
STEPS = 4  # an epoch of `pictures`
FILES = ["checkpoint.pt", "curves.png", "history.json"]


def pictures(calls: int | None = None, identity: str = "noise") -> Data:
    """Noise of 4 classes, 32 + 8 pictures; each one after so many calls is NaN."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(40, 3, 32, 32, generator=generator), torch.arange(40) % 4
    left = [sys.maxsize if calls is None else calls]

    def first(indices: Tensor) -> Tensor:
        left[0] -= 1
        return images[indices] if left[0] >= 0 else images[indices] * float("nan")

    train, val = Split(labels[:32], first), Split(labels[32:], lambda indices: images[32 + indices])
    return Data("noise", identity, ("a", "b", "c", "d"), 32, train, val)


def run(out: Path, settings: Settings = SETTINGS, data: Data | None = None, **options: Any) -> dict[str, Any]:
    return train(settings, out, data=data or pictures(), threads=1, **options)


def with_(**changes: Any) -> Settings:
    return Settings(**{**vars(SETTINGS), **changes})


def losses(history: dict[str, Any]) -> list[Any]:
    return [history["step_losses"], [(row["train_loss"], row["val_loss"]) for row in history["epochs"]]]


def saved(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def write_pictures(folder: Path) -> None:
    """Two classes of eight pictures to train on, and of two for validation."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            path = folder / split / name
            path.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(path / f"{i}.png")


def die(out: str, where: str) -> None:
    """Run in a process of its own: train, and be killed in the second epoch."""

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(epoch: int, step: int, loss: float, images: int) -> None:
        if epoch == 2 and step == 2:
            if where == "step":
                kill()
            elif where == "half written":
                torch.save = lambda _, file: file.write(b"PK" * 500)
                checkpoints.os.fsync = kill
            elif where == "not renamed":
                checkpoints.os.replace = kill
            elif where == "without history":
                json.dumps = kill

    run(Path(out), on_step=on_step)


def fails(capsys, *arguments):
    """Run the command, expect exit code 2 and one line; return the line."""
    assert cli.main(["train", "--threads", "1", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastblocks: ")
    assert err.count("\n") == 1
    return err
