"""What the fused layers have in common: when the op runs, when the children run."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastblocks.backends import counts
from fastblocks.functional import checks, dispatch, site
from fastblocks.layers import train
from fastblocks.layers.fuse import HasSites, Unit, children_reason, input_reason, modules_of


class Op(NamedTuple):
    """A fused op as one layer calls it: ``name(input, *first, *records, *last)``."""

    name: str
    last: tuple[Any, ...]
    first: tuple[Any, ...] = ()
    least: tuple[int, int] = (1, 1)
    """Smallest height and width of an input."""
    any_channels: bool = False
    """Whether one call site serves any number of channels."""


class Fused(HasSites, nn.Module):
    """A container of ordinary children that runs them as one op where it may.

    Subclasses say which children belong to which convolution (`_units`), which op they make (`_op`) and what happens
    without the op (`_run_children`).
    """

    _site: site.Site | None = None
    _settings: ClassVar[bool] = True
    """Whether there is anything about an instance that could be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        # What remembers calls does not watch the layer's attributes: holding them would keep the layer alive for ever.
        if self.__dict__.get(name, self) is not value:
            self.__dict__.pop("_site", None)
            self.__dict__.pop("_again", None)
        super().__setattr__(name, value)

    def _units(self) -> tuple[Unit, ...] | str:
        """The convolutions of the layer, or why the children are not those that the layer was built with."""
        raise NotImplementedError

    def _containers(self) -> tuple[tuple[str, nn.Module], ...]:
        """The other modules of the layer, with their names: containers of its convolutions, a shuffle, a pooling."""
        return ()

    def _channels(self, units: tuple[Unit, ...]) -> int | None:
        """The number of channels that an input must have; None for any."""
        conv: Any = units[0].conv if units else None
        weight = conv._parameters.get("weight") if type(conv) is nn.Conv2d else None
        return None if weight is None else weight.shape[1] * conv.groups

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        """The op that these children make, or why they make none."""
        raise NotImplementedError

    def _run_children(self, x: Any) -> Any:
        """The layer as torch would run it."""
        raise NotImplementedError

    def _describe(self, builder: train.Builder, value: int, units: tuple[Unit, ...]) -> int:
        """The layer as a part of a chain: the value that it makes of another. One convolution after the other."""
        if not units:
            raise train.UnfitError(f"a {type(self).__name__} is no part of a chain")
        for unit in units:
            value = builder.conv(value, unit)
        return value

    def _fused(self, x: Any) -> tuple[tuple[Unit, ...], Op] | str:
        """The convolutions and their op, or why the op may not run on this input."""
        reason = input_reason(x)
        if reason is not None:
            return reason
        units = self._units()
        if isinstance(units, str):
            return units
        reason = children_reason(units, self._containers())
        if reason is not None:
            return reason
        reason = self._shape_reason(x, units)
        if reason is not None:
            return reason
        op = self._op(units)
        return op if isinstance(op, str) else (units, op)

    def _shape_reason(self, x: Tensor, units: tuple[Unit, ...]) -> str | None:
        """Why an input has a shape that the children take, but no op, or None: a single image, without BatchNorm."""
        single = x.dim() == 3 and all(unit.bn is None for unit in units[:1])
        return "the input is not batched" if single else None

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer on an input ``(N, C, H, W)``."""
        if not is_compiling():
            call = self._site
            if call is not None:
                result = call(input)
                if result is not None:
                    return result
        return self._forward_checked(input)

    def _part(self, x: Any) -> train.Part | str:
        """The layer as a chain of its own, or why it is none."""
        units = train.layer_reason(self, x)
        if isinstance(units, str):
            return units
        return self._shape_reason(x, units) or (self, units)

    def _wants_chain(self, x: Any) -> bool:
        """Whether the layer trains, or gradients are wanted."""
        if is_compiling() or not isinstance(x, Tensor):
            return False
        units = self._units()
        return not isinstance(units, str) and (train.is_training(units) or train.wants_gradients(x, units))

    def _chained(self, x: Any) -> Tensor | str | None:
        """The layer run as a chain of its own, or why that cannot be; None where no chain is wanted."""
        if not self._wants_chain(x):
            return None
        part = self._part(x)
        if isinstance(part, str):
            return part
        self._check(x, part[1])
        return train.run((part,), x)

    def _forward_checked(self, x: Any) -> Any:
        chained = self._chained(x)
        if isinstance(chained, Tensor):
            return chained
        fused = self._fused(x)
        if isinstance(fused, str):
            if not is_compiling():
                self.__dict__["_site"] = None
                train.warn_of_sync(train.units_of(self))
                counts.fell_back(type(self).__name__, fused)
            self._refuse(x)
            return self._run_children(x)
        units, op = fused
        records = [unit.record()[:6] for unit in units]
        args = (x, *op.first, *records, *op.last)
        tensors = [x, *(tensor for record in records for tensor in record if tensor is not None)]
        if is_compiling():
            checks.CHECKS[op.name](*args)
            return dispatch.run(op.name, args, tensors)
        self._check(x, units)
        result = site.check_and_call(op.name, args, tensors)
        containers = self._containers()
        arguments = [
            *map(site.value, op.first),
            *(site.record(unit.places()) for unit in units),
            *map(site.value, op.last),
        ]
        modules = modules_of(units, self, tuple(module for _, module in containers))
        self.__dict__["_site"] = site.make(
            op.name,
            x,
            arguments,
            modules,
            least=op.least,
            any_channels=op.any_channels,
            differentiates=isinstance(chained, str),
        )
        return result

    def _refuse(self, x: Any) -> None:
        """Raise for an input that fits neither the op nor the children; torch's own messages do not name it."""
        units = self._units()
        if isinstance(units, str) or (type(x) is not Tensor and type(x) is not nn.Parameter) or x.dtype.is_complex:
            return
        if not torch.jit.is_tracing() and self._shape_reason(x, units) is None:
            self._check(x, units)

    def _check(self, x: Tensor, units: tuple[Unit, ...]) -> None:
        """Raise for an input of a shape that does not fit."""
        channels = self._channels(units)
        if channels is not None:
            checks.image("input", x, channels)


def why_not_fuse(layer: nn.Module, x: Any) -> str | None:
    """Why a layer runs its children and not its fused op on an input, or None if it runs the op.

    Args:
        layer: a fused layer.
        x: the input.

    Returns:
        The first reason found, such as ``"1.convolution has hooks"``, or None.

    Example:
        >>> import torch, fastblocks
        >>> layer = fastblocks.ConvBNAct(3, 8)
        >>> why_not_fuse(layer, torch.ones(1, 3, 8, 8, dtype=torch.float64))
        "the input's dtype is torch.float64, not torch.float32"
    """
    if not isinstance(layer, Fused):
        return f"{type(layer).__name__} is no fused layer"
    if layer._wants_chain(x):
        part = layer._part(x)
        if not isinstance(part, str) and not isinstance(train.chain_of((part,), x), str):
            return None
    fused = layer._fused(x)
    return fused if isinstance(fused, str) else None


def can_fuse(layer: nn.Module, x: Any) -> bool:
    """Whether a layer runs its fused op on an input; `why_not_fuse` has the reason.

    Example:
        >>> import torch, fastblocks
        >>> can_fuse(fastblocks.ConvBNAct(3, 8).eval(), torch.ones(1, 3, 8, 8))
        True
    """
    return why_not_fuse(layer, x) is None
