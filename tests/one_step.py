"""One training step of a layer, beside the same step of its leaves in plain torch, in float32 and in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from conftest import children, significant_strides
from torch import Tensor, nn
from units import one_by_one

import fastblocks
from fastblocks import InvertedResidual, ShuffleUnit, ShuffleUnitV2


def leaves(layer: Any, x: Tensor) -> Tensor:
    """The output of a layer, or of a `Sequential` of them, by nothing but the modules of torch in it."""
    if type(layer) is fastblocks.Sequential:
        for child in layer:
            x = leaves(child, x)
        return x
    return children(layer, x) if isinstance(layer, InvertedResidual) else one_by_one(layer, x)


def chains(y: Tensor) -> int:
    """How many chains made a tensor."""
    seen: set[Any] = set()
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return sum("_Chain" in node.name() for node in seen)


class Step(NamedTuple):
    """What is left of a step."""

    y: Tensor
    grads: dict[str, Tensor | None]
    statistics: dict[str, Tensor]


def lively(layer: Any) -> Any:
    """In training mode, with BatchNorms that do not start at one and zero."""
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.3, 0.3)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean, 0.0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return layer.train()


def step(layer: Any, run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor | None = None) -> Step:
    """Forward and backward; without a gradient that of the sum, whose strides are 0."""
    layer.zero_grad()
    image = x.detach()
    if image.is_floating_point():
        image.requires_grad_()
    y = run(image)
    if grad is None:
        y.sum().backward()
    else:
        y.backward(grad)
    grads = {"input": image.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return Step(y, grads, dict(layer.named_buffers()))


def error(found: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """The norm of what is wrong, as a part of the truth's norm, or of `scale` where the truth is as good as zero."""
    size = truth.norm().item()
    size = scale if size < 1e-9 * scale else size
    wrong = (found.double() - truth).norm().item()
    return wrong if size == 0 else wrong / size


def check_same(found: Step, plains: list[Step], truth: Step, note: object = "", least: float = 1e-5) -> None:
    """`found` is as near to the truth as torch's float32 is: within `least`, or three times torch's largest error."""
    assert found.y.shape == truth.y.shape and found.y.dtype is torch.float32, note
    values = [{"output": s.y, **s.grads} for s in (found, *plains)]
    assert found.grads.keys() == truth.grads.keys() and found.statistics.keys() == truth.statistics.keys()
    scale = max((t.norm().item() for t in truth.grads.values() if t is not None), default=0.0)
    for name, true in {"output": truth.y, **truth.grads}.items():
        ours, *torchs = (v[name] for v in values)
        assert (ours is None) == (true is None), f"{note}: {name}"
        if true is not None:
            assert ours.shape == true.shape, f"{note}: {name}"
            assert ours.isfinite().all(), f"{note}: {name}"
            wrong, allowed = error(ours, true, scale), max(least, *(3 * error(t, true, scale) for t in torchs))
            # a gradient that nearly cancels out has the roundings of what cancelled
            allowed += 3e-6 * scale / true.norm().item() if true.norm().item() > 1e-9 * scale > 0 else 0.0
            assert wrong <= allowed, f"{note}: {name} has an error of {wrong:.3g}, allowed {allowed:.3g}"
    for name, true in truth.statistics.items():
        ours = found.statistics[name]
        if true.dtype is torch.long:
            assert ours.dtype is torch.long and torch.equal(ours, true), f"{note}: {name}"
        else:
            wrong, allowed = (
                error(ours, true, 1.0),
                max(1e-6, *(3 * error(p.statistics[name], true, 1.0) for p in plains)),
            )
            assert wrong <= allowed, f"{note}: {name} has an error of {wrong:.3g}, allowed {allowed:.3g}"


def _almost(layer: Any, x: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The layer and its input, the last time not quite equal."""
    yield copy.deepcopy(layer), x
    yield copy.deepcopy(layer), x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1 + 2**-23 * torch.randn_like(p))
    yield layer, x * (1 + 2**-23 * torch.randn_like(x))


def check_step(
    layer: Any,
    x: Tensor,
    grad: Callable[[Tensor], Tensor] | None = torch.randn_like,
    *,
    note: object = "",
    least: float = 1e-5,
    formats: bool = True,
) -> Step:
    """A step of a layer against its leaves in float64. `grad` makes the gradient from the output; None is the sum's.
    With `formats`, the output's memory format is the leaves' too, which a shuffle in plain torch does not keep.

    How large torch's own error is, is seen in runs in both memory formats and with inputs and weights that are wrong in
    their last bits. One run alone may be right by chance where a gradient is a single value.
    """
    plain, truth = copy.deepcopy(layer), copy.deepcopy(layer).double()
    with torch.no_grad():
        like = leaves(copy.deepcopy(layer), x)
    g = None if grad is None else grad(like)
    torchs = [step(p, partial(leaves, p), image, g) for p, image in _almost(plain, x)]
    true = step(truth, partial(leaves, truth), x.double(), None if g is None else g.double())
    found = step(layer, layer, x, g)
    shuffles = any(isinstance(module, (ShuffleUnit, ShuffleUnitV2)) for module in layer.modules())
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    if formats and dense and not shuffles:
        assert significant_strides(found.y) == significant_strides(like), (note, found.y.stride(), like.stride())
    check_same(found, torchs, true, note, least)
    return found


def count_chains(found: Step | Tensor) -> int | None:
    """How many chains made an output; None where the current tier has none."""
    y = found if isinstance(found, Tensor) else found.y
    return None if fastblocks.current_backend() == "reference" else chains(y)
