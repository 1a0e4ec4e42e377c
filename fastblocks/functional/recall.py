"""Calls of the ops as functions that look like one before, and need no second check.

The checks of an op depend on its arguments' types, sizes, strides and numbers alone. So a call of the native tier that
passed them is remembered by these, in the extension (``csrc/recall.cpp``), and the next one that looks the same goes
straight to the kernels; torch's guards see to what is not in an argument (transforms, autocast, a trace, gradients).
Nothing is kept alive by it. Without the extension nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastblocks.backends import counts, make_recall, state
from fastblocks.functional.guards import remember_tensors
from fastblocks.functional.plain import NO_FORWARD_DERIVATIVES, autocast, dispatch_modes, function_modes, profiling
from fastblocks.functional.record import ConvBN

__all__ = ["recall", "remember"]


_recall: Callable[..., Any] | None = None
_remember: Callable[..., None] | None = None

if make_recall is not None:
    _recall, _remember = make_recall(
        (
            state.table,
            ConvBN,
            torch.is_grad_enabled,
            (Tensor, torch.nn.Parameter),
            (profiling, function_modes, dispatch_modes, autocast),
            (NO_FORWARD_DERIVATIVES,),
        )
    )


def recall(name: str, *given: Any) -> Any:
    """Run an op on what a user gave, if a call like this one was remembered; None if not."""
    if _recall is None or is_compiling():
        return None
    result = _recall(name, *given)
    if result is not None:
        counts.called(name, "native")
    return result


def remember(name: str, given: tuple[Any, ...], args: tuple[Any, ...]) -> None:
    """Remember a call of the native tier that passed all checks and recorded no gradients.

    Args:
        name: the op.
        given: what `recall` gets behind the name.
        args: what the op got.
    """
    if _remember is not None and state.name == "native":
        _remember(name, given, args, remember_tensors)
