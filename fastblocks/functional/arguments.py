"""What the checks of the ops are made of: tensors, convolution records, numbers, geometry.

A check costs a few attribute reads while everything is as it should be. Messages are composed only on the way to an
exception; each names the argument, its value and what was expected.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastblocks.functional.record import ConvBN

LIMIT = 2**31 - 1
"""Largest stride, padding, dilation and output size: what torch's own convolution kernels can count."""

_MAX_BYTES = 2**47
_ACTIVATIONS = (None, "relu", "relu6")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)
_DENSE = (Tensor, torch.nn.Parameter)
_VECTORS = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")

Conv = Sequence[Any]


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape as messages show it."""
    return f"shape {tuple(tensor.shape)}"


def _kind(value: object) -> str:
    return f"{type(value).__name__} {value!r}" if not isinstance(value, Tensor) else f"a tensor of {shape_of(value)}"


def _dtype_error(name: str, tensor: Tensor, expected: str) -> NoReturn:
    raise TypeError(f"{name}: expected {expected}, got dtype {tensor.dtype}")


def pair(name: str, value: Any) -> tuple[int, int]:
    """An int or a sequence of two ints, as a tuple of two."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an int or two ints, got {len(value)}: {value!r}")
        return integer(name, value[0], "an int or two ints"), integer(name, value[1], "an int or two ints")
    return (integer(name, value, "an int or two ints"),) * 2


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """Anything that is an integer (numpy's too, but no bool), as an int."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected {expected}, got {_kind(value)}")


def record(name: str, conv: Any) -> ConvBN:
    """The argument itself if it is a `ConvBN`."""
    if isinstance(conv, ConvBN):
        return conv
    raise TypeError(f"{name}: expected a ConvBN, got {type(conv).__name__}")


def eps_value(name: str, eps: Any) -> float:
    """The eps of a BatchNorm as a float."""
    if type(eps) is float:
        return eps
    if isinstance(eps, (int, float)) and not isinstance(eps, bool):
        return float(eps)
    raise TypeError(f"{name}.eps: expected a float, got {_kind(eps)}")


def dense_floats(name: str, x: Tensor) -> None:
    """A tensor that the ops compute with, of any shape."""
    if x.dtype not in _FLOATS:
        _dtype_error(name, x, "a floating point tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")


def image(name: str, x: Any, channels: int | None = None) -> None:
    """A dense floating point tensor ``(N, C, H, W)``, with `channels` channels if given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions (N, C, H, W), got {x.dim()}: {shape_of(x)}")
    dense_floats(name, x)
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {x.shape[1]}: {shape_of(x)}")


def _autocast(input: Tensor) -> bool:
    """Whether torch itself brings the operands to one dtype."""
    return torch.is_autocast_enabled(input.device.type)


def _same_device(a: Tensor, b: Tensor) -> bool:
    # is_cpu is much the faster one, but leaves a trace in a traced graph
    if not is_compiling() and a.is_cpu and b.is_cpu:
        return True
    return a.device == b.device


