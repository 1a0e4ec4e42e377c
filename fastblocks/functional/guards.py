"""What tensors looked like, and whether they still do: Dynamo's guards, which compare in C++, or Python."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastblocks.functional.plain import nothing_watches


def _guards() -> Any:
    """Dynamo's tensor guards, which compare tensors in C++. They are private to torch: try before use."""
    try:
        from torch._C._dynamo import guards

        make: Any = guards.TensorGuards

        a, b = torch.ones(1, 1, 2, 2), torch.ones(2)
        guard = make(a, b, dynamic_dims_sizes=[[None] * 4, [2]], dynamic_dims_strides=[[None] * 4, [1]])
        good = [(a, b), (torch.ones(2, 3, 4, 5), b)]
        bad = [(a.double(), b), (a, torch.ones(3)), (a, b.double()), (torch.ones(1, 2, 2), b), (a, torch.ones(4)[::2])]
        if all(guard.check(*pair) for pair in good) and not any(guard.check(*pair) for pair in bad):
            return make
    except (ImportError, AttributeError, TypeError, RuntimeError):
        pass
    return None


_TensorGuards = _guards()
_seen = operator.attrgetter("__class__", "dtype", "device", "layout", "requires_grad")


def remember_tensors(input: Tensor, *tensors: Tensor) -> Callable[..., bool]:
    """A function that says whether an input and tensors are like these, sizes and strides of the input aside."""
    if _TensorGuards is not None:
        check: Callable[..., bool] = _TensorGuards(
            input,
            *tensors,
            dynamic_dims_sizes=[[None] * input.dim(), *(list(t.shape) for t in tensors)],
            dynamic_dims_strides=[[None] * input.dim(), *(list(t.stride()) for t in tensors)],
        ).check
        return check
    like = [_seen(t) for t in (input, *tensors)]
    shapes = [(t.shape, t.stride()) for t in tensors]
    rank = input.dim()

    def same(input: Any, *tensors: Any) -> bool:
        return (
            all(isinstance(t, Tensor) for t in (input, *tensors))
            and [_seen(t) for t in (input, *tensors)] == like
            and [(t.shape, t.stride()) for t in tensors] == shapes
            and input.dim() == rank
            and not any(t.is_neg() for t in (input, *tensors))
            and nothing_watches()
        )

    return same
