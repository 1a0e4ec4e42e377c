"""A place in a program from which one op is called again and again with the same tensors.

Checking the tensors of a block costs more than a small kernel. So a site checks them in full once, remembers what it
saw (type, dtype, device, layout, shape, strides, requires_grad, and whether torch calls are plain calls here: no
autocast, transform, mode or trace), and afterwards asks in one comparison whether all of it still holds. Where it does
not, everything is checked again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastblocks.backends import state
from fastblocks.functional import checks, dispatch

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_grad = torch.is_grad_enabled
_profiling = torch.autograd._profiler_enabled


def _guards() -> Any:
    """Dynamo's tensor guards, which make this comparison in C++. They are private to torch: try before use."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        a, b = torch.ones(1, 1, 2, 2), torch.ones(2)
        guard = TensorGuards(a, b, dynamic_dims_sizes=[[None] * 4, [2]], dynamic_dims_strides=[[None] * 4, [1]])
        good = [(a, b), (torch.ones(2, 3, 4, 5), b)]
        bad = [(a.double(), b), (a, torch.ones(3)), (a, b.double()), (torch.ones(1, 2, 2), b), (a, torch.ones(4)[::2])]
        if all(guard.check(*pair) for pair in good) and not any(guard.check(*pair) for pair in bad):
            return TensorGuards
    except (ImportError, AttributeError, TypeError, RuntimeError):
        pass
    return None


_TensorGuards = _guards()
_seen = operator.attrgetter("__class__", "dtype", "device", "layout", "requires_grad")


def _remember(input: Tensor, tensors: Sequence[Tensor]) -> Callable[..., bool]:
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

    def same(input: Tensor, *tensors: Tensor) -> bool:
        return (
            [_seen(t) for t in (input, *tensors)] == like
            and [(t.shape, t.stride()) for t in tensors] == shapes
            and input.dim() == rank
            and not input.is_neg()
            and dispatch.is_plain()
        )

    return same


class Site:
    """Calls of one op from one place.

    Args:
        name: the op.
        least: smallest height and width of an input that the op's kernel, padding and dilation allow.
    """

    __slots__ = ("_channels", "_height", "_name", "_needs_grad", "_same", "_width")

    def __init__(self, name: str, least: tuple[int, int] = (1, 1)) -> None:
        self._name = name
        self._height, self._width = least
        self._channels = -1
        self._same: Callable[..., bool] | None = None
        self._needs_grad = False

    def knows(self, input: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether the op may run straight away: these tensors are as good as those that were checked."""
        same = self._same
        if same is None or not same(input, *tensors) or _profiling() or _function_modes() or _dispatch_modes():
            return False
        if self._needs_grad and _grad():
            return False
        _, channels, height, width = input.shape
        return bool(channels == self._channels and height >= self._height and width >= self._width)

    def run(self, args: tuple[Any, ...]) -> Tensor:
        """The op, without any further check: only after `knows`."""
        return state.table[self._name](*args)

    def check_and_run(self, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> Tensor:
        """The op with all checks. Where they pass they are remembered for `knows`."""
        checks.CHECKS[self._name](*args)
        input = args[0]
        self._same = None
        everything = (input, *tensors)
        if (
            dispatch.is_plain()
            and all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in everything)
            and len({id(t) for t in everything}) == len(everything)
            and not any(t.is_neg() for t in everything)
        ):
            self._channels = input.shape[1]
            self._needs_grad = any(t.requires_grad for t in everything)
            self._same = _remember(input, tensors)
        return dispatch.run(self._name, args, everything)
