"""The reference tier: every op as plain torch calls.

It works for every dtype and device, torch differentiates it, and its numbers are torch's own. The other tiers are
measured against it and fall back to it.

A convolution comes as the six entries ``[weight, bias, running_mean, running_var, bn_weight, bn_bias]``;
``running_mean is None`` says that no BatchNorm follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.backends.layout import suggests_channels_last

Conv = Sequence[Tensor | None]

_ONE = (1, 1)
_ZERO = (0, 0)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    # In place, as torchvision's blocks do: `x` is always this module's own intermediate. Nothing saved it for
    # backward, since neither convolution nor BatchNorm needs its output there.
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x, inplace=True)
    return F.relu6(x, inplace=True)


def _conv_bn(
    x: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    weight, bias, mean, var, bn_weight, bn_bias = conv
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    if mean is None:
        return y
    return F.batch_norm(y, mean, var, bn_weight, bn_bias, False, 0.0, eps)


def _add(y: Tensor, residual: Tensor) -> Tensor:
    # In place keeps y's memory format; out of place is for vmap and for autocast, where the dtypes differ.
    if y.dtype == residual.dtype and y.shape == residual.shape and not torch._C._functorch.maybe_current_level():
        return y.add_(residual)
    return y + residual


def conv_bn_act(
    input: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    """Dense convolution, BatchNorm with running statistics, activation."""
    return _activate(_conv_bn(input, conv, eps, stride, padding, dilation, 1), activation)


def pointwise_conv_bn_act(
    input: Tensor, conv: Conv, eps: float, activation: str | None, residual: Tensor | None
) -> Tensor:
    """1x1 convolution, BatchNorm with running statistics, residual, activation, in this order."""
    y = _conv_bn(input, conv, eps, _ONE, _ZERO, _ONE, 1)
    if residual is not None:
        y = _add(y, residual)
    return _activate(y, activation)


def depthwise_conv_bn_act(
    input: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    """Depthwise convolution, BatchNorm with running statistics, activation."""
    return _activate(_conv_bn(input, conv, eps, stride, padding, dilation, input.shape[1]), activation)


def inverted_residual(
    input: Tensor,
    expand: Conv,
    depthwise: Conv,
    project: Conv,
    eps: Sequence[float],
    stride: int,
    padding: int,
    activation: str | None,
    residual: bool,
) -> Tensor:
    """Expand (unless `expand` is empty), depthwise, project, and the sum with the input."""
    y = pointwise_conv_bn_act(input, expand, eps[0], activation, None) if expand else input
    y = depthwise_conv_bn_act(y, depthwise, eps[1], (stride, stride), (padding, padding), _ONE, activation)
    return pointwise_conv_bn_act(y, project, eps[2], None, input if residual else None)


def grouped_pointwise_conv_bn_act(
    input: Tensor,
    conv: Conv,
    eps: float,
    groups: int,
    shuffle: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Grouped 1x1 convolution, BatchNorm, residual, activation, and then a shuffle of the output's channels."""
    y = _conv_bn(input, conv, eps, _ONE, _ZERO, _ONE, groups)
    if residual is not None:
        y = _add(y, residual)
    y = _activate(y, activation)
    return y if shuffle == 1 else channel_shuffle(y, shuffle)


def depthwise_separable(
    input: Tensor,
    depthwise: Conv,
    pointwise: Conv,
    eps: Sequence[float],
    stride: int,
    padding: int,
    activation: str | None,
) -> Tensor:
    """Depthwise and 1x1 convolution, each with BatchNorm and activation."""
    y = depthwise_conv_bn_act(input, depthwise, eps[0], (stride, stride), (padding, padding), _ONE, activation)
    return pointwise_conv_bn_act(y, pointwise, eps[1], activation, None)


def _same_depthwise(x: Tensor, conv: Conv, eps: float, stride: int) -> Tensor:
    """Depthwise convolution and BatchNorm, padded so that stride 1 keeps height and width."""
    pad = conv[0].shape[2] // 2  # type: ignore[union-attr]
    return depthwise_conv_bn_act(x, conv, eps, (stride, stride), (pad, pad), _ONE, None)


