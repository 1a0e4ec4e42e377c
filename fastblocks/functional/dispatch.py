"""Which way a checked call takes: straight to a tier's function, or through torch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastblocks.backends import counts, reference, state
from fastblocks.functional.autograd import differentiable, trains_by_torch
from fastblocks.functional.plain import fallback_reason, nothing_watches, readable
from fastblocks.functional.recall import remember
from fastblocks.functional.registration import OPS

_grad = torch.is_grad_enabled


@overload
def run(  # type: ignore[overload-overlap]  # a name that mypy does not know is one of the others
    name: Literal["channel_shuffle_split", "cat_shuffle_split"],
    args: tuple[Any, ...],
    tensors: Iterable[Any],
    given: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]: ...


@overload
def run(name: str, args: tuple[Any, ...], tensors: Iterable[Any], given: tuple[Any, ...] = ()) -> Tensor: ...


def run(name: str, args: tuple[Any, ...], tensors: Iterable[Any], given: tuple[Any, ...] = ()) -> Any:
    """Run an op on checked arguments; `tensors` are all tensors among them (or None).

    `given` are the arguments as a user's function had them, if calls like this one shall be remembered.

    The dispatcher costs more than a small kernel, so it is left out where it would do nothing.
    """
    input: Tensor = args[0]
    table = state.compiled
    if is_compiling():
        takes = table is not None and input.dtype is torch.float32 and input.device.type == "cpu"
        return OPS[name](*args) if takes and not torch.is_autocast_enabled("cpu") else reference.TABLE[name](*args)
    reason = None if table is None else fallback_reason(input)
    if table is None or reason is not None:
        if reason is not None:
            counts.fell_back(name, reason)
        counts.called(name, "reference")
        # plain torch calls trace, transform and differentiate by themselves
        return reference.TABLE[name](*args)
    tensors = tuple(tensors)
    if not nothing_watches() or not readable(tensors):
        return OPS[name](*args)
    records = _grad() and any(t is not None and t.requires_grad for t in tensors)
    # the numba tier counts its own calls, those from call sites too
    if state.name == "native" and not (records and trains_by_torch(name, args)):
        counts.called(name, "native")
    if records:
        return differentiable(name, args)
    if given:
        remember(name, given, args)
    return table[name](*args)
