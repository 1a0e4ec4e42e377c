"""The native tier: float32 tensors on the CPU, through the compiled kernels.

Arguments were checked in ``fastblocks.functional``. Here the tensors are brought into the layout that the kernels read
(NHWC with a pixel stride; a channels_last tensor and its channel slices are that already), the packed weights are
looked up, and the output is given the memory format that torch's own convolution would have given it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastblocks import _C
from fastblocks.backends import packs
from fastblocks.backends.layout import suggests_channels_last

_from_dlpack = torch._C._from_dlpack
_ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}

Conv = Sequence[Any]


def _borrow_thread_pool() -> str | None:
    """Hand torch's own pool to the extension; returns why not, where torch has not got the symbols (before 2.10)."""
    try:
        # Looked up among what the process has loaded, so that no second copy of a library is opened.
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        functions = (library.torch_parallel_for, library.torch_get_num_threads)
    except (OSError, AttributeError) as error:
        return f"native kernels run on one thread: torch {torch.__version__} has no thread pool to borrow ({error})"
    _C.set_thread_pool(*(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions))
    return None


_pool_reason = _borrow_thread_pool()
os.register_at_fork(after_in_child=_C.forget_thread_pool_after_fork)


def _choose_level() -> str | None:
    """FASTBLOCKS_ISA names the instruction set level; returns a complaint where this CPU cannot run it."""
    wanted = os.environ.get("FASTBLOCKS_ISA", "").strip()
    if not wanted or _C.use_level(wanted):
        return None
    return f"FASTBLOCKS_ISA={wanted}: expected one of {', '.join(_C.level_names())} on this CPU"


_level_reason = _choose_level()


def available() -> bool:
    """Whether the kernels can run here."""
    return True


def isa_levels() -> list[str]:
    """The instruction set levels that this build and this CPU have, least first."""
    return list(_C.level_names())


def current_isa() -> str:
    """The level in use."""
    return ("baseline", "x86_64_v3", "x86_64_v4")[_C.current_level()]


@contextlib.contextmanager
def use_isa(level: str) -> Iterator[None]:
    """Run another instruction set level inside a ``with`` block (the whole process; for tests and benchmarks)."""
    former = current_isa()
    if not _C.use_level(level):
        raise ValueError(f"level: expected one of {', '.join(isa_levels())}, got {level!r}")
    try:
        yield
    finally:
        _C.use_level(former)


def info() -> dict[str, Any]:
    """What `fastblocks.backend_info` says of this tier."""
    return {
        "isa": current_isa(),
        "levels": isa_levels(),
        "threads": _C.worker_count(),
        "pool": "torch" if _C.has_thread_pool() else "none",
        "reason": _level_reason or _pool_reason,
    }


def _pixel_stride(x: Tensor) -> int:
    """The distance of neighbouring pixels where all pixels of all images are evenly spaced, channels dense; else 0."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if sc == 1 and sw >= c and sh == w * sw and sn == h * sh:
        return sw
    # Strides of dimensions of one element say nothing.
    if c > 1 and sc != 1:
        return 0
    stride = sw if w > 1 else sh if h > 1 else sn if n > 1 else c
    if stride < c or (h > 1 and sh != w * stride) or (n > 1 and sn != h * w * stride):
        return 0
    return stride


def _even(x: Tensor) -> tuple[Tensor, int]:
    """The tensor, or a channels_last copy of it, with its pixel stride."""
    stride = _pixel_stride(x)
    if stride:
        return x, stride
    x = x.contiguous(memory_format=torch.channels_last)
    return x, _pixel_stride(x) or x.shape[1]


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Image, row and pixel stride of a tensor whose channels are dense; the pixel stride is 0 where they are not."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if c > 1 and sc != 1:
        return 0, 0, 0
    pixel = sw if w > 1 else c
    row = sh if h > 1 else w * pixel
    return (sn if n > 1 else h * row), row, pixel


def _in_format(out: Tensor, input: Tensor, *weights: Tensor) -> Tensor:
    """Give the output the memory format of torch's convolution: channels_last if the input or a weight is."""
    _, c, h, w = input.shape
    if c > 1 and w > 1 and h > 1 and input.stride() == (h * w * c, 1, w * c, c):
        return out
    if suggests_channels_last(input) or any(suggests_channels_last(weight) for weight in weights):
        return out
    return out.contiguous()


