"""A network's chains in training, run again as they were.

Looking at every child of a network and describing its chains takes Python some milliseconds a step, while one thread
works. So what one step found is kept, with all that it was found from, and the next one compares: the same children, no
hooks, the same settings (in the extension), tensors of the same kind (by torch's guard). Where anything differs, the
layers are looked at as they were the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastblocks.backends import chain_functions, make_check
from fastblocks.backends.program import Program, Tensors
from fastblocks.functional import training
from fastblocks.functional.guards import remember_tensors
from fastblocks.functional.plain import NO_FORWARD_DERIVATIVES, nothing_watches, readable
from fastblocks.functional.site import Modules, Place
from fastblocks.layers.fuse import Unit, hooks_of, modules_of
from fastblocks.layers.train import Made, count_batches, counters_of

MARK = "_again"
"""The entry of a layer's ``__dict__`` that goes when an attribute of the layer is set to another value."""

_STATISTICS = ("momentum", "track_running_stats")


class _Known(NamedTuple):
    """A chain, and where its tensors stand: weights, BatchNorms' weights and biases, statistics."""

    program: Program
    convs: int
    places: list[Place]
    momenta: Sequence[float]
    counters: list[Place]

    def tensors(self) -> list[Tensor | None]:
        """The tensors that stand there now."""
        return [table[key] for table, key in self.places]

    def run(self, x: Tensor, found: Sequence[Any]) -> Tensor:
        """The chain on an input."""
        n = self.convs
        result = training.chain(self.program, x, Tensors(found[:n], found[n : 3 * n], found[3 * n :], self.momenta))
        count_batches(self.counters)
        return result


def _places(units: Sequence[Unit]) -> list[Place]:
    convs: list[Any] = [unit.conv for unit in units]
    norms: list[Any] = [unit.bn for unit in units]
    weights = [(conv._parameters, "weight") for conv in convs]
    affine = [(bn._parameters, name) for bn in norms for name in ("weight", "bias")]
    return [*weights, *affine, *((bn._buffers, name) for bn in norms for name in ("running_mean", "running_var"))]


class Again:
    """Chains on an input as there was one before."""

    def __init__(
        self, check: Callable[[], bool], layers: list[dict[str, Any]], chains: list[_Known], x: Tensor
    ) -> None:
        self.check, self.layers, self.chains = check, layers, chains
        self.functions = chain_functions()
        self.kind, self.shape, self.strides = type(x), x.shape, x.stride()
        found = [chain.tensors() for chain in chains]
        self.guard = remember_tensors(x, *(t for tensors in found for t in tensors if t is not None))
        self.filled = [[t is not None for t in tensors] for tensors in found]
        self.mark = object()
        for layer in layers:
            layer[MARK] = self.mark

    def _found(self, x: Any) -> list[list[Tensor | None]] | None:
        """The chains' tensors, if all is as it was."""
        if type(x) is not self.kind or x.layout is not torch.strided:
            return None
        if x.shape != self.shape or x.stride() != self.strides:
            return None
        if not torch.is_grad_enabled() or not nothing_watches() or torch.onnx.is_in_onnx_export():
            return None
        if chain_functions() is not self.functions or any(layer.get(MARK) is not self.mark for layer in self.layers):
            return None
        if not self.check():
            return None
        try:
            found = [chain.tensors() for chain in self.chains]
        except KeyError:
            return None
        if [[t is not None for t in tensors] for tensors in found] != self.filled:
            return None
        return found if self.guard(x, *(t for tensors in found for t in tensors if t is not None)) else None

    def __call__(self, x: Any) -> Tensor | None:
        """The chains, one after the other; None where something is not as it was."""
        found = self._found(x)
        if found is None:
            return None
        result: Tensor = x
        for chain, tensors in zip(self.chains, found, strict=True):
            result = chain.run(result, tensors)
        return result


def _modules(owner: nn.Module, containers: Sequence[nn.Module], made: Sequence[Made]) -> Modules:
    """All that the chains were found from, but their tensors."""
    tables, states = [module._modules for module in (owner, *containers)], [module.__dict__ for module in containers]
    settings: list[tuple[dict[str, Any], str, Any]] = [NO_FORWARD_DERIVATIVES]
    for layer, units in (part for chain in made for part in chain.parts):
        inner = modules_of(units, layer, tuple(module for _, module in layer._containers()))
        tables += inner.tables
        states += [layer.__dict__, *inner.states]
        settings += inner.settings
        for unit in units:
            bn: Any = unit.bn
            settings += [(bn.__dict__, name, getattr(bn, name)) for name in _STATISTICS]
            settings.append((unit.conv._parameters, "bias", None))
    return Modules(tables, states, hooks_of(states), settings)


def remember(owner: nn.Module, containers: Sequence[nn.Module], made: Sequence[Made], x: Tensor) -> Again | None:
    """The chains that `owner` made of its layers for an input, to be run again; None where that cannot be.

    Args:
        owner: the module whose children they are.
        containers: those of its children whose children they are.
        made: the chains.
        x: the first one's input.
    """
    units = [unit for chain in made for unit in chain.chain.units]
    norms: list[Any] = [unit.bn for unit in units]
    tensors = [t for table, key in _places(units) for t in (table[key],) if t is not None]
    every = [x, *tensors]
    if make_check is None or not torch.is_grad_enabled() or not nothing_watches() or not readable(every):
        return None
    # a cumulative mean's momentum is another one each time
    if len({id(t) for t in every}) < len(every) or any(bn.momentum is None for bn in norms):
        return None
    layers = [layer.__dict__ for chain in made for layer, _ in chain.parts if layer._settings]
    for layer in layers:
        layer[MARK] = None  # that it is there belongs to what is compared
    modules = _modules(owner, containers, made)
    chains = [
        _Known(chain.program, len(chain.units), _places(chain.units), chain.tensors.momenta, counters_of(chain.units))
        for _, chain in made
    ]
    return Again(make_check((modules.tables, modules.states, *modules.hooks, modules.settings)), layers, chains, x)
