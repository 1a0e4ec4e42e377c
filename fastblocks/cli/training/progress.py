"""What a training shows in a terminal: a bar while an epoch runs, and a line when it is over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Reporter"]


class Reporter:
    """Shows how far a training is; used in a `with` block. Where output is no terminal there is no bar.

    Args:
        show: False for silence.
        epochs: of the whole training.
    """

    def __init__(self, show: bool, epochs: int) -> None:
        self.epochs = epochs
        self.console = Console(highlight=False, quiet=not show)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} images/s"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (show and self.console.is_terminal),
        )
        self.task = self.bar.add_task("", visible=False, speed=0.0, loss=0.0)

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(Text(text, style), soft_wrap=True)

    def begin(self, epoch: int, steps: int) -> None:
        """An epoch of so many steps begins."""
        self.begun, self.sum, self.images = time.perf_counter(), 0.0, 0
        self.bar.reset(self.task, total=steps, description=f"epoch {epoch}/{self.epochs}", visible=True)

    def step(self, loss: float, images: int) -> None:
        """A step is over: its loss, and the images of all processes in it."""
        self.sum += loss
        self.images += images
        speed = self.images / (time.perf_counter() - self.begun)
        done = self.bar.tasks[0].completed + 1
        self.bar.update(self.task, advance=1, speed=speed, loss=self.sum / done)

    def end(self, row: Mapping[str, Any]) -> None:
        """An epoch is over: its row of the history."""
        self.bar.update(self.task, visible=False)
        self.console.print(
            Text.assemble(
                (f"epoch {row['epoch']:{len(str(self.epochs))}}/{self.epochs}", "bold"),
                f"  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  val accuracy ",
                (f"{100 * row['val_accuracy']:.2f} %", "bold green"),
                (f"  {row['images_per_second']:.0f} images/s", "dim"),
            ),
            soft_wrap=True,
        )
