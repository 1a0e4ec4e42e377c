"""What lies between a torch tensor and a kernel that reads an address: laziness, gaps, watchers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

autocast = torch._C._is_any_autocast_enabled
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
functorch_level = torch._C._functorch.maybe_current_level
gradient_batch = torch._C._functorch.is_legacy_batchedtensor
profiling = torch.autograd._profiler_enabled
tracing_state = torch._C._get_tracing_state

_KINDS = (Tensor, torch.nn.Parameter)


NO_FORWARD_DERIVATIVES: tuple[dict[str, Any], str, int] = (vars(forward_ad), "_current_level", -1)
"""Where torch says whether torch.autograd.forward_ad is at work: a dictionary, a key, and the value while it is not."""


def forward_derivatives() -> bool:
    """Whether torch.autograd.forward_ad is at work."""
    return forward_ad._current_level >= 0


def fallback_reason(input: Tensor) -> str | None:
    """Why no tier but the reference takes a call, or None."""
    if input.dtype is not torch.float32:
        return f"the input's dtype is {input.dtype}, not torch.float32"
    if not input.is_cpu:
        return f"the input is on {input.device}, not on the CPU"
    if functorch_level() is not None:
        return "a torch.func transform is active"
    if autocast():
        return "autocast is on"
    return "forward-mode derivatives are computed" if forward_derivatives() else None


def nothing_watches() -> bool:
    """Whether torch calls are plain calls here: no mode, transform, trace, autocast or profiler."""
    return not (
        dispatch_modes()
        or function_modes()
        or profiling()
        or autocast()
        or tracing_state() is not None
        or functorch_level() is not None
    )


def readable(tensors: Iterable[Any]) -> bool:
    """Whether a kernel may read all of these (or None) by their addresses.

    Subclasses may be anything. A tensor with the negative bit says that its values are those in memory times -1. And
    the kernels read vectors without gaps.
    """
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _KINDS or tensor.is_neg() or (tensor.dim() == 1 and tensor.stride(0) != 1)
        ):
            return False
    return True


def _dense(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.resolve_neg()
    return tensor.contiguous() if tensor.dim() == 1 and tensor.stride(0) != 1 else tensor


def dense(args: Iterable[Any]) -> tuple[Any, ...]:
    """The arguments of an op, copied where they are not `readable`."""
    return tuple(tuple(map(_dense, arg)) if isinstance(arg, (tuple, list)) else _dense(arg) for arg in args)
