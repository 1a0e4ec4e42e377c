"""Derivatives of the ops, one autograd.Function for all of them.

The forward half runs the op; the backward half runs the reference once more, this time with its graph, and lets torch
differentiate that. So only the inputs are saved, and derivatives of derivatives are torch's own.

``torch.library.register_autograd`` would do the same for plain arguments, but it loses the gradients of a ``Tensor?[]``
that has a None in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastblocks.backends import reference


class _Call:
    """One call of one op: its arguments taken apart into tensors and the rest."""

    __slots__ = ("below", "leaves", "name", "spec", "where")

    def __init__(self, name: str, args: tuple[Any, ...], below: Callable[..., Tensor]) -> None:
        self.name = name
        self.below = below
        self.leaves, self.spec = pytree.tree_flatten(args)
        self.where = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def take_tensors(self) -> list[Tensor]:
        """The tensors; the call keeps none of them, that is for ``save_for_backward``."""
        tensors = [self.leaves[i] for i in self.where]
        for i in self.where:
            self.leaves[i] = None
        return tensors

    def args(self, tensors: Any) -> tuple[Any, ...]:
        """The arguments again, with these tensors in place."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.where, tensors, strict=True):
            leaves[i] = tensor
        args: tuple[Any, ...] = pytree.tree_unflatten(leaves, self.spec)
        return args


class Op(torch.autograd.Function):
    """An op whose derivative is that of the reference."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        return call.below(*call.args(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # a view for each: one tensor may come in as several arguments, and each has a gradient of its own
            tensors = [
                t.view_as(t) if need else t.detach() for t, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
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


def kernel(name: str) -> Callable[..., Tensor]:
    """The op's kernel for torch's Autograd keys: it records the call, then goes on to the keys below."""

    def run(keyset: Any, *args: Any) -> Tensor:
        op = getattr(torch.ops.fastblocks, name).default

        def below(*args: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                result: Tensor = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
                return result

        if torch.is_grad_enabled():
            call = _Call(name, tuple(list(a) if isinstance(a, (list, tuple)) else a for a in args), below)
            tensors = call.take_tensors()
            if any(t.requires_grad for t in tensors):
                result: Tensor = Op.apply(call, *tensors)
                return result
        return below(*args)

    run.__name__ = run.__qualname__ = name
    return run
