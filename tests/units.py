"""The layers of MobileNet and of the ShuffleNets for tests, and what each of them is in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastblocks import ChannelShuffle, ConvBNAct, DepthwiseSeparableConv, MaxPool2d, ShuffleUnit, ShuffleUnitV2

UNITS: dict[str, tuple[Callable[[], Any], str]] = {
    "separable": (lambda: DepthwiseSeparableConv(12, 20), "depthwise_separable"),
    "separable, stride": (lambda: DepthwiseSeparableConv(12, 20, 2), "depthwise_separable"),
    "separable, stride 3": (lambda: DepthwiseSeparableConv(12, 8, 3), "depthwise_separable"),
    "separable, relu": (lambda: DepthwiseSeparableConv(12, 20, activation_layer=nn.ReLU), "depthwise_separable"),
    "separable, linear": (lambda: DepthwiseSeparableConv(12, 20, activation_layer=None), "depthwise_separable"),
    "grouped": (lambda: ConvBNAct(12, 20, 1, groups=4), "grouped_pointwise_conv_bn_act"),
    "grouped, no norm": (lambda: ConvBNAct(12, 24, 1, groups=12, norm_layer=None), "grouped_pointwise_conv_bn_act"),
    "unit": (lambda: ShuffleUnit(12, 12, 1, 3), "shuffle_unit"),
    "unit, one group": (lambda: ShuffleUnit(12, 12, 1, 1), "shuffle_unit"),
    "unit, odd": (lambda: ShuffleUnit(12, 12, 1, 3, first_grouped=False), "shuffle_unit"),
    "unit, stride": (lambda: ShuffleUnit(12, 36, 2, 3), "shuffle_unit"),
    "unit, first": (lambda: ShuffleUnit(12, 40, 2, 2, first_grouped=False), "shuffle_unit"),
    "v2": (lambda: ShuffleUnitV2(12, 12, 1), "shuffle_unit_v2"),
    "v2, stride": (lambda: ShuffleUnitV2(12, 26, 2), "shuffle_unit_v2"),
    "shuffle": (lambda: ChannelShuffle(3), "channel_shuffle"),
    "pool": (lambda: MaxPool2d(3, 2, 1), "max_pool2d"),
    "pool, rectangle": (lambda: MaxPool2d((2, 3), (1, 2), (0, 1)), "max_pool2d"),
}

BLOCKS = ["separable", "unit", "unit, stride", "v2", "v2, stride"]


def image(n: int = 2, height: int = 7, width: int = 6) -> Tensor:
    return torch.randn(n, 12, height, width)


def plain_shuffle(x: Tensor, groups: int) -> Tensor:
    return x.reshape(len(x), groups, x.shape[1] // groups, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def one_by_one(layer: Any, x: Tensor) -> Tensor:
    """The output of the leaves, one after the other: what the papers say a layer is."""

    def run(module: Any, x: Tensor) -> Tensor:
        for child in module:
            x = child(x)
        return x

    if isinstance(layer, DepthwiseSeparableConv):
        return run(layer.pointwise, run(layer.depthwise, x))
    if isinstance(layer, ShuffleUnit):
        y = plain_shuffle(run(layer.compress, x), layer.shuffle.groups)
        y = run(layer.expand, run(layer.depthwise, y))
        if layer.stride == 1:
            return layer.activation(x + y)
        return torch.cat((layer.pool(x), layer.activation(y)), 1)
    if isinstance(layer, ShuffleUnitV2):
        left, right = x.chunk(2, 1) if layer.stride == 1 else (run(layer.branch1, x), x)
        return plain_shuffle(torch.cat((left, run(layer.branch2, right)), 1), 2)
    if isinstance(layer, ChannelShuffle):
        return plain_shuffle(x, layer.groups)
    if isinstance(layer, MaxPool2d):
        return nn.functional.max_pool2d(x, layer.kernel_size, layer.stride, layer.padding)
    return run(layer, x)
