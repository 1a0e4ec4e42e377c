"""A place in a program from which one op is called again and again with the same tensors.

Checking the modules and tensors of a block costs more than a small kernel. So they are checked in full once; what was
seen of them then (of the tensors: type, dtype, device, layout, shape, strides, requires_grad; of torch: no autocast,
transform, mode or trace) is described to the extension, which afterwards compares all of it in one pass. Where it does
not hold, the site returns None and everything is checked again. Without the extension, Python compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastblocks.backends import make_chain, make_site, state
from fastblocks.functional import checks, dispatch, python_site
from fastblocks.functional.autograd import differentiable
from fastblocks.functional.guards import remember_tensors
from fastblocks.functional.plain import (
    NO_FORWARD_DERIVATIVES,
    dispatch_modes,
    function_modes,
    nothing_watches,
    profiling,
    readable,
)

Site = Callable[[Any], Tensor | None]
"""The op on an input, or None where something is not as it was when the site was made."""

Place = tuple[dict[str, Any], str]
"""Where a tensor (or None) stands: a dictionary, such as a module's ``_parameters``, and a key."""


class Modules(NamedTuple):
    """What a site remembers of the modules that it takes its tensors from."""

    tables: Sequence[dict[str, Any]] = ()
    """``_modules`` of the layer and its containers: the same children, of the same types, must stand in them."""
    states: Sequence[dict[str, Any]] = ()
    """``__dict__`` of the children, whose number of entries must stay: a patched ``forward`` is one more."""
    hooks: tuple[Sequence[dict[int, Any]], Sequence[dict[int, Any]]] = ((), ())
    """The dictionaries in which hooks would appear: of forward, and of backward."""
    settings: Sequence[tuple[dict[str, Any], str, Any]] = ()
    """Dictionary, key and the value that must stand there."""


def value(constant: Any) -> tuple[str, Any]:
    """An argument of the op that stays."""
    return "value", constant


def tensor(place: Place) -> tuple[str, Any]:
    """An argument that is a tensor."""
    return "tensor", place


def record(places: Sequence[Place]) -> tuple[str, Any]:
    """An argument that is a convolution with its BatchNorm: six tensors."""
    return "record", places


def make(
    name: str,
    input: Tensor,
    arguments: Sequence[tuple[str, Any]],
    modules: Modules,
    *,
    least: tuple[int, int] | None = (1, 1),
    any_channels: bool = False,
    differentiates: bool = True,
) -> Site | None:
    """Remember a call that was just checked; None where it cannot be remembered.

    Args:
        name: the op.
        input: its first argument.
        arguments: the others, each a `value`, a `tensor` or a `record`.
        modules: what the tensors' modules look like.
        least: smallest height and width of an input that kernel, padding and dilation allow; None where the input has
            neither.
        any_channels: whether inputs may have another number of channels than this one.
        differentiates: whether calls with gradients go this way too; else they are no calls of this site.
    """
    places: list[Place] = []
    for kind, what in arguments:
        places += what if kind == "record" else [what] if kind == "tensor" else []
    tensors = [t for t in (table[key] for table, key in places) if t is not None]
    every = [input, *tensors]
    if not nothing_watches() or not readable(every) or len({id(t) for t in every}) < len(every):
        return None
    description = (
        state.table,
        name,
        arguments,
        remember_tensors(input, *tensors),
        remember_tensors(input),
        (profiling, function_modes, dispatch_modes),
        torch.is_grad_enabled,
        differentiable if differentiates else None,
        any(t.requires_grad for t in every),
        -1 if any_channels else input.shape[1],
        *((-1, -1) if least is None else least),
        modules.tables,
        modules.states,
        *modules.hooks,
        (*modules.settings, NO_FORWARD_DERIVATIVES),
    )
    site: Site = (make_site or python_site.make_site)(description)
    return site


def chain(layers: Sequence[dict[str, Any]], modules: Modules) -> Site | None:
    """Layers that run one after the other, as one site; None where it cannot be.

    Args:
        layers: the ``__dict__`` of each layer, where its own site is the entry ``_site``.
        modules: what the layers and the container look like.
    """
    if (
        make_chain is None
        or state.name != "native"
        or not layers
        or any(layer.get("_site") is None for layer in layers)
    ):
        return None
    joined: Site = make_chain((modules.tables, modules.states, *modules.hooks, modules.settings, layers))
    return joined


def check_and_call(name: str, args: Sequence[Any], tensors: Sequence[Any]) -> Tensor:
    """The op, with all checks. `tensors` are all tensors among its arguments, the input first."""
    checks.CHECKS[name](*args)
    return dispatch.run(name, tuple(args), tensors)
