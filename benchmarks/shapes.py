"""What the benchmarks time, and in which sizes: the ops, and the networks. Each in fastblocks and in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks import ConvBNAct, DepthwiseConvBNAct, PointwiseConvBNAct, functional
from fastblocks.bench.stock import stock_model

MODELS = ("mobilenet_v1", "mobilenet_v2", "shufflenet_v1_g3", "shufflenet_v2_x1_0")

Output = Tensor | tuple[Tensor, ...]
Build = Callable[[], nn.Module]


class Shape(NamedTuple):
    """What is run, on an input of which size (without the batch). Both sides have the same keys in their state_dict."""

    name: str
    size: tuple[int, ...]
    ours: Build
    stock: Build
    quick: bool = False
    """Whether it is in the quick profile."""
    image: bool = False
    """Whether fastblocks gets its input in NCHW, as a picture comes; else channels_last, as between its layers."""
    nchw_weights: bool = False
    """Whether fastblocks keeps NCHW weights, and so an NCHW output; else channels_last ones, as in its networks."""


def ids(shape: Shape) -> str:
    """A shape's name, as part of a test id."""
    return shape.name.replace(" ", "_")


# ------------------------------------------------------------------------------------------------ modules around an op


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Output]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Output:
        return self.function(x)


class GroupedPointwise(nn.Sequential):
    """Grouped 1x1 convolution, BatchNorm, ReLU, channel shuffle: plain torch, and as one op."""

    def __init__(self, cin: int, out: int, groups: int, fused: bool) -> None:
        conv = nn.Conv2d(cin, out, 1, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), nn.ReLU(), nn.ChannelShuffle(groups))
        self.groups, self.fused = groups, fused
        self.record: functional.ConvBN | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return super().forward(x)
        if self.record is None:  # weights are loaded into the tensors that are there
            conv: Any = self[0]
            bn: Any = self[1]
            self.record = functional.ConvBN(
                conv.weight, None, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
            )
        return functional.grouped_pointwise_conv_bn_act(
            x, self.record, groups=self.groups, shuffle=self.groups, activation="relu"
        )


def split_shuffled(x: Tensor) -> tuple[Tensor, ...]:
    """Channel shuffle in two groups and the split behind it, in plain torch: two copies, in the layout of `x`."""
    n, c, h, w = x.shape
    y = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    last = x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    return tuple(half.contiguous(memory_format=form) for half in y.chunk(2, 1))


def _stock_conv(cin: int, out: int, kernel: int, stride: int, groups: int) -> nn.Module:
    conv = nn.Conv2d(cin, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))


# -------------------------------------------------------------------------------------------------------------- shapes


def _function(
    name: str, size: tuple[int, ...], ours: Callable[[Tensor], Output], stock: Callable[[Tensor], Output], quick: bool
) -> Shape:
    return Shape(name, size, lambda: Call(ours), lambda: Call(stock), quick)


def _part(name: str, network: str, path: str, size: tuple[int, int, int], quick: bool = False) -> Shape:
    """A block of a network."""

    def ours() -> nn.Module:
        return fastblocks.models.create(network).get_submodule(path)

    def stock() -> nn.Module:
        return stock_model(fastblocks.models.create(network).state_dict()).get_submodule(path)

    return Shape(name, size, ours, stock, quick)


def _network(name: str) -> Shape:
    return Shape(
        f"{name} 224x224",
        (3, 224, 224),
        lambda: fastblocks.models.create(name),
        lambda: stock_model(fastblocks.models.create(name).state_dict()),
        quick=True,
        image=True,
    )


def _stem(cin: int, out: int, side: int, quick: bool = False, *, nchw: bool = False) -> Shape:
    return Shape(
        f"conv_bn_act {cin}-{out} 3x3 {side}x{side} s2" + " to nchw" * nchw,
        (cin, side, side),
        lambda: ConvBNAct(cin, out, stride=2),
        lambda: _stock_conv(cin, out, 3, 2, 1),
        quick,
        image=True,
        nchw_weights=nchw,
    )


def _pointwise(cin: int, out: int, side: int, quick: bool = False) -> Shape:
    return Shape(
        f"pointwise_conv_bn_act {cin}-{out} {side}x{side}",
        (cin, side, side),
        lambda: PointwiseConvBNAct(cin, out),
        lambda: _stock_conv(cin, out, 1, 1, 1),
        quick,
    )


