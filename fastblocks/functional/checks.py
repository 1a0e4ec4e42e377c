"""The argument checks of every op: here once, so that the kernels behind need none.

The arguments are those of the op schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from fastblocks.functional import shuffle_checks
from fastblocks.functional.arguments import (
    LIMIT,
    Conv,
    activation_name,
    convolution,
    dense_floats,
    eps_count,
    eps_value,
    full_plane,
    image,
    integer,
    output_size,
    pair,
    pointwise,
    record,
    residual_like,
    same_kind,
    shape_of,
    some_channels,
    square_depthwise,
)

__all__ = ["CHECKS", "LIMIT", "eps_value", "image", "integer", "pair", "record"]

_LARGEST_WINDOW = 2**20


def conv_bn_act(input: Any, conv: Conv, eps: float, stride: Any, padding: Any, dilation: Any, activation: Any) -> None:
    """The arguments of a dense convolution."""
    image("input", input)
    out, kh, kw = convolution("conv", conv, input, input.shape[1])
    output_size(input, out, (kh, kw), stride, padding, dilation, "conv.weight")
    activation_name(activation)


def depthwise_conv_bn_act(
    input: Any, conv: Conv, eps: float, stride: Any, padding: Any, dilation: Any, activation: Any
) -> None:
    """The arguments of a depthwise convolution."""
    image("input", input)
    out, kh, kw = convolution("conv", conv, input, input.shape[1], depthwise=True)
    output_size(input, out, (kh, kw), stride, padding, dilation, "conv.weight")
    activation_name(activation)


def pointwise_conv_bn_act(input: Any, conv: Conv, eps: float, activation: Any, residual: Any) -> None:
    """The arguments of a 1x1 convolution."""
    image("input", input)
    out = pointwise("conv", conv, input, input.shape[1])
    residual_like(residual, input, out)
    full_plane(input)
    activation_name(activation)


def inverted_residual(
    input: Any,
    expand: Conv,
    depthwise: Conv,
    project: Conv,
    eps: Sequence[float],
    stride: Any,
    padding: Any,
    activation: Any,
    residual: Any,
) -> None:
    """The arguments of an inverted residual."""
    image("input", input)
    channels = input.shape[1]
    wide = pointwise("expand", expand, input, channels) if expand else channels
    k = square_depthwise("depthwise", depthwise, input, wide)
    out = pointwise("project", project, input, wide)
    eps_count(eps, 3)
    full_plane(input)
    size = output_size(input, out, (k, k), (stride, stride), (padding, padding), (1, 1), "depthwise.weight")
    if residual and (out != channels or not (is_compiling() or size == (input.shape[2], input.shape[3]))):
        raise ValueError(
            f"residual: expected False where input and output differ, here ({channels}, {input.shape[2]}, "
            f"{input.shape[3]}) and ({out}, {size[0]}, {size[1]}), got {residual!r}"
        )
    activation_name(activation)


def depthwise_separable(
    input: Any, depthwise: Conv, pointwise_: Conv, eps: Sequence[float], stride: Any, padding: Any, activation: Any
) -> None:
    """The arguments of a depthwise separable convolution."""
    image("input", input)
    channels = input.shape[1]
    k = square_depthwise("depthwise", depthwise, input, channels)
    out = pointwise("pointwise", pointwise_, input, channels)
    eps_count(eps, 2)
    full_plane(input)
    output_size(input, out, (k, k), (stride, stride), (padding, padding), (1, 1), "depthwise.weight")
    activation_name(activation)


def pool2d(input: Any, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    """The arguments of a pooling with a window."""
    image("input", input)
    some_channels(input)
    full_plane(input)
    for k, p in zip(kernel_size, padding, strict=True):
        if not 1 <= k <= _LARGEST_WINDOW:
            raise ValueError(f"kernel_size: expected values from 1 to {_LARGEST_WINDOW}, got {tuple(kernel_size)}")
        if p > k // 2:
            raise ValueError(
                f"padding: expected at most half of kernel_size {tuple(kernel_size)}, got {tuple(padding)}"
            )
    output_size(input, input.shape[1], kernel_size, stride, padding, (1, 1), "kernel_size")


def global_avg_pool(input: Any) -> None:
    """The argument of the global average pooling."""
    image("input", input)
    full_plane(input)


def linear(input: Any, weight: Any, bias: Any) -> None:
    """The arguments of the fully connected layer."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if input.dim() != 2:
        raise ValueError(f"input: expected 2 dimensions (N, features), got {input.dim()}: {shape_of(input)}")
    dense_floats("input", input)
    same_kind("weight", weight, input)
    if weight.dim() != 2 or weight.shape[1] != input.shape[1]:
        raise ValueError(f"weight: expected shape (out, {input.shape[1]}), as the input has, got {shape_of(weight)}")
    if bias is not None:
        same_kind("bias", bias, input)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {shape_of(bias)}")


CHECKS: dict[str, Callable[..., None]] = {
    "conv_bn_act": conv_bn_act,
    "pointwise_conv_bn_act": pointwise_conv_bn_act,
    "depthwise_conv_bn_act": depthwise_conv_bn_act,
    "inverted_residual": inverted_residual,
    "grouped_pointwise_conv_bn_act": shuffle_checks.grouped_pointwise_conv_bn_act,
    "depthwise_separable": depthwise_separable,
    "shuffle_unit": shuffle_checks.shuffle_unit,
    "shuffle_unit_v2": shuffle_checks.shuffle_unit_v2,
    "channel_shuffle": shuffle_checks.channel_shuffle,
    "channel_shuffle_split": shuffle_checks.channel_shuffle_split,
    "cat_shuffle_split": shuffle_checks.cat_shuffle_split,
    "max_pool2d": pool2d,
    "avg_pool2d": pool2d,
    "global_avg_pool": global_avg_pool,
    "linear": linear,
}
"""The check of each op, by its name, on the arguments of its schema."""
