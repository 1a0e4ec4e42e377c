"""The part of a network that is one layer after the other, though its children have names of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.compiler import is_compiling

from fastblocks.functional import site
from fastblocks.layers.chain import Sequential, runs_its_op_alone
from fastblocks.layers.fuse import hooks_of, watched


class Trunk(nn.Module):
    """A module that runs its first children in one go where it may, as a `Sequential` of them would.

    Subclasses name the children in ``TRUNK``, in their order, and call `trunk`. A child that is a `Sequential` stands
    for its layers.
    """

    TRUNK: ClassVar[tuple[str, ...]] = ()
    _chain: site.Site | None = None

    def trunk(self, x: Any) -> Any:
        """Run the named children."""
        chain = None if is_compiling() else self._chain
        if chain is not None:
            result = chain(x)
            if result is not None:
                return result
        for name in self.TRUNK:
            x = getattr(self, name)(x)
        if not is_compiling():
            self.__dict__["_chain"] = self._make_chain()
        return x

    def _make_chain(self) -> site.Site | None:
        containers: list[nn.Module] = []
        layers: list[Any] = []
        for name in self.TRUNK:
            child = self._modules.get(name)
            if type(child) is Sequential:
                if watched(child) is not None or child._compiled_call_impl is not None:
                    return None
                containers.append(child)
                layers += child._modules.values()
            else:
                layers.append(child)
        if not all(map(runs_its_op_alone, layers)):
            return None
        tables = tuple(module._modules for module in (self, *containers))
        states = [module.__dict__ for module in (*containers, *layers)]
        return site.chain([layer.__dict__ for layer in layers], site.Modules(tables, states, hooks_of(states)))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = self.__dict__.copy()
        state.pop("_chain", None)
        return state
