"""Learning scikit-learn's digits: the losses and accuracies of fastblocks and of stock torch, side by side.

Two things are compared, each for several seeds:

- **The first losses**, of the same weights, batches and learning rates (those of `fastblocks train`), without dropout:
  fastblocks, torch in both memory formats, and torch in float64. A fresh network with BatchNorm magnifies what rounding
  changes, a hundredfold a step, so that after a few steps torch's own two formats have parted, too. Whose losses are
  right is seen at small learning rates, where they have not: hence several.
- **Whole trainings** by `fastblocks train`, with and without `--stock`: the accuracy at the end, and the curves.

    python benchmarks/digits.py
    python benchmarks/digits.py --models mobilenet_v2 --rates 0.05 1e-6 --epochs 0 --json digits.json

The trainings' files go to `--out`, and a picture of all, `digits-MODEL-light.png` and `-dark.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from training import slim_table, stock, wide_console, without_dropout

import fastblocks
from fastblocks.bench.charts import Picture, Theme, draw, tidy
from fastblocks.bench.files import replace_text
from fastblocks.cli.train import Settings, train
from fastblocks.cli.training.data import Data, batches, load_data
from fastblocks.cli.training.distributed import World
from fastblocks.cli.training.loop import learning_rate_factor, train_epoch

ALLOWED_LOSS, ALLOWED_POINTS = 1e-3, 1.5
PAIRS = {
    "fastblocks, torch": ("fastblocks", "channels_last"),
    "torch NCHW, torch": ("contiguous", "channels_last"),
    "fastblocks, float64": ("fastblocks", "float64"),
    "torch, float64": ("channels_last", "float64"),
}
"""Whose losses are held against whose; torch is stock torch as `fastblocks train --stock` has it, in channels_last."""


class Form(nn.Module):
    """A network, and the pictures as it wants them."""

    def __init__(self, form: str, model: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = without_dropout(fastblocks.models.create(model, num_classes=10)).train()
        self.form = form
        if form != "fastblocks":
            layout = torch.channels_last if form == "channels_last" else torch.contiguous_format
            self.network = stock(self.network.state_dict(), layout)
        if form == "float64":
            self.network = self.network.double()

    def forward(self, pictures: Tensor) -> Tensor:
        if self.form in ("contiguous", "float64"):
            pictures = pictures.contiguous()
        return self.network(pictures.to(next(self.parameters()).dtype))


def first_losses(form: str, settings: Settings, data: Data, steps: int) -> list[float]:
    """The losses of the first steps of a training."""
    network = Form(form, settings.model, settings.seed)
    optimizer = SGD(network.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    losses: list[float] = []
    epoch = 0
    length = settings.epochs * len(batches(len(data.train), settings.batch_size, settings.seed, 1, World()))
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, length))
    while len(losses) < steps:
        epoch += 1
        taken = batches(len(data.train), settings.batch_size, settings.seed, epoch, World())[: steps - len(losses)]
        found, _ = train_epoch(network, optimizer, schedule, data.train, taken, epoch, World(), lambda *progress: None)
        losses += found
    return losses


def compare_losses(model: str, rate: float, seeds: int, steps: int) -> dict[str, Any]:
    """For each pair the greatest difference over the steps, a seed each; and the losses themselves."""
    runs = []
    for seed in range(seeds):
        settings, data = Settings(model, lr=rate, seed=seed), load_data("digits", None, seed)
        forms = dict.fromkeys(form for pair in PAIRS.values() for form in pair)
        runs.append({form: first_losses(form, settings, data, steps) for form in forms})
    apart = {
        name: [max(abs(x - y) for x, y in zip(run[a], run[b], strict=True)) for run in runs]
        for name, (a, b) in PAIRS.items()
    }
    return {"model": model, "rate": rate, "steps": steps, "apart": apart, "losses": runs}


def whole_trainings(model: str, seeds: int, epochs: int, out: Path) -> list[dict[str, Any]]:
    """The epochs of `fastblocks train`, with and without `--stock`, a pair for each seed."""
    pairs = []
    for seed in range(seeds):
        pair = {}
        for who in ("fastblocks", "torch"):
            settings = Settings(model, epochs=epochs, seed=seed, stock=who == "torch")
            pair[who] = train(settings, out / f"{model}-{who}-{seed}", resume=False)["epochs"]
        pairs.append(pair)
    return pairs


def paint(pairs: list[dict[str, Any]], figure: Figure, theme: Theme) -> None:
    """Losses in training on the left, accuracies in validation on the right; a line for each seed."""
    colours = {"fastblocks": theme.ours, "torch": theme.torch}
    left, right = figure.subplots(1, 2)
    for pair in pairs:
        for who, rows in pair.items():
            style = {"color": colours[who], "linewidth": 1.2, "linestyle": "-" if who == "fastblocks" else "--"}
            epochs = [row["epoch"] for row in rows]
            left.plot(epochs, [row["train_loss"] for row in rows], **style)
            right.plot(epochs, [100 * row["val_accuracy"] for row in rows], **style)
    left.set_title("Loss in training (cross-entropy)")
    right.set_title("Accuracy in validation (%)")
    left.set_ylim(bottom=0)
    right.set_ylim(0, 102)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    lines = [
        Line2D([], [], color=colours[who], linestyle=style) for who, style in (("fastblocks", "-"), ("torch", "--"))
    ]
    right.legend(lines, ["fastblocks", "torch"], loc="lower right")


def picture(pairs: list[dict[str, Any]]) -> Picture:
    alt = f"Losses and accuracies of fastblocks and torch over epochs, {len(pairs)} seeds"
    return draw(lambda figure, theme: paint(pairs, figure, theme), (9, 3.6), alt)


def print_losses(results: list[dict[str, Any]], console: Console) -> None:
    """A row for each learning rate: the greatest difference of all steps and seeds."""
    first = results[0]
    seeds = len(first["losses"])
    console.print(f"[bold]{first['model']}[/], the first {first['steps']} losses, {seeds} seeds: greatest difference")
    table = slim_table("learning rate", *PAIRS)
    for result in results:
        worst = [max(result["apart"][name]) for name in PAIRS]
        texts = [f"[red]{value:.1e}[/]" if value > ALLOWED_LOSS else f"{value:.1e}" for value in worst]
        table.add_row(f"{result['rate']:g}", *texts)
    console.print(table, f"[dim]red: above {ALLOWED_LOSS:g}[/]", "")


def print_accuracies(model: str, pairs: list[dict[str, Any]], console: Console) -> None:
    table = slim_table("seed", "fastblocks", "torch", "points apart")
    for seed, pair in enumerate(pairs):
        ours, theirs = (100 * pair[who][-1]["val_accuracy"] for who in ("fastblocks", "torch"))
        style = "red" if ours < theirs - ALLOWED_POINTS else ""
        table.add_row(str(seed), f"{ours:.1f} %", f"{theirs:.1f} %", f"{ours - theirs:+.1f}", style=style)
    console.print(f"[bold]{model}[/], accuracy after {len(pairs[0]['torch'])} epochs", table, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shufflenet_v2_x1_0"], help="names of fastblocks.models.list()")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="whose losses are compared; 0: none")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 1e-4, 1e-5, 1e-6], help="learning rates")
    parser.add_argument("--epochs", type=int, default=20, help="of the whole trainings; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), metavar="DIR", help="where files go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all losses and epochs to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = wide_console()
    found: dict[str, Any] = {"losses": [], "trainings": {}}
    for model in arguments.models:
        if arguments.steps:
            results = [compare_losses(model, rate, arguments.seeds, arguments.steps) for rate in arguments.rates]
            found["losses"] += results
            print_losses(results, console)
        if arguments.epochs:
            pairs = whole_trainings(model, arguments.seeds, arguments.epochs, arguments.out)
            found["trainings"][model] = pairs
            print_accuracies(model, pairs, console)
            for path in picture(pairs).save(arguments.out / f"digits-{model}"):
                console.print(path)
    if arguments.json:
        replace_text(arguments.json, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
