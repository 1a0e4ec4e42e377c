"""Which way a checked call takes: straight to a tier's function, or through torch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastblocks.backends import reference, state
from fastblocks.functional.registration import OPS

_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch = torch._C._functorch.maybe_current_level
_grad = torch.is_grad_enabled
_profiling = torch.autograd._profiler_enabled
_tracing = torch._C._get_tracing_state

Parameter = torch.nn.Parameter


def is_plain() -> bool:
    """Whether nothing watches or changes what torch calls do: no mode, transform, trace, autocast or profiler."""
    return not (
        _dispatch_modes()
        or _function_modes()
        or _profiling()
        or _autocast()
        or _tracing() is not None
        or _functorch() is not None
    )


def run(name: str, args: tuple[Any, ...], tensors: Iterable[Any]) -> Tensor:
    """Run an op on checked arguments; `tensors` are all tensors among them (or None)."""
    input: Tensor = args[0]
    table = state.native
    if table is None or input.dtype is not torch.float32 or not input.is_cpu:
        # plain torch calls trace, transform and differentiate by themselves
        return reference.TABLE[name](*args)
    if is_compiling():
        if torch.is_autocast_enabled("cpu"):
            return reference.TABLE[name](*args)
        return OPS[name](*args)
    if _functorch() is not None or _autocast():
        return reference.TABLE[name](*args)
    needs_grad = False
    for tensor in tensors:
        if tensor is not None:
            kind = type(tensor)
            if (kind is not Tensor and kind is not Parameter) or tensor.is_neg():
                return OPS[name](*args)
            needs_grad = needs_grad or tensor.requires_grad
    if (needs_grad and _grad()) or not is_plain():
        return OPS[name](*args)
    return table[name](*args)
