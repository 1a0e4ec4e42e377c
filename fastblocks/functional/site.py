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
from fastblocks.functional.autograd import differentiable
from fastblocks.functional.plain import dispatch_modes, function_modes, nothing_watches, profiling, readable

_grad = torch.is_grad_enabled


def _guards() -> Any:
    """Dynamo's tensor guards, which make this comparison in C++. They are private to torch: try before use."""
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


def _never(*tensors: Any) -> bool:
    return False


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

    def same(input: Any, *tensors: Any) -> bool:
        return (
            all(isinstance(t, Tensor) for t in (input, *tensors))
            and [_seen(t) for t in (input, *tensors)] == like
            and [(t.shape, t.stride()) for t in tensors] == shapes
            and input.dim() == rank
            and not input.is_neg()
            and nothing_watches()
        )

    return same


class Site:
    """Calls of one op from one place.

    Args:
        name: the op.
        least: smallest height and width of an input that kernel, padding and dilation allow; None where the input has
            neither.
        channels: channels that an input must have; None for any, -1 for those of the first.
    """

    __slots__ = ("_channels", "_known", "_least", "_name")

    def __init__(self, name: str, least: tuple[int, int] | None = (1, 1), channels: int | None = -1) -> None:
        self._name = name
        self._least = least
        self._channels = channels
        # in one attribute, for threads: is it still so, the input's channels, does any tensor require a gradient
        self._known: tuple[Callable[..., bool], int | None, bool] = (_never, channels, False)

    def call(self, args: Sequence[Any], tensors: Sequence[Any]) -> Tensor | None:
        """The op, if its arguments are known to be good; else None.

        `tensors` are all tensors among the arguments, the input first. The other arguments must be those of
        `check_and_call`.
        """
        same, channels, needs_grad = self._known
        if not same(*tensors) or profiling() or function_modes() or dispatch_modes():
            return None
        shape = tensors[0].shape
        if shape[1] != channels and channels is not None:
            return None
        least = self._least
        if least is not None and (shape[2] < least[0] or shape[3] < least[1]):
            return None
        if needs_grad and _grad():
            return differentiable(self._name, args)
        return state.table[self._name](*args)

    def check_and_call(self, args: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
        """The op, with all checks. Where they pass they are remembered for `call`."""
        checks.CHECKS[self._name](*args)
        input, *others = tensors
        if nothing_watches() and readable(tensors) and len({id(t) for t in tensors}) == len(tensors):
            channels = None if self._channels is None else input.shape[1]
            self._known = (_remember(input, others), channels, any(t.requires_grad for t in tensors))
        return dispatch.run(self._name, tuple(args), tensors)
