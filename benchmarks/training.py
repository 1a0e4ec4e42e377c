"""What the benchmarks of training share: networks in training mode with the same weights on both sides, their batch,
the step, how a gradient's error is measured, and a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastblocks
from fastblocks.bench.stock import stock_model

CLASSES = 1000
VANISHING = 1e-9  # a shift's gradient below this part of the scale's is zero

State = dict[str, Tensor]
Run = Callable[[Tensor], Tensor]


def fresh_state(name: str, seed: int = 0) -> State:
    """Random weights under the keys that both sides have, with no BatchNorm at identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fastblocks.models.create(name)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.1)
    return model.state_dict()


def batch_of(batch: int, resolution: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random pictures and their classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, resolution, resolution, generator=generator)
    return images, torch.randint(CLASSES, (batch,), generator=generator)


def ours(name: str, state: State) -> nn.Module:
    """The network of fastblocks, in training mode."""
    model = fastblocks.models.create(name)
    model.load_state_dict(state)
    return without_dropout(model).train()


def stock(state: State, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """The same in plain torch."""
    return without_dropout(stock_model(state, memory_format)).train()


def without_dropout(model: nn.Module) -> nn.Module:
    """Dropout draws from torch's generator, so no two runs would be alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def contender(name: str, mode: str, state: State, images: Tensor) -> tuple[nn.Module, Run, Tensor]:
    """The network in a mode, what calls it, and the pictures in the layout that the mode wants.

    Modes are ``fastblocks``, ``eager`` and ``compile``, of which the last two may end in ``channels_last``.
    """
    if mode == "fastblocks":
        network = ours(name, state)
        return network, network, images
    last = mode.endswith("channels_last")
    network = stock(state, torch.channels_last if last else torch.contiguous_format)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    return network, torch.compile(network) if mode.startswith("compile") else network, images


def forward_backward(network: nn.Module, run: Run, images: Tensor, target: Tensor) -> Tensor:
    """The loss, with gradients in the network's parameters."""
    network.zero_grad(set_to_none=True)
    loss = F.cross_entropy(run(images), target)
    loss.backward()
    return loss.detach()


def step_of(network: nn.Module, run: Run, images: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """What takes one training step: zero_grad, forward, cross-entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        loss = forward_backward(network, run, images, target)
        optimizer.step()
        return loss

    return step


def gradients_of(network: nn.Module) -> State:
    return {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}


def scale(truth: State, name: str) -> tuple[float, bool]:
    """What a gradient's error is taken over, and whether the gradient itself vanishes.

    The shift of a BatchNorm that a 1x1 convolution and another BatchNorm follow has no effect: its gradient is zero but
    for rounding. Its error is taken over the norm of the gradient of the same BatchNorm's scale.
    """
    norm = truth[name].norm().item()
    sibling = truth.get(name.removesuffix(".bias") + ".weight", truth[name]).norm().item()
    return (sibling, True) if norm < VANISHING * sibling else (norm, False)


def slim_table(first: str, *numbers: str, **more: Any) -> Table:
    """A table that looks like the command line's, with a column of names and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim", **more)
    table.add_column(first, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def wide_console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)
