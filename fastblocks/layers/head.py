"""The end of a classifier network: global average pooling and the fully connected layer, as ops where they may be."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastblocks import functional
from fastblocks.functional import site
from fastblocks.layers.base import Fused, Op
from fastblocks.layers.conv import sliced
from fastblocks.layers.fuse import HasSites, Unit, global_hooks, hooks_of, input_reason, tensors_reason, watched
from fastblocks.layers.train import Builder

_TYPES = [nn.Dropout, nn.Linear]


class GlobalAvgPool(Fused):
    """Mean over height and width, as a layer that a chain may end with; only networks have it.

    Shape:
        ``(N, C, H, W)`` to ``(N, C, 1, 1)``.
    """

    _settings = False

    def _units(self) -> tuple[Unit, ...]:
        return ()

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        return Op("global_avg_pool", (), any_channels=True)

    def _describe(self, builder: Builder, value: int, units: tuple[Unit, ...]) -> int:
        return builder.mean(value)

    def _run_children(self, x: Any) -> Any:
        return F.adaptive_avg_pool2d(x, (1, 1))


GLOBAL_AVG_POOL = GlobalAvgPool()
"""The one that all networks share, with its call site."""


def global_avg_pool(x: Any) -> Any:
    """Mean over height and width: ``(N, C, H, W)`` to ``(N, C)``, by the op where torch would notice no difference.

    Example:
        >>> import torch
        >>> global_avg_pool(torch.ones(2, 3, 7, 7)).shape
        torch.Size([2, 3])
    """
    return GLOBAL_AVG_POOL.forward(x).flatten(1)


def _run_linear(x: Tensor, linear: nn.Module, modules: site.Modules) -> tuple[Tensor, site.Site | None]:
    """The op with all checks, and the site for the next call."""
    weight: Any = linear.weight
    bias: Any = linear.bias
    tensors = [t for t in (x, weight, bias) if t is not None]
    result = site.check_and_call("linear", (x, weight, bias), tensors)
    arguments = [site.tensor((linear._parameters, name)) for name in ("weight", "bias")]
    return result, site.make("linear", x, arguments, modules, least=None)


def _linear_reason(x: Any, linear: nn.Module) -> str | None:
    """Why the op may not run with this input and the tensors of this layer, or None."""
    reason = tensors_reason(linear, ("weight", "bias")) or input_reason(x)
    return reason or (None if x.dim() == 2 else f"the input has {x.dim()} dimensions")


class Linear(HasSites, nn.Linear):
    """torch's ``nn.Linear``, with all of its arguments, by the op where it may be.

    Args:
        in_features: length of the input vectors.
        out_features: length of the output vectors.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(N, in_features)`` to ``(N, out_features)``.

    Example:
        >>> import torch
        >>> tuple(Linear(8, 2)(torch.ones(1, 8)).shape)
        (1, 2)
    """

    _site: site.Site | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Product with the weight, plus the bias."""
        call = None if is_compiling() else self._site
        if call is not None:
            result = call(input)
            if result is not None:
                return result
        if _linear_reason(input, self) is not None:
            return super().forward(input)
        if is_compiling():
            return functional.linear(input, self.weight, self.bias)
        result, self.__dict__["_site"] = _run_linear(input, self, site.Modules())
        return result


class Classifier(HasSites, nn.Sequential):
    """Dropout and a fully connected layer, ``"0"`` and ``"1"``, the latter as an op where it may be.

    Args:
        in_features: length of the input vectors.
        num_classes: length of the output vectors.
        dropout: probability, in training.

    Shape:
        ``(N, in_features)`` to ``(N, num_classes)``.

    Example:
        >>> import torch
        >>> tuple(Classifier(8, 2).eval()(torch.ones(1, 8)).shape)
        (1, 2)
    """

    _site: site.Site | None = None

    def __init__(self, in_features: int, num_classes: int, dropout: float = 0.2) -> None:
        super().__init__(nn.Dropout(dropout), nn.Linear(in_features, num_classes))

    def forward(self, input: Tensor) -> Tensor:
        """Logits of a batch of feature vectors."""
        call = None if is_compiling() else self._site
        if call is not None:
            result = call(input)
            if result is not None:
                return result
        return self._forward_checked(input)

    def __getitem__(self, idx: Any) -> Any:
        return sliced(self, idx) if isinstance(idx, slice) else super().__getitem__(idx)

    def _why_not(self, x: Any) -> str | None:
        children: Any = list(self._modules.values())
        if [*map(type, children)] != _TYPES:
            return "the layer has other children than it was built with"
        if global_hooks():
            return "global module hooks are set"
        dropout, linear = children
        if dropout.training:
            return "dropout is in training mode"
        return watched(dropout) or watched(linear) or _linear_reason(x, linear)

    def _forward_checked(self, x: Any) -> Any:
        if self._why_not(x) is not None:
            return nn.Sequential.forward(self, x)
        children: Any = list(self._modules.values())
        linear = children[1]
        if is_compiling():
            return functional.linear(x, linear.weight, linear.bias)
        states = [child.__dict__ for child in children]
        modules = site.Modules((self._modules,), states, hooks_of(states), ((states[0], "training", False),))
        result, self.__dict__["_site"] = _run_linear(x, linear, modules)
        return result
