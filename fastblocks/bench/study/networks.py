"""The small networks of the guidelines' experiments (Ma et al. 2018, section 2), in plain torch and of fastblocks.

They are convolutions with a bias and no BatchNorm: at inference it is a part of the convolution's weights, and torch
need not pay for it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks.bench.study.timing import Pair
from fastblocks.functional import ConvBN, pointwise_conv_bn_act

__all__ = ["SIZE", "bottlenecks", "fragments_in_parallel", "seeded", "stacked"]

SIZE = 56  # pixels of a side, in all four experiments
REPEATS = 10  # blocks one after the other


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers at each run; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def stacked(widths: Sequence[int], groups: int = 1) -> Pair:
    """1x1 convolutions from each of these channels to the next."""
    with seeded():
        ours = fastblocks.Sequential(*(_pointwise(a, b, groups) for a, b in pairwise(widths)))
        plain = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 1, groups=groups)) for a, b in pairwise(widths)))
        return _settle(plain, ours, widths[0])


def fragments_in_parallel(channels: int, fragments: int) -> Pair:
    """Ten blocks, each of which is the sum of so many 1x1 convolutions of its input."""
    with seeded():
        ours = nn.Sequential(*(_FusedParallel(channels, fragments) for _ in range(REPEATS)))
        plain = nn.Sequential(*(_Parallel(channels, fragments) for _ in range(REPEATS)))
        return _settle(plain, ours, channels)


def bottlenecks(channels: int, *, relu: bool, shortcut: bool) -> Pair:
    """Ten of ResNet's bottlenecks (1x1, 3x3 and 1x1, a quarter of the channels inside)."""
    with seeded():
        ours = nn.Sequential(*(_FusedBottleneck(channels, relu, shortcut) for _ in range(REPEATS)))
        plain = nn.Sequential(*(_Bottleneck(channels, relu, shortcut) for _ in range(REPEATS)))
        return _settle(plain, ours, channels)


def _settle(plain: nn.Module, ours: nn.Module, channels: int) -> Pair:
    """Equal weights, under which activations keep their size from layer to layer, and an input."""
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    ours.load_state_dict(plain.state_dict())
    return Pair(plain, ours, torch.randn(1, channels, SIZE, SIZE))


def _pointwise(a: int, b: int, groups: int) -> nn.Module:
    return fastblocks.ConvBNAct(a, b, 1, groups=groups, norm_layer=None, activation_layer=None)


class _Parallel(nn.ModuleList):
    def __init__(self, channels: int, fragments: int) -> None:
        super().__init__(nn.Conv2d(channels, channels, 1) for _ in range(fragments))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self
        y = first(x)
        for conv in others:
            y += conv(x)
        return y


class _FusedParallel(_Parallel):
    def forward(self, x: Tensor) -> Tensor:
        y: Any = None
        convs: Any = self
        for conv in convs:
            y = pointwise_conv_bn_act(x, ConvBN(conv.weight, conv.bias), residual=y)
        return y


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, relu: bool, shortcut: bool) -> None:
        super().__init__()
        inner = channels // 4
        self.relu, self.shortcut = relu, shortcut
        self.inside = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, inner, 1), *self.activation()),
            nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1), *self.activation()),
        )
        self.last = nn.Conv2d(inner, channels, 1)

    def activation(self) -> list[nn.Module]:
        return [nn.ReLU(inplace=True)] if self.relu else []

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.inside(x))
        if self.shortcut:
            y += x
        return nn.functional.relu_(y) if self.relu else y


class _FusedBottleneck(_Bottleneck):
    def __init__(self, channels: int, relu: bool, shortcut: bool) -> None:
        super().__init__(channels, relu, shortcut)
        inner, act = channels // 4, nn.ReLU if relu else None
        self.inside = fastblocks.Sequential(
            fastblocks.ConvBNAct(channels, inner, 1, norm_layer=None, activation_layer=act),
            fastblocks.ConvBNAct(inner, inner, 3, norm_layer=None, activation_layer=act),
        )

    def forward(self, x: Tensor) -> Tensor:
        return pointwise_conv_bn_act(
            self.inside(x),
            ConvBN(self.last.weight, self.last.bias),
            activation="relu" if self.relu else None,
            residual=x if self.shortcut else None,
        )
