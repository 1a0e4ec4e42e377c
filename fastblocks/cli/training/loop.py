"""An epoch of training, and the look at the held-out pictures after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastblocks.cli.errors import UserError
from fastblocks.cli.training.data import Split
from fastblocks.cli.training.distributed import World

__all__ = ["OnStep", "evaluate", "finite", "learning_rate_factor", "train_epoch"]

OnStep = Callable[[int, int, float, int], object]
"""Told of each step: epoch and step, counted from 1, its loss, and its images in all processes."""

WARM_UP = 0.05  # of all steps


def learning_rate_factor(step: int, steps: int) -> float:
    """What multiplies the learning rate at this step of a training: a short linear rise, then half a cosine to zero.

    Example:
        >>> [round(learning_rate_factor(step, 100), 2) for step in (0, 4, 5, 52, 99)]
        [0.2, 1.0, 1.0, 0.51, 0.0]
    """
    warm_up = max(round(WARM_UP * steps), 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min((step - warm_up) / max(steps - warm_up, 1), 1)))


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    split: Split,
    batches: list[Tensor],
    epoch: int,
    world: World,
    on_step: OnStep,
) -> tuple[list[float], float]:
    """Run an epoch's batches.

    Returns:
        The losses of the steps, means over the processes, and the images a second of all of them.

    Raises:
        UserError: a loss is not finite; the step is not taken.
    """
    model.train()
    losses = []
    images = 0
    begun = time.perf_counter()
    for step, indices in enumerate(batches, 1):
        pictures, labels = split.batch(indices)
        loss = cross_entropy(model(pictures), labels)
        losses.append(world.mean(loss.item()))
        if not math.isfinite(losses[-1]):
            raise UserError(f"epoch {epoch}, step {step}: the loss is {losses[-1]}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        images += len(indices) * world.size
        on_step(epoch, step, losses[-1], len(indices) * world.size)
    return losses, images / (time.perf_counter() - begun)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int, world: World) -> tuple[float, float]:
    """The mean loss and the share of right answers (0 to 1) in eval mode. The processes share the pictures."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for indices in torch.arange(world.rank, len(split), world.size).split(batch_size):
        if len(indices):
            pictures, labels = split.batch(indices)
            logits = model(pictures)
            totals[0] += cross_entropy(logits, labels, reduction="sum").item()
            totals[1] += int((logits.argmax(1) == labels).sum())
    loss, right = (world.sum(totals) / len(split)).tolist()
    return loss, right


def finite(model: nn.Module) -> bool:
    """Whether all weights and running statistics are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