def shuffle_unit(
    input: Tensor,
    compress: Conv,
    depthwise: Conv,
    expand: Conv,
    eps: Sequence[float],
    stride: int,
    groups: int,
    activation: str | None,
) -> Tensor:
    """ShuffleNet's unit: grouped 1x1, shuffle, depthwise, grouped 1x1; then the sum or the concatenation."""
    whole = compress[0].shape[1] == input.shape[1]  # type: ignore[union-attr]
    y = grouped_pointwise_conv_bn_act(input, compress, eps[0], 1 if whole else groups, groups, activation, None)
    y = _same_depthwise(y, depthwise, eps[1], stride)
    if stride == 1:
        return grouped_pointwise_conv_bn_act(y, expand, eps[2], groups, 1, activation, input)
    y = grouped_pointwise_conv_bn_act(y, expand, eps[2], groups, 1, activation, None)
    return torch.cat((avg_pool2d(input, (3, 3), (2, 2), (1, 1)), y), 1)


def shuffle_unit_v2(
    input: Tensor,
    left_depthwise: Conv,
    left_pointwise: Conv,
    pointwise1: Conv,
    depthwise: Conv,
    pointwise2: Conv,
    eps: Sequence[float],
    stride: int,
    activation: str | None,
) -> Tensor:
    """ShuffleNetV2's unit: two branches, each on a half of the channels (stride 1) or on all, joined and shuffled."""
    if left_depthwise:
        left = _same_depthwise(input, left_depthwise, eps[0], stride)
        left, right = pointwise_conv_bn_act(left, left_pointwise, eps[1], activation, None), input
    else:
        left, right = input.chunk(2, 1)
    right = pointwise_conv_bn_act(right, pointwise1, eps[2], activation, None)
    right = _same_depthwise(right, depthwise, eps[3], stride)
    right = pointwise_conv_bn_act(right, pointwise2, eps[4], activation, None)
    return channel_shuffle(torch.cat((left, right), 1), 2)


def _copy(x: Tensor, channels_last: bool) -> Tensor:
    # by way of permute: vmap has no clone into channels_last
    if channels_last:
        return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
    return x.clone(memory_format=torch.contiguous_format)


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Channel ``i * (C / groups) + j`` becomes channel ``j * groups + i``; always a copy."""
    n, channels, h, w = input.shape
    split = (groups, channels // groups)
    if suggests_channels_last(input):
        y = input.permute(0, 2, 3, 1).view(n, h, w, *split).transpose(3, 4)
        return y.clone(memory_format=torch.contiguous_format).view(n, h, w, channels).permute(0, 3, 1, 2)
    y = input.view(n, *split, h, w).transpose(1, 2)
    return y.clone(memory_format=torch.contiguous_format).view(n, channels, h, w)


def channel_shuffle_split(input: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The two halves of the shuffled channels, each in memory of its own."""
    channels_last = suggests_channels_last(input)
    left, right = channel_shuffle(input, groups).chunk(2, 1)
    return _copy(left, channels_last), _copy(right, channels_last)


def cat_shuffle_split(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The two halves of the shuffled channels of `a` and `b` together."""
    return channel_shuffle_split(torch.cat((a, b), 1), groups)


def max_pool2d(input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Largest value under each place of the window; what lies outside of the map does not take part."""
    return F.max_pool2d(input, kernel_size, stride, padding)  # type: ignore[call-overload]


def avg_pool2d(input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Mean under each place of the window; what lies outside of the map counts as zeros."""
    return F.avg_pool2d(input, kernel_size, stride, padding)  # type: ignore[arg-type]


def global_avg_pool(input: Tensor) -> Tensor:
    """Mean over height and width, which stay as sizes of 1."""
    return F.adaptive_avg_pool2d(input, 1)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input @ weight.T + bias``."""
    return F.linear(input, weight, bias)


TABLE: dict[str, Callable[..., Any]] = {
    "conv_bn_act": conv_bn_act,
    "pointwise_conv_bn_act": pointwise_conv_bn_act,
    "depthwise_conv_bn_act": depthwise_conv_bn_act,
    "inverted_residual": inverted_residual,
    "grouped_pointwise_conv_bn_act": grouped_pointwise_conv_bn_act,
    "depthwise_separable": depthwise_separable,
    "shuffle_unit": shuffle_unit,
    "shuffle_unit_v2": shuffle_unit_v2,
    "channel_shuffle": channel_shuffle,
    "channel_shuffle_split": channel_shuffle_split,
    "cat_shuffle_split": cat_shuffle_split,
    "max_pool2d": max_pool2d,
    "avg_pool2d": avg_pool2d,
    "global_avg_pool": global_avg_pool,
    "linear": linear,
}
"""The ops of this tier by name; every tier has the same names with the same arguments.

Each gives one tensor, or the two halves of a split as a tuple.
"""
