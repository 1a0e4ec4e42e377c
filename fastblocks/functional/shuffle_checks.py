"""The argument checks of the ops with shuffled channels: ShuffleNet's and ShuffleNetV2's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastblocks.functional.arguments import (
    Conv,
    activation_name,
    divisor,
    eps_count,
    full_plane,
    image,
    pointwise,
    residual_like,
    same_kind,
    shape_of,
    some_channels,
    square_depthwise,
)


def grouped_pointwise_conv_bn_act(
    input: Any, conv: Conv, eps: float, groups: Any, shuffle: Any, activation: Any, residual: Any
) -> None:
    """The arguments of a grouped 1x1 convolution."""
    image("input", input)
    channels = input.shape[1]
    divisor("groups", groups, channels, "the input's channels")
    out = pointwise("conv", conv, input, channels, groups)
    divisor("shuffle", shuffle, out, "the output's channels")
    residual_like(residual, input, out)
    full_plane(input)
    activation_name(activation)


def _stride(stride: Any) -> None:
    if stride != 1 and stride != 2:
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")


def _odd_depthwise(name: str, conv: Conv, input: Tensor, channels: int) -> None:
    if square_depthwise(name, conv, input, channels) % 2 == 0:
        raise ValueError(f"{name}.weight: expected an odd kernel, got {shape_of(conv[0])}")


def shuffle_unit(
    input: Any,
    compress: Conv,
    depthwise: Conv,
    expand: Conv,
    eps: Sequence[float],
    stride: Any,
    groups: Any,
    activation: Any,
) -> None:
    """The arguments of ShuffleNet's unit."""
    image("input", input)
    channels = input.shape[1]
    if groups < 1:
        raise ValueError(f"groups: expected at least 1, got {groups!r}")
    _stride(stride)
    weight = compress[0] if compress else None
    whole = isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[1] == channels
    if not whole:
        divisor("groups", groups, channels, "the input's channels")
    wide = pointwise("compress", compress, input, channels, 1 if whole else groups)
    divisor("groups", groups, wide, "the outputs of compress.weight")
    _odd_depthwise("depthwise", depthwise, input, wide)
    out = pointwise("expand", expand, input, wide, groups)
    if stride == 1 and out != channels:
        raise ValueError(
            f"expand.weight: expected {channels} outputs, as the input has channels (stride 1), "
            f"got {out}: {shape_of(expand[0])}"
        )
    eps_count(eps, 3)
    full_plane(input)
    activation_name(activation)


def shuffle_unit_v2(
    input: Any,
    left_depthwise: Conv,
    left_pointwise: Conv,
    pointwise1: Conv,
    depthwise: Conv,
    pointwise2: Conv,
    eps: Sequence[float],
    stride: Any,
    activation: Any,
) -> None:
    """The arguments of ShuffleNetV2's unit."""
    image("input", input)
    _stride(stride)
    channels = input.shape[1]
    for name, conv in (("left_depthwise", left_depthwise), ("left_pointwise", left_pointwise)):
        if stride == 1 and conv:
            raise ValueError(f"{name}: expected none at stride 1, where the left half passes through, got a record")
        if stride == 2 and not conv:
            raise ValueError(f"{name}: expected a record at stride 2, got none")
    if stride == 1:
        _even(input)
        channels = left = channels // 2
    else:
        _odd_depthwise("left_depthwise", left_depthwise, input, channels)
        left = pointwise("left_pointwise", left_pointwise, input, channels)
    wide = pointwise("pointwise1", pointwise1, input, channels)
    _odd_depthwise("depthwise", depthwise, input, wide)
    right = pointwise("pointwise2", pointwise2, input, wide)
    if right != left:
        raise ValueError(
            f"pointwise2.weight: expected {left} outputs, as the left half has channels, "
            f"got {right}: {shape_of(pointwise2[0])}"
        )
    eps_count(eps, 5)
    full_plane(input)
    activation_name(activation)


def _even(input: Tensor) -> None:
    if input.shape[1] % 2:
        raise ValueError(
            f"input: expected an even number of channels to split, got {input.shape[1]}: {shape_of(input)}"
        )


def channel_shuffle(input: Any, groups: Any) -> None:
    """The arguments of a shuffle."""
    image("input", input)
    some_channels(input)
    divisor("groups", groups, input.shape[1], "the input's channels")
    full_plane(input)


def channel_shuffle_split(input: Any, groups: Any) -> None:
    """The arguments of a shuffle with a split."""
    channel_shuffle(input, groups)
    _even(input)


def cat_shuffle_split(a: Any, b: Any, groups: Any) -> None:
    """The arguments of a concatenation with a shuffle and a split."""
    for name, x in (("a", a), ("b", b)):
        image(name, x)
        some_channels(x, name)
        full_plane(x, name)
    same_kind("b", b, a)
    n, first, h, w = a.shape
    second = b.shape[1]
    if b.shape != (n, second, h, w):
        raise ValueError(f"b: expected shape ({n}, channels, {h}, {w}), as a has, got {shape_of(b)}")
    if (first + second) % 2:
        raise ValueError(
            f"b: expected an even number of channels together with the {first} of a, got {second}: {shape_of(b)}"
        )
    divisor("groups", groups, first + second, "the channels of a and b together")
