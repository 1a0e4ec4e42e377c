"""Layers one after the other."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.compiler import is_compiling

from fastblocks.functional import site
from fastblocks.layers.base import Fused
from fastblocks.layers.fuse import hooks_of, watched


def runs_its_op_alone(layer: Any) -> bool:
    """Whether calling this layer is calling its op: no class has put more around it."""
    kind = type(layer)
    plain = isinstance(layer, Fused) and kind.forward is Fused.forward and kind.__call__ is nn.Module.__call__
    return plain and watched(layer) is None and layer._compiled_call_impl is None


class Sequential(nn.Sequential):
    """An nn.Sequential whose fused layers run in one go where they may.

    The layers are checked as they are alone; then all of them run in one entry of the thread pool, and no tensor is
    made for what passes between them. Where that may not be (a layer without its op, hooks, gradients, profiling),
    they run one by one, as an nn.Sequential runs them.

    Example:
        >>> import torch, fastblocks
        >>> layers = fastblocks.Sequential(fastblocks.ConvBNAct(3, 8), fastblocks.InvertedResidual(8, 8)).eval()
        >>> tuple(layers(torch.ones(1, 3, 8, 8)).shape)
        (1, 8, 8, 8)
    """

    _chain: site.Site | None = None

    def forward(self, input: Any) -> Any:
        """Run the layers."""
        if is_compiling():
            return super().forward(input)
        chain = self._chain
        if chain is not None:
            result = chain(input)
            if result is not None:
                return result
        self.__dict__.pop("_chain", None)
        result = super().forward(input)
        children = list(self._modules.values())
        if len(children) > 1 and all(map(runs_its_op_alone, children)):
            states = [child.__dict__ for child in children]  # type: ignore[union-attr]
            joined = site.chain(states, site.Modules((self._modules,), states, hooks_of(states)))
            if joined is not None:
                self.__dict__["_chain"] = joined
        return result

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = self.__dict__.copy()
        state.pop("_chain", None)
        return state