def same_kind(name: str, tensor: Any, input: Tensor, parameters: torch.dtype | None = None) -> None:
    """A dense tensor of the input's device and dtype. `parameters` is another dtype that is as good."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    dtype = tensor.dtype
    if dtype is not input.dtype and dtype is not parameters and not (dtype in _FLOATS and _autocast(input)):
        _dtype_error(name, tensor, f"the input's dtype {input.dtype}")
    if not _same_device(tensor, input):
        raise ValueError(f"{name}: expected the input's device {input.device}, got {tensor.device}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def divisor(name: str, value: int, total: int, of: str) -> None:
    """A number of groups that divides a number of channels; `of` says whose channels they are."""
    if value < 1 or total % value:
        raise ValueError(f"{name}: expected a divisor of {of}, {total}, got {value!r}")


def convolution(
    name: str, conv: Conv, input: Tensor, channels: int, *, depthwise: bool = False, groups: int = 1
) -> tuple[int, int, int]:
    """One convolution record on an input of `channels` channels: (output channels, kernel height, width).

    `groups` must divide the channels; a depthwise convolution has as many groups as channels without it.
    """
    if len(conv) != 6:
        raise ValueError(f"{name}: expected 6 entries (weight, bias, 4 of BatchNorm), got {len(conv)}")
    weight = conv[0]
    dtype = input.dtype
    cpu = not is_compiling() and input.is_cpu
    if not (
        cpu
        and weight.__class__ in _DENSE
        and weight.is_cpu
        and weight.dtype is dtype
        and weight.layout is torch.strided
    ):
        same_kind(f"{name}.weight", weight, input)
    if weight.dim() != 4:
        raise ValueError(f"{name}.weight: expected 4 dimensions (out, in, kh, kw), got {shape_of(weight)}")
    out, fan, kh, kw = weight.shape
    if depthwise:
        if fan != 1 or out != channels:
            raise ValueError(
                f"{name}.weight: expected shape ({channels}, 1, kh, kw), one filter for each of the {channels} "
                f"channels, got {shape_of(weight)}"
            )
    elif fan * groups != channels:
        source = f"{channels} in {groups} groups" if groups > 1 else "groups = 1"
        raise ValueError(
            f"{name}.weight: expected {channels // groups} input channels ({source}), as the input has, "
            f"got {fan}: {shape_of(weight)}"
        )
    if out < 1 or kh < 1 or kw < 1:
        raise ValueError(f"{name}.weight: expected no empty dimension, got {shape_of(weight)}")
    if groups > 1 and out % groups:
        raise ValueError(f"{name}.weight: expected outputs in {groups} groups, got {out}: {shape_of(weight)}")
    if conv[2] is None or conv[3] is None:
        for i in (2, 3, 4, 5):
            if conv[i] is not None:
                missing = "running_mean" if conv[2] is None else "running_var"
                raise ValueError(f"{name}.{missing}: expected a tensor beside {name}.{_VECTORS[i - 1]}, got None")
    # torch's BatchNorm takes float32 parameters beside half precision inputs
    other = torch.float32 if input.dtype in _HALVES else None
    size = (out,)
    for i, vector in enumerate(conv):
        if i and vector is not None:
            if (
                cpu
                and vector.__class__ in _DENSE
                and vector.is_cpu
                and vector.dtype is dtype
                and vector.shape == size
                and vector.layout is torch.strided
            ):
                continue
            same_kind(f"{name}.{_VECTORS[i - 1]}", vector, input, other if i > 1 else None)
            if vector.dim() != 1 or vector.shape[0] != out:
                raise ValueError(
                    f"{name}.{_VECTORS[i - 1]}: expected shape ({out},), as the weight has {out} outputs, "
                    f"got {shape_of(vector)}"
                )
    return out, kh, kw


def pointwise(name: str, conv: Conv, input: Tensor, channels: int, groups: int = 1) -> int:
    """One record of a 1x1 convolution; returns its output channels."""
    out, kh, kw = convolution(name, conv, input, channels, groups=groups)
    if kh != 1 or kw != 1:
        raise ValueError(f"{name}.weight: expected a 1x1 kernel, got {shape_of(conv[0])}")
    return out


def square_depthwise(name: str, conv: Conv, input: Tensor, channels: int) -> int:
    """One record of a depthwise convolution with a square kernel; returns the kernel's size."""
    _, kh, kw = convolution(name, conv, input, channels, depthwise=True)
    if kh != kw:
        raise ValueError(f"{name}.weight: expected a square kernel, got {shape_of(conv[0])}")
    return kh


def eps_count(eps: Sequence[float], expected: int) -> None:
    """One eps for each record."""
    if len(eps) != expected:
        raise ValueError(f"eps: expected {expected} values, got {len(eps)}")


def full_plane(input: Tensor, name: str = "input") -> None:
    """An image with at least one pixel."""
    if is_compiling():
        return
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"{name}: expected a height and width of at least 1, got {shape_of(input)}")


def some_channels(input: Tensor, name: str = "input") -> None:
    """An image with at least one channel."""
    if input.shape[1] < 1:
        raise ValueError(f"{name}: expected at least 1 channel, got {shape_of(input)}")


def residual_like(residual: Any, input: Tensor, out: int) -> None:
    """A residual for the output of a 1x1 convolution with `out` channels, or None."""
    if residual is None:
        return
    same_kind("residual", residual, input)
    n, _, h, w = input.shape
    if residual.shape != (n, out, h, w):
        raise ValueError(f"residual: expected the output's shape {(n, out, h, w)}, got {shape_of(residual)}")


def output_size(
    input: Tensor,
    out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    window: str,
) -> tuple[Any, Any]:
    """Checks the geometry; returns the output's height and width. `window` is the argument with the kernel's size."""
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        a, b = values
        if not (least <= a <= LIMIT and least <= b <= LIMIT):
            shown = a if a == b else tuple(values)
            raise ValueError(f"{name}: expected values from {least} to {LIMIT}, got {shown}")
    if is_compiling():
        # sizes may be symbols: comparing them would bind the traced program to what was compared
        return None, None
    size: list[Any] = []
    for i in (0, 1):
        reach = dilation[i] * (kernel[i] - 1) + 1
        padded = input.shape[2 + i] + 2 * padding[i]
        if padded < reach:
            raise ValueError(
                f"input: expected a {('height', 'width')[i]} of at least {reach - 2 * padding[i]}, for {window} "
                f"reaches over {reach} with padding {padding[i]} and dilation {dilation[i]}, got {shape_of(input)}"
            )
        size.append((padded - reach) // stride[i] + 1)
    height, width = size
    if height > LIMIT or width > LIMIT or input.shape[0] * out * height * width * input.element_size() > _MAX_BYTES:
        raise ValueError(
            f"padding: {tuple(padding)} makes an output of {out} x {height} x {width}, more than memory can hold"
        )
    return height, width


def activation_name(activation: Any) -> None:
    """None or an activation that the ops know."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'relu' or 'relu6', got {activation!r}")
