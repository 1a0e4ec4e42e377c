"""A network's blocks: the rows of its profile, found by its containers and by one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastblocks.analysis import Operator
from fastblocks.layers import Sequential

__all__ = ["Block", "Call", "below", "find", "is_fused", "tensors"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, Sequential)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Call(NamedTuple):
    """The inputs of one call, copied when it came, and the bytes that went in and out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moved: int


@dataclass
class Block:
    """A row of the profile: one module, or a convolution with the normalisation and activation behind it."""

    name: str
    paths: list[str]
    """The modules that the block is, by their paths in the network."""
    runs: list[str]
    """The modules to call, one after the other, to run it."""
    calls: list[Call]
    """What the first of them was called with."""

    def holds(self, path: str) -> bool:
        """Whether a module at this path is part of the block."""
        return any(below(path, own) for own in self.paths)


@dataclass
class _Unit:
    """A module that was watched in a run."""

    path: str
    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    first: Any = None
    last: Any = None

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def leaf(self) -> bool:
        return not any(True for _ in self.module.children()) or isinstance(self.module, NORMS)


def find(
    model: nn.Module, run: Callable[[], Any], operators: Sequence[Operator], fused: nn.Module | None = None
) -> list[Block]:
    """Find the blocks, in the order in which they run.

    Plain containers (`torch.nn.Sequential` and the like, not their subclasses) are looked into, other modules are
    blocks. A convolution or linear layer that stands by itself is one block with the normalisation and activation that
    follow it. A module that makes up more than half of the network and consists of three or more blocks with several
    layers each only wraps it, and is looked into as the network is. A fused layer stays whole, and a module that
    moves no data is left out.

    Args:
        model: the network.
        run: runs it once.
        operators: those of a run, as `fastblocks.analysis.count` lists them.
        fused: the same network on fused layers, if there is one.
    """
    paths = _unwrapped(model, operators, fused)
    busy = [path for path in paths if any(below(operator.module, path) for operator in operators)]
    groups: list[list[_Unit]] = []
    for unit in _watch(model, busy, run):
        if groups and _follows(groups[-1], unit):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return [_block(group, busy, model) for group in groups]


def below(path: str, owner: str) -> bool:
    """Whether a path is `owner` or lies below it.

    >>> below("features.1.conv", "features.1"), below("features.10", "features.1"), below("fc", "")
    (True, False, True)
    """
    return not owner or path == owner or path.startswith(f"{owner}.")


def is_fused(module: nn.Module) -> bool:
    """Whether a module is a layer of fastblocks; a mere row of layers is none."""
    return type(module).__module__.startswith("fastblocks.layers.") and type(module) is not Sequential


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _unwrapped(model: nn.Module, operators: Sequence[Operator], fused: nn.Module | None) -> list[str]:
    paths = list(_units(model, "", fused))
    half = sum(operator.multiply_adds for operator in operators) / 2
    while True:
        large = [
            path
            for path in paths
            if sum(operator.multiply_adds for operator in operators if below(operator.module, path)) > half
        ]
        if not large or _fused_at(fused, large[0]):
            return paths
        inner = list(_units(model.get_submodule(large[0]), large[0], fused))
        if sum(_layers(model.get_submodule(path)) > 1 for path in inner) < 3:
            return paths
        place = paths.index(large[0])
        paths[place : place + 1] = inner


def _units(module: nn.Module, path: str, fused: nn.Module | None) -> Iterator[str]:
    """The paths of what is no container below a module, which itself is looked into if it can be."""
    children = list(module.named_children())
    if not children:
        yield path
    for name, child in children:
        place = f"{path}.{name}" if path else name
        if type(child) in CONTAINERS and not _fused_at(fused, place):
            yield from _units(child, place, fused)
        else:
            yield place


def _fused_at(fused: nn.Module | None, path: str) -> bool:
    try:
        return fused is not None and is_fused(fused.get_submodule(path))
    except AttributeError:
        return False


def _layers(module: nn.Module) -> int:
    """How many modules, itself among them, have a matrix of weights."""
    return sum(any(p.dim() > 1 for p in m.parameters(recurse=False)) for m in module.modules())


def _watch(model: nn.Module, paths: Sequence[str], run: Callable[[], Any]) -> list[_Unit]:
    """Run the network once; these modules in the order of their first calls, with what they were given and made."""
    seen: dict[str, _Unit] = {}
    handles = []
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            continue

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            unit = seen.setdefault(path, _Unit(path, module))
            unit.first = next(iter(tensors((args, kwargs))), None)
            copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            unit.calls.append(Call(copied[0], copied[1], _bytes((args, kwargs))))

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            unit = seen[path]
            unit.last = next(iter(tensors(output)), None)
            unit.calls[-1] = unit.calls[-1]._replace(moved=unit.calls[-1].moved + _bytes(output))

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values())


def _bytes(tree: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(tree))


def _follows(group: Sequence[_Unit], unit: _Unit) -> bool:
    """Whether a module is the normalisation or activation of the layer in front of it."""
    before = group[-1]
    if not (before.leaf and unit.leaf and before.parent == unit.parent):
        return False
    if len(unit.calls) != 1 or len(before.calls) != 1 or unit.first is None or before.last is None:
        return False
    has_weights = any(True for _ in unit.module.parameters()) and not isinstance(unit.module, NORMS)
    same_size = unit.last is not None and unit.last.shape == unit.first.shape
    chained = unit.first is before.last or unit.first.data_ptr() == before.last.data_ptr()
    return same_size and chained and not has_weights


def _block(group: Sequence[_Unit], busy: Sequence[str], model: nn.Module) -> Block:
    """Name a group: by its container, if that holds nothing else, else by its modules."""
    paths, parent = [unit.path for unit in group], group[0].parent
    calls = group[0].calls
    if len(group) > 1:
        calls = [calls[0]._replace(moved=_bytes((calls[0].args, calls[0].kwargs)) + _bytes(group[-1].last))]
    alone = [path for path in busy if below(path, parent)] == paths
    if parent and alone and group[0].leaf and isinstance(model.get_submodule(parent), nn.Sequential):
        return Block(parent, paths, [parent], calls)
    names = [path.rpartition(".")[2] for path in paths]
    prefix = f"{parent}." if parent else ""
    if len(names) == 1:
        name = paths[0] or type(model).__name__
    elif all(map(str.isdigit, names)):
        name = f"{prefix}{names[0]}-{names[-1]}"
    else:
        name = prefix + "+".join(names)
    return Block(name, paths, paths, calls)
