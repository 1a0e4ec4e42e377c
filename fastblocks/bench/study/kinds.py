"""Time by kind of layer: all layers of a kind run one after the other, each on the input that it has in the network."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks.bench.study.counting import kind_of
from fastblocks.bench.study.timing import LAYOUTS, rounds_for
from fastblocks.bench.timing import interleaved
from fastblocks.layers.head import Classifier

__all__ = ["ELEMENTWISE", "time_by_kind"]

ELEMENTWISE = "BatchNorm, ReLU"
ROWS = 5  # a network's kinds, each of which is a row by the time that it gets

Layers = dict[str, list[tuple[nn.Module, Tensor]]]


def time_by_kind(plain: nn.Module, ours: nn.Module | None, x: Tensor, seconds: float) -> dict[str, Any]:
    """Time the layers of a network by kind, in plain torch and, where there is one, in fastblocks' network.

    Args:
        plain: torch's modules; convolutions, linear layers, BatchNorm and ReLU count as layers.
        ours: the same of fastblocks' layers, each of which is a convolution with all that follows it.
        x: an input.
        seconds: to spend on a kind.

    Returns:
        ``seconds``: for "torch" and "fastblocks" the median by kind; ``whole``: that of the network as it is; and
        ``layout``: that of torch, which is the one with the lower sum.
    """
    runners: dict[tuple[str, str], Callable[[], object]] = {}
    for layout, memory_format in LAYOUTS.items():
        network = copy.deepcopy(plain).eval().to(memory_format=memory_format)
        _add(runners, layout, network, x.contiguous(memory_format=memory_format), _plain_kind)
    if ours is not None:
        _add(runners, "fastblocks", ours.eval(), x.contiguous(memory_format=torch.channels_last), _fused_kind)
    with torch.no_grad():
        calls = {"\t".join(name): run for name, run in runners.items()}
        times = interleaved(calls, rounds_for(list(calls.values()), ROWS * seconds))
    medians = {name: float(f"{statistics.median(times[chr(9).join(name)]):.6g}") for name in runners}
    found: dict[str, dict[str, float]] = {}
    for (who, kind), median in medians.items():
        found.setdefault(who, {})[kind] = median
    whole = {who: kinds.pop("") for who, kinds in found.items()}
    layout = min(LAYOUTS, key=lambda name: sum(found[name].values()))
    names = {"torch": layout} | ({} if ours is None else {"fastblocks": "fastblocks"})
    return {
        "layout": layout,
        "seconds": {who: found[name] for who, name in names.items()},
        "whole": {who: whole[name] for who, name in names.items()},
    }


def _add(
    runners: dict[tuple[str, str], Callable[[], object]],
    who: str,
    network: nn.Module,
    x: Tensor,
    kind: Callable[[nn.Module], str | None],
) -> None:
    for name, layers in _recorded(network, x, kind).items():
        runners[who, name] = partial(_in_turn, layers)
    runners[who, ""] = partial(network, x)


def _in_turn(layers: list[tuple[nn.Module, Tensor]]) -> None:
    for layer, x in layers:
        layer(x)


def _recorded(network: nn.Module, x: Tensor, kind: Callable[[nn.Module], str | None]) -> Layers:
    """The layers that have a kind, each with a copy of the input that a run of the network gives it."""
    found: Layers = {}

    def seen(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.setdefault(name, []).append((layer, args[0].clone()))

    hooks = [
        layer.register_forward_pre_hook(partial(seen, name)) for layer in network.modules() if (name := kind(layer))
    ]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return found


def _plain_kind(layer: nn.Module) -> str | None:
    if isinstance(layer, (nn.BatchNorm2d, nn.ReLU, nn.ReLU6)):
        return ELEMENTWISE
    return kind_of(layer) if isinstance(layer, (nn.Conv2d, nn.Linear)) else None


def _fused_kind(layer: nn.Module) -> str | None:
    if isinstance(layer, Classifier):
        return "linear"
    return kind_of(layer[0]) if isinstance(layer, fastblocks.ConvBNAct) else None
