"""What the benchmarks of training share: networks in training mode with the same weights on both sides, and a table."""

from __future__ import annotations

import sys

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastblocks
from fastblocks.bench.stock import stock_model

State = dict[str, Tensor]


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


def ours(name: str, state: State) -> nn.Module:
    """The network of fastblocks, in training mode."""
    model = fastblocks.models.create(name)
    model.load_state_dict(state)
    return _without_dropout(model).train()


def stock(state: State, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """The same in plain torch."""
    return _without_dropout(stock_model(state, memory_format)).train()


def _without_dropout(model: nn.Module) -> nn.Module:
    """Dropout draws from torch's generator, so no two runs would be alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def slim_table(first: str, *numbers: str) -> Table:
    """A table that looks like the command line's, with a column of names and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def wide_console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)
