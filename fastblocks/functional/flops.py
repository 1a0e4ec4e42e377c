"""Multiply-adds of the ops, each counted as two, for ``torch.utils.flop_counter``; from the shapes of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Shape = Sequence[int]


def _one(weight: Shape, n: int, plane: Shape) -> int:
    """A convolution with this weight and this plane of outputs; the weight's shape knows of the groups."""
    total = 2 * n
    for size in (*plane, *weight):
        total *= size
    return total


def conv(x: Shape, conv: Sequence[Any], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A single convolution."""
    return _one(conv[0], x[0], out_shape[2:])


def inverted_residual(
    x: Shape, expand: Any, depthwise: Any, project: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Expansion (if there is one), depthwise convolution, projection; and likewise ShuffleNet's unit."""
    small = _one(depthwise[0], x[0], out_shape[2:]) + _one(project[0], x[0], out_shape[2:])
    return small + (_one(expand[0], x[0], x[2:]) if expand else 0)


def depthwise_separable(
    x: Shape, depthwise: Any, pointwise: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Depthwise and 1x1 convolution."""
    return _one(depthwise[0], x[0], out_shape[2:]) + _one(pointwise[0], x[0], out_shape[2:])


def shuffle_unit_v2(
    x: Shape,
    left_depthwise: Any,
    left_pointwise: Any,
    pointwise1: Any,
    depthwise: Any,
    pointwise2: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """The right branch, and the left one where it has convolutions."""
    small = (left_depthwise, left_pointwise, depthwise, pointwise2)
    return _one(pointwise1[0], x[0], x[2:]) + sum(_one(conv[0], x[0], out_shape[2:]) for conv in small if conv)


def linear(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    """The fully connected layer."""
    return 2 * x[0] * weight[0] * weight[1]


FLOPS: dict[str, Callable[..., int]] = {
    "conv_bn_act": conv,
    "pointwise_conv_bn_act": conv,
    "depthwise_conv_bn_act": conv,
    "inverted_residual": inverted_residual,
    "grouped_pointwise_conv_bn_act": conv,
    "depthwise_separable": depthwise_separable,
    "shuffle_unit": inverted_residual,
    "shuffle_unit_v2": shuffle_unit_v2,
    "linear": linear,
}
"""The count of each op that has multiply-adds."""
