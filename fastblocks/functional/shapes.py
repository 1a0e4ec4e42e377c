"""Shapes and strides of each op's output, without computing it: for tracing, and as a promise that kernels keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastblocks.backends import reference
from fastblocks.backends.layout import output_memory_format, suggests_channels_last


def _spatial(size: Any, kernel: Any, stride: int, padding: int, dilation: int) -> Any:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _empty(input: Tensor, out: Any, height: Any, width: Any, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(
        (input.shape[0], out, height, width), dtype=input.dtype, device=input.device, memory_format=memory_format
    )


def _format(*inputs: Tensor) -> torch.memory_format:
    """The memory format of what is no convolution: channels_last if all inputs are, as torch.cat has it."""
    return torch.channels_last if all(map(suggests_channels_last, inputs)) else torch.contiguous_format


def conv_bn_act(
    input: Tensor,
    conv: Sequence[Any],
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    """Of a dense or a depthwise convolution."""
    weight = conv[0]
    h, w = (_spatial(input.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return _empty(input, weight.shape[0], h, w, output_memory_format(input, weight))


def _depthwise(input: Tensor, conv: Sequence[Any], stride: int, padding: int) -> Tensor:
    return conv_bn_act(input, conv, 0.0, (stride, stride), (padding, padding), (1, 1), None)


def pointwise_conv_bn_act(
    input: Tensor, conv: Sequence[Any], eps: float, activation: str | None, residual: Tensor | None
) -> Tensor:
    """Of a 1x1 convolution, whatever its groups."""
    weight = conv[0]
    return _empty(input, weight.shape[0], input.shape[2], input.shape[3], output_memory_format(input, weight))


def _pointwise(input: Tensor, conv: Sequence[Any]) -> Tensor:
    return pointwise_conv_bn_act(input, conv, 0.0, None, None)


def inverted_residual(
    input: Tensor,
    expand: Sequence[Any],
    depthwise: Sequence[Any],
    project: Sequence[Any],
    eps: Sequence[float],
    stride: int,
    padding: int,
    activation: str | None,
    residual: bool,
) -> Tensor:
    """Of an inverted residual: each of the convolutions hands its memory format on to the next."""
    y = _pointwise(input, expand) if expand else input
    return _pointwise(_depthwise(y, depthwise, stride, padding), project)


def grouped_pointwise_conv_bn_act(
    input: Tensor,
    conv: Sequence[Any],
    eps: float,
    groups: int,
    shuffle: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Of a grouped 1x1 convolution."""
    y = _pointwise(input, conv)
    return y if shuffle == 1 else channel_shuffle(y, shuffle)


def depthwise_separable(
    input: Tensor,
    depthwise: Sequence[Any],
    pointwise: Sequence[Any],
    eps: Sequence[float],
    stride: int,
    padding: int,
    activation: str | None,
) -> Tensor:
    """Of a depthwise separable convolution."""
    return _pointwise(_depthwise(input, depthwise, stride, padding), pointwise)


def shuffle_unit(
    input: Tensor,
    compress: Sequence[Any],
    depthwise: Sequence[Any],
    expand: Sequence[Any],
    eps: Sequence[float],
    stride: int,
    groups: int,
    activation: str | None,
) -> Tensor:
    """Of ShuffleNet's unit."""
    y = channel_shuffle(_pointwise(input, compress), groups)
    y = _pointwise(_depthwise(y, depthwise, stride, depthwise[0].shape[2] // 2), expand)
    return y if stride == 1 else _cat(max_or_avg_pool2d(input, (3, 3), (2, 2), (1, 1)), y)


def shuffle_unit_v2(
    input: Tensor,
    left_depthwise: Sequence[Any],
    left_pointwise: Sequence[Any],
    pointwise1: Sequence[Any],
    depthwise: Sequence[Any],
    pointwise2: Sequence[Any],
    eps: Sequence[float],
    stride: int,
    activation: str | None,
) -> Tensor:
    """Of ShuffleNetV2's unit."""
    if left_depthwise:
        left = _depthwise(input, left_depthwise, stride, left_depthwise[0].shape[2] // 2)
        left, right = _pointwise(left, left_pointwise), input
    else:
        left, right = input.chunk(2, 1)
    right = _depthwise(_pointwise(right, pointwise1), depthwise, stride, depthwise[0].shape[2] // 2)
    return channel_shuffle(_cat(left, _pointwise(right, pointwise2)), 2)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    return _empty(a, a.shape[1] + b.shape[1], a.shape[2], a.shape[3], _format(a, b))


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Of a shuffle of channels."""
    _, channels, h, w = input.shape
    return _empty(input, channels, h, w, _format(input))


def channel_shuffle_split(input: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of a shuffle with a split."""
    _, channels, h, w = input.shape
    left, right = (_empty(input, channels // 2, h, w, _format(input)) for _ in range(2))
    return left, right


def cat_shuffle_split(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of a concatenation with a shuffle and a split."""
    return channel_shuffle_split(_cat(a, b), groups)


def max_or_avg_pool2d(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Of a pooling with a window."""
    h, w = (_spatial(input.shape[2 + i], kernel_size[i], stride[i], padding[i], 1) for i in (0, 1))
    return _empty(input, input.shape[1], h, w, _format(input))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of the fully connected layer."""
    return torch.empty((input.shape[0], weight.shape[0]), dtype=input.dtype, device=input.device)


FAKES: dict[str, Callable[..., Any]] = {
    "conv_bn_act": conv_bn_act,
    "pointwise_conv_bn_act": pointwise_conv_bn_act,
    "depthwise_conv_bn_act": conv_bn_act,
    "inverted_residual": inverted_residual,
    "grouped_pointwise_conv_bn_act": grouped_pointwise_conv_bn_act,
    "depthwise_separable": depthwise_separable,
    "shuffle_unit": shuffle_unit,
    "shuffle_unit_v2": shuffle_unit_v2,
    "channel_shuffle": channel_shuffle,
    "channel_shuffle_split": channel_shuffle_split,
    "cat_shuffle_split": cat_shuffle_split,
    "max_pool2d": max_or_avg_pool2d,
    "avg_pool2d": max_or_avg_pool2d,
    # torch's own, for its rule of the output's strides
    "global_avg_pool": reference.global_avg_pool,
    "linear": linear,
}
"""The shapes of each op's outputs, by its name, from the arguments of its schema."""
