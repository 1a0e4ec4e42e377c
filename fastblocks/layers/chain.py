"""Layers one after the other, in one go where they may."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastblocks.functional import site
from fastblocks.layers import again, train
from fastblocks.layers.base import Fused
from fastblocks.layers.fuse import HasSites, Unit, hooks_of, watched
from fastblocks.layers.head import GLOBAL_AVG_POOL, Classifier, Linear, global_avg_pool
from fastblocks.layers.train import layer_reason


def _called_plainly(module: nn.Module) -> bool:
    """Whether calling this module is calling the forward of its class."""
    return watched(module) is None and module._compiled_call_impl is None


def _runs_its_op_alone(layer: Any) -> bool:
    """Whether calling this layer is calling its op: no class has put more around it."""
    kind = type(layer)
    plain = isinstance(layer, Fused) and kind.forward is Fused.forward and kind.__call__ is nn.Module.__call__
    return plain and _called_plainly(layer)


def _joined(owner: nn.Module, children: Iterable[Any], classifier: Any = None) -> site.Site | None:
    """The layers that these children of `owner` are, as one site. A `Sequential` among them stands for its layers.

    Behind them, with a `classifier`, come global average pooling and that child.
    """
    layers, containers = _flat(children)
    if len(layers) < 2 or not all(map(_runs_its_op_alone, layers)):
        return None
    tables = tuple(module._modules for module in (owner, *containers))
    head = () if classifier is None else (classifier,)
    states = [module.__dict__ for module in (*containers, *layers, *head)]
    ends = (GLOBAL_AVG_POOL, *head) if head else ()
    sites = [module.__dict__ for module in (*layers, *ends)]
    return site.chain(sites, site.Modules(tables, states, hooks_of(states)))


def _flat(children: Iterable[Any]) -> tuple[list[Any], list[nn.Module]]:
    """The layers that these children are, and the children that hold some: a `Sequential` stands for its layers."""
    layers: list[Any] = []
    containers: list[nn.Module] = []
    for child in children:
        if type(child) is Sequential and _called_plainly(child):
            containers.append(child)
            layers += child._modules.values()
        else:
            layers.append(child)
    return layers, containers


_FULL = 1 << 15
"""A chain may end that has as many weights: their gradients are worth sending while the next chain computes."""


def _has_stride(units: tuple[Unit, ...]) -> bool:
    return any(unit.conv.stride != (1, 1) for unit in units)


def _weights(units: tuple[Unit, ...]) -> int:
    convs: list[Any] = [unit.conv for unit in units]
    return sum(conv.weight.numel() for conv in convs)


def _trained(owner: nn.Module, children: Iterable[Any], pool: Sequence[Fused], x: Any) -> Any:
    """The layers and `pool` in training, or with gradients: chains where they may be, a layer by itself where not.

    None where nothing trains. A chain ends behind a layer with a stride, where tensors are smallest, once it is full.
    Where all are chains, and the input is like the one before, they are remembered.
    """
    layers, containers = _flat(children)
    if not isinstance(x, Tensor) or not any(isinstance(layer, Fused) and layer._wants_chain(x) for layer in layers):
        return None
    layers += pool
    parts: list[train.Part] = []
    made: list[train.Made] = []
    weights = 0
    first = x
    for layer in layers:
        units = layer_reason(layer, x) if _runs_its_op_alone(layer) else ""
        if isinstance(units, str):
            x = layer(_run(parts, x, made))
            parts, weights = [], 0
            continue
        parts.append((layer, units))
        weights += _weights(units)
        if weights >= _FULL and _has_stride(units):
            x = _run(parts, x, made)
            parts, weights = [], 0
    x = _run(parts, x, made)
    seen = (first.shape, first.stride()) if sum(len(chain.parts) for chain in made) == len(layers) else None
    repeats = seen is not None and owner.__dict__.get(_memory(pool)) == seen
    owner.__dict__[_memory(pool)] = again.remember(owner, containers, made, first) if repeats else seen
    return x


def _memory(pool: Sequence[Fused]) -> str:
    """Where a module remembers its training."""
    return "_pooled_training" if pool else "_training"


def _run(parts: list[train.Part], x: Any, made: list[train.Made]) -> Any:
    """Layers as one chain, which becomes one of those `made`, or else one by one."""
    if not parts:
        return x
    result = train.run(parts, x, made)
    if isinstance(result, Tensor):
        return result
    for layer, _ in parts:
        x = layer(x)
    return x


def run_in_a_row(owner: nn.Module, names: Iterable[str], x: Any) -> Any:
    """Run children of `owner`, by their names: in one go if that was found good and nothing has changed since.

    The layers are checked as they are alone; then all of them run in one entry of the thread pool, and no tensor is
    made for what passes between them.
    """
    return _in_a_row(owner, names, (), x)[0]


def _in_a_row(owner: nn.Module, names: Iterable[str], pool: Sequence[Fused], x: Any) -> tuple[Any, bool]:
    """Children of `owner` in a row; in training with `pool` behind them, and whether that was so."""
    chain = None if is_compiling() else owner.__dict__.get("_chain")
    if chain is not None:
        result = chain(x)
        if result is not None:
            return result, False
    known = None if is_compiling() else owner.__dict__.get(_memory(pool))
    if isinstance(known, again.Again):
        result = known(x)
        if result is not None:
            return result, True
    children = [owner._modules[name] for name in names]
    if not is_compiling():
        result = _trained(owner, children, pool, x)
        if result is not None:
            return result, True
    for child in children:
        x = child(x)  # type: ignore[misc]
    # where gradients are recorded the layers run one by one, and a chain from before stays good
    if not is_compiling() and not (isinstance(x, Tensor) and x.requires_grad):
        owner.__dict__["_chain"] = _joined(owner, children)
    return x, False


def _heads(classifier: nn.Module) -> bool:
    """Whether a module may end a chain, as the classifier."""
    return type(classifier) in (Classifier, Linear) and _called_plainly(classifier)


def classify(owner: nn.Module, names: Iterable[str], classifier: nn.Module, x: Any) -> Any:
    """Children of `owner` in a row, global average pooling and its classifier, in one go where that may be.

    Where gradients are recorded the pooling ends the last chain, and the classifier runs behind it.
    """
    alone = is_compiling() or torch.is_grad_enabled()
    network = None if alone else owner.__dict__.get("_network")
    if network is not None:
        result = network(x)
        if result is not None:
            return result
    result, pooled = _in_a_row(owner, names, (GLOBAL_AVG_POOL,), x)
    result = classifier(result.flatten(1) if pooled else global_avg_pool(result))
    # where the children make no chain, the network makes none either: do not look again at each call
    if not alone and owner.__dict__.get("_chain") is not None and _heads(classifier):
        owner.__dict__["_network"] = _joined(owner, [owner._modules[name] for name in names], classifier)
    return result


class Sequential(HasSites, nn.Sequential):
    """An nn.Sequential whose fused layers run in one go where they may.

    Where that may not be (a layer without its op, hooks, gradients, profiling), they run one by one, as an
    nn.Sequential runs them.

    Example:
        >>> import torch, fastblocks
        >>> layers = fastblocks.Sequential(fastblocks.ConvBNAct(3, 8), fastblocks.InvertedResidual(8, 8)).eval()
        >>> tuple(layers(torch.ones(1, 3, 8, 8)).shape)
        (1, 8, 8, 8)
    """

    def forward(self, input: Any) -> Any:
        """Run the layers."""
        return run_in_a_row(self, self._modules, input)


class Trunk(HasSites, nn.Module):
    """A module that runs its first children in one go where it may, as a `Sequential` of them would.

    Subclasses name the children in ``TRUNK``, in their order, and call `trunk`.
    """

    TRUNK: ClassVar[tuple[str, ...]] = ()

    def trunk(self, x: Any) -> Any:
        """Run the named children."""
        return run_in_a_row(self, self.TRUNK, x)

    def classify(self, classifier: nn.Module, x: Any) -> Any:
        """Run the named children, global average pooling and a classifier."""
        return classify(self, self.TRUNK, classifier, x)
