"""Chains of layers with gradients or batch statistics, as one op forward and one backward.

The forward half of a compiled tier keeps each convolution's output as it was before BatchNorm, and the BatchNorms'
constants; activated tensors inside the chain are never stored. The backward half reads those.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastblocks.backends import chain_functions, reference_training
from fastblocks.backends.layout import suggests_channels_last
from fastblocks.backends.program import Kind, Program, Tensors, output_is_saved
from fastblocks.functional.plain import forward_derivatives, gradient_batch, nothing_watches, readable


@lru_cache(maxsize=512)
def _compiled(functions: Any, program: Program) -> Any:
    """The program in a tier's form."""
    return functions.make_program(tuple(node.flat() for node in program))


def _spread(parts: Sequence[bool], found: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors again, with None where there was none."""
    rest = iter(found)
    return [next(rest) if there else None for there in parts]


class _Call:
    """One call of a chain, without the tensors that autograd saves."""

    __slots__ = ("affine", "functions", "program", "running", "weights")

    def __init__(self, functions: Any, program: Program, tensors: Tensors) -> None:
        self.functions = functions  # of the tier whose forward half runs: the tier may change before the backward half
        self.program = program
        self.weights = len(tensors.weights)
        self.affine = [t is not None for t in tensors.affine]
        self.running = tensors.running

    def tensors(self, found: Sequence[Tensor], momenta: Sequence[float]) -> Tensors:
        """The chain's tensors, of those that went through autograd."""
        return Tensors(found[: self.weights], _spread(self.affine, found[self.weights :]), self.running, momenta)


def _forward(functions: Any, program: Program, x: Tensor, tensors: Tensors) -> list[Tensor]:
    """A tier's forward half: output, constants, values."""
    running = tuple(tensors.running)
    results: list[Tensor] = functions.forward(
        _compiled(functions, program), x, tuple(tensors.weights), tuple(tensors.affine), running, tuple(tensors.momenta)
    )
    convs = (node for node in program if node.kind <= Kind.DENSE)
    written = [t for i, node in enumerate(convs) if node.update for t in running[2 * i : 2 * i + 2] if t is not None]
    if written:
        torch.autograd.graph.increment_version(written)
    return results


def _formatted(y: Tensor, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The output in the memory format that torch's convolutions would have given it."""
    if suggests_channels_last(x) or any(map(suggests_channels_last, weights)):
        return y
    return y.contiguous()


class _Chain(torch.autograd.Function):
    """A chain of layers. Its backward half is the tier's, or, for derivatives of derivatives, the reference's."""

    @staticmethod
    def forward(ctx: Any, call: _Call, momenta: Sequence[float], x: Tensor, *found: Tensor) -> Tensor:  # type: ignore[override]
        """Run the chain; its input, the convolutions' outputs and constants are kept."""
        tensors = call.tensors(found, momenta)
        y, *saved = _forward(call.functions, call.program, x, tensors)
        result = _formatted(y, x, tensors.weights)
        ctx.call, ctx.has_output = call, output_is_saved(call.program)
        if ctx.has_output:
            # the gradient of an output in another format is read in the chain's own
            saved.append(y if result is y else y.detach())
        ctx.save_for_backward(x, *found, *saved)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        call: _Call = ctx.call
        count = call.weights + sum(call.affine)
        x, *rest = ctx.saved_tensors
        found, saved = rest[:count], rest[count:]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or gradient_batch(grad) or not readable((grad,)):
            return (None, None, *_differentiated(call, x, found, needs, grad))
        output = saved.pop() if ctx.has_output else None
        wanted = [needs[0]]
        flags = iter(needs[1 + call.weights :])
        affine = [there and next(flags) for there in call.affine]
        for i in range(call.weights):
            wanted += [needs[1 + i], *affine[2 * i : 2 * i + 2]]
        tensors = call.tensors(found, ())
        weights, pairs = tuple(tensors.weights), tuple(tensors.affine)
        grads = call.functions.backward(
            _compiled(call.functions, call.program), grad, x, weights, pairs, (output, *saved), tuple(wanted)
        )
        pairs_of = [grads[1 + 3 * i + part] for i in range(call.weights) for part in (1, 2)]
        there = [g for g, is_tensor in zip(pairs_of, call.affine, strict=True) if is_tensor]
        return (None, None, grads[0], *grads[1::3], *there)


def _differentiated(call: _Call, x: Tensor, found: Sequence[Tensor], needs: Sequence[bool], grad: Tensor) -> list[Any]:
    """The gradients by torch, from the reference: with a graph of their own where one is wanted."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t.view_as(t) if need else t.detach() for t, need in zip((x, *found), needs, strict=True)]
        tensors = call.tensors(inputs[1:], (0.0,) * call.weights)
        y = reference_training.chain(call.program, inputs[0], tensors, update=False)
    wanted = [i for i, need in enumerate(needs) if need]
    found_grads = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=create)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(wanted, found_grads, strict=True):
        grads[i] = g
    return grads


def takes(x: Tensor, tensors: Tensors) -> bool:
    """Whether a compiled tier may run a chain on these tensors, here and now."""
    every = (x, *tensors.weights, *tensors.affine, *tensors.running)
    plain = nothing_watches() and not forward_derivatives() and readable(every)
    return plain and x.dim() == 4 and x.numel() > 0 and chain_functions() is not None


def chain(program: Program, x: Tensor, tensors: Tensors) -> Tensor:
    """Run a chain by the current tier, which `takes` these tensors.

    Args:
        program: the nodes; the last one stores its value.
        x: the input ``(N, C, H, W)``.
        tensors: of the convolutions, in their order.

    Returns:
        The value of the last node. Running statistics are updated where the program says so.
    """
    functions = chain_functions()
    found = [*tensors.weights, *(t for t in tensors.affine if t is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *found)):
        result: Tensor = _Chain.apply(_Call(functions, program, tensors), tensors.momenta, x, *found)
        return result
    return _formatted(_forward(functions, program, x, tensors)[0], x, tensors.weights)
