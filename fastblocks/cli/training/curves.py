"""The picture of a training: losses and accuracies over epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["draw_curves"]

STEP, TRAIN, VAL = "#9ecae1", "#08519c", "#a63603"  # colours told apart in grey, too


def draw_curves(history: Mapping[str, Any], title: str, file: BinaryIO) -> None:
    """Write a PNG, 1400 x 560 pixels on white: the losses on the left, validation's accuracy on the right.

    Args:
        history: ``step_losses`` of all steps, and ``epochs``, the rows with ``train_loss``, ``val_loss`` and
            ``val_accuracy`` (0 to 1); at least one epoch.
        title: stands above.
        file: where the PNG goes.
    """
    rows, steps = history["epochs"], history["step_losses"]
    epochs = range(1, len(rows) + 1)
    figure = Figure(figsize=(10, 4), dpi=140, facecolor="white", layout="constrained")
    figure.suptitle(title)
    losses, accuracy = figure.subplots(1, 2)

    at = [(step + 1) * len(rows) / len(steps) for step in range(len(steps))]
    losses.plot(at, steps, color=STEP, linewidth=0.8, label="a step")
    losses.plot(epochs, [row["train_loss"] for row in rows], "o-", color=TRAIN, markersize=3, label="train, mean")
    losses.plot(epochs, [row["val_loss"] for row in rows], "s-", color=VAL, markersize=3, label="validation")
    losses.set_ylabel("loss (cross-entropy)")
    # BatchNorm's running statistics are far off at first, and so may be validation's loss: it may leave the picture
    losses.set_ylim(0, 1.1 * max(*steps, min(row["val_loss"] for row in rows)))
    losses.legend(frameon=False)

    percents = [100 * row["val_accuracy"] for row in rows]
    accuracy.plot(epochs, percents, "s-", color=VAL, markersize=3)
    accuracy.annotate(
        f"{percents[-1]:.1f} %", (epochs[-1], percents[-1]), (0, -14), textcoords="offset points", ha="right"
    )
    accuracy.set_ylabel("validation accuracy (%)")
    accuracy.set_ylim(0, 102)

    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png")
