"""What the benchmarks of training share: the networks in training mode, with the same weights on both sides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks.cli.stock import stock_model

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