def pointwise_conv_bn_act(
    input: Tensor, conv: Conv, eps: float, activation: str | None, residual: Tensor | None
) -> Tensor:
    weight = conv[0]
    x, stride = _even(input)
    n, c, h, w = x.shape
    other, other_stride = (None, 0) if residual is None else _even(residual)
    out = _C.pointwise(
        x.data_ptr(),
        n,
        c,
        h,
        w,
        stride,
        packs.get(weight, "conv"),
        conv,
        eps,
        _ACTIVATIONS[activation],
        0 if other is None else other.data_ptr(),
        other_stride,
    )
    return _in_format(_from_dlpack(out), input, weight)


def depthwise_conv_bn_act(
    input: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    weight = conv[0]
    x = input
    image, row, pixel = _strides(x)
    if pixel < x.shape[1]:
        x = x.contiguous(memory_format=torch.channels_last)
        image, row, pixel = _strides(x)
    out = _C.depthwise(
        x.data_ptr(),
        *x.shape,
        image,
        row,
        pixel,
        packs.get(weight, "depthwise"),
        conv,
        eps,
        _ACTIVATIONS[activation],
        _C.Geometry(*stride, *padding, *dilation),
    )
    return _in_format(_from_dlpack(out), input, weight)


def conv_bn_act(
    input: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    weight = conv[0]
    x = input
    image, row, pixel = _strides(x)
    planar = False
    if pixel < x.shape[1]:
        # Rows of an NCHW image are read as they are; the plane stride takes the pixel stride's place.
        if x.shape[3] > 1 and x.stride(3) != 1:
            x = x.contiguous()
        image, pixel, row = x.stride()[:3]
        planar = True
    out = _C.conv(
        x.data_ptr(),
        *x.shape,
        image,
        row,
        pixel,
        planar,
        packs.get(weight, "conv_planar" if planar else "conv"),
        conv,
        eps,
        _ACTIVATIONS[activation],
        _C.Geometry(*stride, *padding, *dilation),
    )
    return _in_format(_from_dlpack(out), input, weight)


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
    x, pixel = _even(input)
    n, c, h, w = x.shape
    out = _C.inverted_residual(
        x.data_ptr(),
        n,
        c,
        h,
        w,
        h * w * pixel,
        pixel,
        packs.get(expand[0], "conv") if expand else None,
        expand,
        eps[0],
        packs.get(depthwise[0], "depthwise"),
        depthwise,
        eps[1],
        packs.get(project[0], "conv"),
        project,
        eps[2],
        stride,
        padding,
        _ACTIVATIONS[activation],
        residual,
    )
    return _in_format(_from_dlpack(out), input, *(conv[0] for conv in (expand, depthwise, project) if conv))


def global_avg_pool(input: Tensor) -> Tensor:
    x, pixel = _even(input)
    n, c, h, w = x.shape
    out = _from_dlpack(_C.global_avg_pool(x.data_ptr(), n, c, h * w, h * w * pixel, pixel))
    return _in_format(out, input)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = input if input.stride(1) == 1 and input.stride(0) >= input.shape[1] else input.contiguous()
    rows, c = x.shape
    stride = x.stride(0) if rows > 1 else c
    return _from_dlpack(_C.linear(x.data_ptr(), rows, c, stride, packs.get(weight, "linear"), bias))


TABLE: dict[str, Callable[..., Tensor]] = {
    "conv_bn_act": conv_bn_act,
    "pointwise_conv_bn_act": pointwise_conv_bn_act,
    "depthwise_conv_bn_act": depthwise_conv_bn_act,
    "inverted_residual": inverted_residual,
    "global_avg_pool": global_avg_pool,
    "linear": linear,
}
