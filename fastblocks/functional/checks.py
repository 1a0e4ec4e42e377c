"""The argument checks of every op: here once, so that the kernels behind need none.

A check costs a few attribute reads while everything is as it should be. Messages are composed only on the way to an
exception; each names the argument, its value and what was expected. The arguments are those of the op schemas.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
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


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _kind(value: object) -> str:
    return f"{type(value).__name__} {value!r}" if not isinstance(value, Tensor) else f"a tensor of {_shape(value)}"


def _dtype_error(name: str, tensor: Tensor, expected: str) -> NoReturn:
    raise TypeError(f"{name}: expected {expected}, got dtype {tensor.dtype}")


def is_float(dtype: torch.dtype) -> bool:
    """Whether the ops compute in this dtype."""
    return dtype in _FLOATS


def pair(name: str, value: Any) -> tuple[int, int]:
    """An int or a sequence of two ints, as a tuple of two."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an int or two ints, got {len(value)}: {value!r}")
        return integer(name, value[0]), integer(name, value[1])
    return (integer(name, value),) * 2


def integer(name: str, value: Any) -> int:
    """Anything that is an integer (numpy's too, but no bool), as an int."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an int or two ints, got {_kind(value)}")


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


def image(name: str, x: Any, channels: int | None = None) -> None:
    """A dense floating point tensor ``(N, C, H, W)``, with `channels` channels if given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions (N, C, H, W), got {x.dim()}: {_shape(x)}")
    if x.dtype not in _FLOATS:
        _dtype_error(name, x, "a floating point tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {x.shape[1]}: {_shape(x)}")


def _autocast(input: Tensor) -> bool:
    """Whether torch itself brings the operands to one dtype."""
    return torch.is_autocast_enabled(input.device.type)


def _same_device(a: Tensor, b: Tensor) -> bool:
    # is_cpu is much the faster one, but leaves a trace in a traced graph
    if not is_compiling() and a.is_cpu and b.is_cpu:
        return True
    return a.device == b.device


def _same_kind(name: str, tensor: Any, input: Tensor, parameters: torch.dtype | None = None) -> None:
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


def _conv(name: str, conv: Conv, input: Tensor, channels: int, depthwise: bool) -> tuple[int, int, int]:
    """One convolution record on an input of `channels` channels: (output channels, kernel height, width)."""
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
        _same_kind(f"{name}.weight", weight, input)
    if weight.dim() != 4:
        raise ValueError(f"{name}.weight: expected 4 dimensions (out, in, kh, kw), got {_shape(weight)}")
    out, fan, kh, kw = weight.shape
    if depthwise:
        if fan != 1 or out != channels:
            raise ValueError(
                f"{name}.weight: expected shape ({channels}, 1, kh, kw), one filter for each of the {channels} "
                f"channels, got {_shape(weight)}"
            )
    elif fan != channels:
        raise ValueError(
            f"{name}.weight: expected {channels} input channels (groups = 1), as the input has, "
            f"got {fan}: {_shape(weight)}"
        )
    if out < 1 or kh < 1 or kw < 1:
        raise ValueError(f"{name}.weight: expected no empty dimension, got {_shape(weight)}")
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
            _same_kind(f"{name}.{_VECTORS[i - 1]}", vector, input, other if i > 1 else None)
            if vector.dim() != 1 or vector.shape[0] != out:
                raise ValueError(
                    f"{name}.{_VECTORS[i - 1]}: expected shape ({out},), as the weight has {out} outputs, "
                    f"got {_shape(vector)}"
                )
    return out, kh, kw