def _depthwise(channels: int, side: int, stride: int, quick: bool = False) -> Shape:
    return Shape(
        f"depthwise_conv_bn_act {channels} 3x3 {side}x{side} s{stride}",
        (channels, side, side),
        lambda: DepthwiseConvBNAct(channels, stride=stride),
        lambda: _stock_conv(channels, channels, 3, stride, channels),
        quick,
    )


def grouped(cin: int, out: int, groups: int, side: int, quick: bool = False) -> Shape:
    return Shape(
        f"grouped_pointwise_conv_bn_act {cin}-{out} g{groups} {side}x{side}",
        (cin, side, side),
        lambda: GroupedPointwise(cin, out, groups, True),
        lambda: GroupedPointwise(cin, out, groups, False),
        quick,
    )


def _shuffle_split(channels: int, side: int, quick: bool = False) -> Shape:
    name = f"channel_shuffle_split {channels} {side}x{side}"
    return _function(
        name, (channels, side, side), lambda x: functional.channel_shuffle_split(x, 2), split_shuffled, quick
    )


OPS = (
    _stem(3, 32, 224, True),
    _stem(3, 32, 224, nchw=True),
    _pointwise(32, 192, 28, True),
    _pointwise(320, 1280, 7),
    _depthwise(192, 28, 1, True),
    _depthwise(144, 56, 2),
    _part("inverted_residual 24-144-32 56x56 s2", "mobilenet_v2", "features.4", (24, 56, 56)),
    _part("inverted_residual 32-192-32 28x28 s1", "mobilenet_v2", "features.5", (32, 28, 28), True),
    _part("inverted_residual 160-960-160 7x7 s1", "mobilenet_v2", "features.15", (160, 7, 7), True),
    _part("depthwise_separable 128-128 56x56 s1", "mobilenet_v1", "features.3", (128, 56, 56), True),
    _part("depthwise_separable 512-1024 14x14 s2", "mobilenet_v1", "features.12", (512, 14, 14)),
    grouped(200, 50, 2, 28),
    grouped(240, 60, 3, 28, True),
    grouped(544, 136, 4, 14),
    grouped(1536, 384, 8, 7),
    _part("shuffle_unit 240 g3 28x28 s1", "shufflenet_v1_g3", "stage2.1", (240, 28, 28), True),
    _part("shuffle_unit 240-480 g3 28x28 s2", "shufflenet_v1_g3", "stage3.0", (240, 28, 28)),
    _part("shuffle_unit_v2 116 28x28 s1", "shufflenet_v2_x1_0", "stage2.1", (116, 28, 28), True),
    _part("shuffle_unit_v2 116-232 28x28 s2", "shufflenet_v2_x1_0", "stage3.0", (116, 28, 28)),
    _function(
        "channel_shuffle 240 g3 28x28",
        (240, 28, 28),
        lambda x: functional.channel_shuffle(x, 3),
        nn.ChannelShuffle(3),
        True,
    ),
    _shuffle_split(116, 28, True),
    _shuffle_split(464, 7),
    _function(
        "cat_shuffle_split 58+58 28x28",
        (116, 28, 28),
        lambda x: functional.cat_shuffle_split(x[:, :58], x[:, 58:]),
        lambda x: split_shuffled(torch.cat((x[:, :58], x[:, 58:]), 1)),
        True,
    ),
    _function(
        "max_pool2d 24 3x3 112x112 s2",
        (24, 112, 112),
        lambda x: functional.max_pool2d(x, 3, 2, 1),
        nn.MaxPool2d(3, 2, 1),
        True,
    ),
    _function(
        "avg_pool2d 240 3x3 28x28 s2",
        (240, 28, 28),
        lambda x: functional.avg_pool2d(x, 3, 2, 1),
        nn.AvgPool2d(3, 2, 1),
        True,
    ),
    _function("global_avg_pool 1280 7x7", (1280, 7, 7), functional.global_avg_pool, nn.AdaptiveAvgPool2d(1), True),
    Shape(
        "linear 1280-1000",
        (1280,),
        lambda: fastblocks.layers.head.Linear(1280, 1000),
        lambda: nn.Linear(1280, 1000),
        True,
    ),
)
"""The first word of a name is that of the op in `fastblocks.functional`."""

NETWORKS = tuple(map(_network, MODELS))
