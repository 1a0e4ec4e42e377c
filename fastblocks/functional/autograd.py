"""Derivatives of the ops: one autograd.Function for all that compute, one for all that only move channels.

The forward half runs the op; the backward half runs the reference once more, this time with its graph, and lets torch
differentiate that. So only the inputs are saved, and derivatives of derivatives are torch's own. A shuffle of channels
saves nothing: its derivative is the inverse shuffle.

``torch.library.register_autograd`` would do the same for plain arguments, but it loses the gradients of a ``Tensor?[]``
that has a None in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastblocks.backends import counts, reference, state
from fastblocks.functional.plain import gradient_batch


class _Call:
    """One call of one op: its arguments with the tensors taken out, which are for ``save_for_backward`` alone."""

    __slots__ = ("below", "name", "parts")

    def __init__(self, name: str, args: Sequence[Any], below: Callable[..., Any], tensors: list[Any]) -> None:
        self.name = name
        self.below = below
        # a tensor is True, a record a tuple of which entries are tensors, anything else itself in a list
        parts: list[Any] = []
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
                parts.append(True)
            elif isinstance(arg, (tuple, list)) and len(arg) == 6:
                tensors += [t for t in arg if t is not None]
                parts.append(tuple([t is not None for t in arg]))
            else:
                parts.append([arg])
        self.parts = parts

    def args(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The arguments again, with these tensors in place."""
        rest = iter(tensors)
        args: list[Any] = []
        for part in self.parts:
            if part is True:
                args.append(next(rest))
            elif type(part) is tuple:
                args.append([next(rest) if is_tensor else None for is_tensor in part])
            else:
                args.append(part[0])
        return args


class Op(torch.autograd.Function):
    """An op whose derivative is that of the reference.

    Not in torch's newer form with a setup_context of its own: that serves torch.func, whose transforms go to the
    reference before they come here, and costs 50 us a call.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Any:  # type: ignore[override]
        """Run the op; only its inputs are kept."""
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return call.below(*call.args(tensors))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # a view for each: one tensor may come in as several arguments, and each has a gradient of its own
            tensors = [t.view_as(t) if need else t.detach() for t, need in zip(ctx.saved_tensors, needs, strict=True)]
            output = reference.TABLE[ctx.call.name](*ctx.call.args(tensors))
        grads: list[Tensor | None] = [None] * len(tensors)
        wanted = [i for i, need in enumerate(needs) if need]
        # torch has no derivative for running statistics: unused
        found = torch.autograd.grad(
            output, [tensors[i] for i in wanted], grad, create_graph=torch.is_grad_enabled(), allow_unused=True
        )
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return (None, *grads)


SHUFFLES = ("channel_shuffle", "channel_shuffle_split", "cat_shuffle_split")
"""The ops that only move channels; their arguments are tensors and then the groups."""


class Shuffle(torch.autograd.Function):
    """A shuffle of the channels of all inputs together, with any number of outputs.

    With ``C`` channels in ``g`` groups its inverse is the shuffle with ``C / g`` groups.
    """

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], groups: int, *tensors: Tensor) -> Any:  # type: ignore[override]
        """Run the op; only numbers of channels are kept."""
        ctx.channels = [t.shape[1] for t in tensors]
        ctx.groups = groups
        return below(*tensors, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        from fastblocks.functional.dispatch import run  # which imports this module

        grad = grads[0] if len(grads) == 1 else torch.cat(grads, 1)
        args = (grad, sum(ctx.channels) // ctx.groups)
        # torch.autograd.grad(is_grads_batched=True) hands in a tensor that has no memory for kernels to read
        grad = reference.channel_shuffle(*args) if gradient_batch(grad) else run("channel_shuffle", args, (grad,))
        return (None, None, *grad.split(ctx.channels, 1))


def trains_by_torch(name: str, args: Sequence[Any]) -> bool:
    """Whether a call with gradients is left to torch: packing a weight at every step takes five times its product."""
    return name == "linear" and bool(args[1].requires_grad)


def differentiable(name: str, args: Sequence[Any]) -> Any:
    """The current tier's function on checked arguments, recorded for backward; without torch's dispatcher."""
    function = state.table[name]
    if state.compiled is None:
        return function(*args)
    if trains_by_torch(name, args):
        counts.called(name, "reference")
        return reference.linear(*args)
    if name in SHUFFLES:
        return Shuffle.apply(function, args[-1], *args[:-1])
    tensors: list[Any] = []
    call = _Call(name, args, function, tensors)
    return Op.apply(call, *tensors)


def kernel(name: str) -> Callable[..., Any]:
    """The op's kernel for torch's Autograd keys: it records the call, then goes on to the keys below."""

    def run(keyset: Any, *args: Any) -> Any:
        op = getattr(torch.ops.fastblocks, name).default

        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        if torch.is_grad_enabled():
            tensors: list[Any] = []
            call = _Call(name, args, below, tensors)
            if any(t.requires_grad for t in tensors):
                return Shuffle.apply(below, args[-1], *tensors) if name in SHUFFLES else Op.apply(call, *tensors)
        return below(*args)

    run.__name__ = run.__qualname__ = name
    return run