def _output(
    input: Tensor,
    out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight: str,
) -> tuple[Any, Any]:
    """Checks the geometry; returns the output's height and width."""
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
                f"input: expected a {('height', 'width')[i]} of at least {reach - 2 * padding[i]}, for {weight} "
                f"reaches over {reach} with padding {padding[i]} and dilation {dilation[i]}, got {_shape(input)}"
            )
        size.append((padded - reach) // stride[i] + 1)
    height, width = size
    if height > LIMIT or width > LIMIT or input.shape[0] * out * height * width * input.element_size() > _MAX_BYTES:
        raise ValueError(
            f"padding: {tuple(padding)} makes an output of {out} x {height} x {width}, more than memory can hold"
        )
    return height, width


def _activation(activation: Any) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'relu' or 'relu6', got {activation!r}")


def conv_bn_act(input: Any, conv: Conv, eps: float, stride: Any, padding: Any, dilation: Any, activation: Any) -> None:
    """The arguments of a dense convolution."""
    image("input", input)
    out, kh, kw = _conv("conv", conv, input, input.shape[1], False)
    _output(input, out, (kh, kw), stride, padding, dilation, "conv.weight")
    _activation(activation)


def depthwise_conv_bn_act(
    input: Any, conv: Conv, eps: float, stride: Any, padding: Any, dilation: Any, activation: Any
) -> None:
    """The arguments of a depthwise convolution."""
    image("input", input)
    out, kh, kw = _conv("conv", conv, input, input.shape[1], True)
    _output(input, out, (kh, kw), stride, padding, dilation, "conv.weight")
    _activation(activation)


def pointwise_conv_bn_act(input: Any, conv: Conv, eps: float, activation: Any, residual: Any) -> None:
    """The arguments of a 1x1 convolution."""
    image("input", input)
    out = _pointwise("conv", conv, input, input.shape[1])
    if residual is not None:
        _same_kind("residual", residual, input)
        n, _, h, w = input.shape
        if residual.shape != (n, out, h, w):
            raise ValueError(f"residual: expected the output's shape {(n, out, h, w)}, got {_shape(residual)}")
    _empty_plane(input)
    _activation(activation)


def _pointwise(name: str, conv: Conv, input: Tensor, channels: int) -> int:
    out, kh, kw = _conv(name, conv, input, channels, False)
    if kh != 1 or kw != 1:
        raise ValueError(f"{name}.weight: expected a 1x1 kernel, got {_shape(conv[0])}")
    return out


def _empty_plane(input: Tensor) -> None:
    if is_compiling():
        return
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"input: expected a height and width of at least 1, got {_shape(input)}")


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
    wide = _pointwise("expand", expand, input, channels) if expand else channels
    _, kh, kw = _conv("depthwise", depthwise, input, wide, True)
    if kh != kw:
        raise ValueError(f"depthwise.weight: expected a square kernel, got {_shape(depthwise[0])}")
    out = _pointwise("project", project, input, wide)
    if len(eps) != 3:
        raise ValueError(f"eps: expected 3 values, got {len(eps)}")
    _empty_plane(input)
    size = _output(input, out, (kh, kw), (stride, stride), (padding, padding), (1, 1), "depthwise.weight")
    if residual and (out != channels or not (is_compiling() or size == (input.shape[2], input.shape[3]))):
        raise ValueError(
            f"residual: expected False where input and output differ, here ({channels}, {input.shape[2]}, "
            f"{input.shape[3]}) and ({out}, {size[0]}, {size[1]}), got {residual!r}"
        )
    _activation(activation)


def global_avg_pool(input: Any) -> None:
    """The argument of the global average pooling."""
    image("input", input)
    _empty_plane(input)


def linear(input: Any, weight: Any, bias: Any) -> None:
    """The arguments of the fully connected layer."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if input.dim() != 2:
        raise ValueError(f"input: expected 2 dimensions (N, features), got {input.dim()}: {_shape(input)}")
    if input.dtype not in _FLOATS:
        _dtype_error("input", input, "a floating point tensor")
    if input.layout is not torch.strided:
        raise TypeError(f"input: expected a dense tensor, got layout {input.layout}")
    _same_kind("weight", weight, input)
    if weight.dim() != 2 or weight.shape[1] != input.shape[1]:
        raise ValueError(f"weight: expected shape (out, {input.shape[1]}), as the input has, got {_shape(weight)}")
    if bias is not None:
        _same_kind("bias", bias, input)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {_shape(bias)}")


CHECKS: dict[str, Callable[..., None]] = {
    "conv_bn_act": conv_bn_act,
    "pointwise_conv_bn_act": pointwise_conv_bn_act,
    "depthwise_conv_bn_act": depthwise_conv_bn_act,
    "inverted_residual": inverted_residual,
    "global_avg_pool": global_avg_pool,
    "linear": linear,
}
"""The check of each op, by its name, on the arguments of its schema."""
