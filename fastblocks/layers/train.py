"""Fused layers in training, and with gradients: which program their children make.

Layers describe themselves to a `Builder`, one after the other; what comes out is one program for all of them. Inside it
no activated tensor is stored, so the longer a chain, the less memory. But DistributedDataParallel sends gradients as
they become ready, chain by chain: so a chain ends behind a layer with a stride, where the tensor that must be stored
between two chains is small.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastblocks.backends.program import ACTIVATIONS, Kind, Node, Pair, Program, Tensors, makes_conv
from fastblocks.functional import training
from fastblocks.functional.site import Place
from fastblocks.layers.fuse import Unit, children_reason, input_reason, is_depthwise, is_pointwise

if TYPE_CHECKING:
    from fastblocks.layers.base import Fused

Shape = tuple[int, int, int]
"""Channels, height, width."""


class UnfitError(Exception):
    """A layer that is no part of a chain; the message says why."""


def _size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _is_frozen(bn: Any) -> bool:
    """Whether a BatchNorm uses its running statistics: torch's rule."""
    return not (bn.training or bn.running_mean is None or bn.running_var is None)


class Builder:
    """Makes a program from layers. Values are numbers; 0 is the input."""

    def __init__(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise UnfitError("the input is not batched")
        self.images = x.shape[0]
        self.shapes: list[Shape] = [tuple(x.shape[1:])]  # type: ignore[list-item]
        self.nodes: list[Node] = []
        self.units: list[Unit] = []

    def _add(self, node: Node, shape: Shape) -> int:
        if min(shape) < 1:
            raise UnfitError("the input is smaller than a kernel")
        self.nodes.append(node)
        self.shapes.append(shape)
        return len(self.nodes)

    def conv(
        self,
        value: int,
        unit: Unit,
        *,
        first: int = 0,
        channels: int = -1,
        shuffle: int = 1,
        activation: str | None = None,
    ) -> int:
        """A convolution with its BatchNorm, and the activation of the unit, or the one given where it has none."""
        conv: Any = unit.conv
        bn: Any = unit.bn
        name = unit.prefix()
        if conv.bias is not None:
            raise UnfitError(f"{name}convolution has a bias")
        if bn is None:
            raise UnfitError(f"{name}convolution has no normalisation")
        weight = conv.weight
        c, h, w = self.shapes[value]
        c = c if channels < 0 else channels
        if weight.shape[1] * conv.groups != c or weight.shape[2] * weight.shape[3] > 121:
            raise UnfitError(f"{name}convolution has a weight of another shape than a chain knows")
        single = is_depthwise(conv) or (tuple(weight.shape[:2]) == (1, 1) and not is_pointwise(conv))
        if is_pointwise(conv, grouped=True) and not single:
            kind = Kind.POINTWISE
        elif single and weight.shape[0] == c:
            kind = Kind.DEPTHWISE
        elif conv.groups == 1 and value == 0 and channels < 0:
            kind = Kind.DENSE
        else:
            raise UnfitError(f"{name}convolution is none that a chain has")
        frozen = _is_frozen(bn)
        update = bn.training and bn.track_running_stats and bn.running_mean is not None
        if bn.momentum is None and any(known.bn is bn for known in self.units):
            raise UnfitError(f"{name}normalisation has cumulative statistics and comes twice")
        kernel: Pair = (weight.shape[2], weight.shape[3])
        geometry = zip((h, w), kernel, conv.stride, conv.padding, conv.dilation, strict=True)
        h, w = (_size(*sizes) for sizes in geometry)
        if not frozen and self.images * h * w <= 1:
            raise UnfitError("there is one value a channel")
        self.units.append(unit)
        node = Node(
            kind,
            value,
            first,
            channels,
            groups=1 if kind == Kind.DEPTHWISE else conv.groups,
            shuffle=shuffle,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            kernel=kernel,
            activation=ACTIVATIONS[unit.activation() or activation],
            frozen=frozen,
            update=update,
            eps=bn.eps,
        )
        return self._add(node, (weight.shape[0], h, w))

    def add(self, value: int, other: int, activation: str | None) -> int:
        """The sum of a value and a convolution's."""
        if self.shapes[value] != self.shapes[other]:
            raise UnfitError("the output has another shape than the input that it is added to")
        return self._add(Node(Kind.ADD, value, other=other, activation=ACTIVATIONS[activation]), self.shapes[value])

    def pool_cat(self, value: int, other: int) -> int:
        """The 3x3 mean at stride 2 of a value, and behind its channels those of a convolution's."""
        c, h, w = self.shapes[other]
        node = Node(Kind.POOL_CAT, value, other=other, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
        return self._add(node, (self.shapes[value][0] + c, h, w))

    def interleave(self, value: int, other: int, first: int = 0, channels: int = -1) -> int:
        """The channels of a value, or of a slice of it, and of a convolution's, by turns."""
        c, h, w = self.shapes[other]
        return self._add(Node(Kind.INTERLEAVE, value, first, channels, other), (2 * c, h, w))

    def max_pool(self, value: int, kernel: Pair, stride: Pair, padding: Pair) -> int:
        """The largest value of each window."""
        c, h, w = self.shapes[value]
        h, w = (_size(*sizes) for sizes in zip((h, w), kernel, stride, padding, strict=True))
        if kernel[0] * kernel[1] > 121:
            raise UnfitError("the pooling window is larger than a chain knows")
        return self._add(Node(Kind.MAX_POOL, value, kernel=kernel, stride=stride, padding=padding), (c, h, w))

    def mean(self, value: int) -> int:
        """The mean over height and width, behind which nothing comes."""
        return self._add(Node(Kind.MEAN, value), (self.shapes[value][0], 1, 1))

    def finish(self, value: int) -> tuple[Program, Tensors]:
        """The program that ends with a value, and its tensors."""
        program = tuple(self.nodes)
        if makes_conv(program, value):
            self._add(Node(Kind.ACTIVATE, value), self.shapes[value])
        weights: list[Tensor] = []
        affine: list[Tensor | None] = []
        running: list[Tensor | None] = []
        momenta: list[float] = []
        for unit in self.units:
            conv: Any = unit.conv
            bn: Any = unit.bn
            weights.append(conv.weight)
            affine += [bn.weight, bn.bias]
            running += [bn.running_mean, bn.running_var]
            momenta.append(_momentum(bn))
        return tuple(self.nodes), Tensors(weights, affine, running, momenta)


def _momentum(bn: Any) -> float:
    """The share of the new statistics in the running ones, with this batch counted."""
    if bn.momentum is not None:
        return float(bn.momentum)
    if not bn.training or bn.num_batches_tracked is None:
        return 0.0
    return 1.0 / (int(bn.num_batches_tracked) + 1)


def counters_of(units: Sequence[Unit]) -> list[Place]:
    """Where the numbers of batches stand that BatchNorms count."""
    norms: list[Any] = [unit.bn for unit in units]
    return [(bn._buffers, "num_batches_tracked") for bn in norms if bn.training and bn.track_running_stats]


def count_batches(places: Sequence[Place]) -> None:
    """One batch more."""
    counters = [t for t in (table.get(key) for table, key in places) if t is not None]
    if counters:
        torch._foreach_add_(counters, 1)


def units_of(layer: Fused) -> tuple[Unit, ...]:
    """The convolutions of a layer; none where they are not those it was built with."""
    units = layer._units()
    return () if isinstance(units, str) else units


def wants_gradients(x: Tensor, units: Sequence[Unit]) -> bool:
    """Whether a backward pass may come."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    parameters = (p for unit in units for module in unit.modules() for p in module._parameters.values())
    return any(p is not None and p.requires_grad for p in parameters)


def is_training(units: Sequence[Unit]) -> bool:
    """Whether a BatchNorm uses the batch's statistics."""
    return any(unit.bn is not None and not _is_frozen(unit.bn) for unit in units)


def layer_reason(layer: Fused, x: Any) -> tuple[Unit, ...] | str:
    """The convolutions of a layer that may be part of a chain, or why it may not. `x` is the chain's input."""
    reason = input_reason(x)
    if reason is not None:
        return reason
    units = layer._units()
    if isinstance(units, str):
        return units
    reason = children_reason(units, layer._containers(), training=True)
    if reason is not None:
        return reason
    op = layer._op(units)
    return op if isinstance(op, str) else units


class Chain(NamedTuple):
    """Layers as one program."""

    program: Program
    tensors: Tensors
    units: Sequence[Unit]


Part = tuple["Fused", tuple[Unit, ...]]
"""A layer and its convolutions, as `layer_reason` found them fit."""


def chain_of(parts: Sequence[Part], x: Tensor) -> Chain | str:
    """Layers in a row as one chain; or why they are none."""
    value = 0
    try:
        builder = Builder(x)
        for layer, units in parts:
            value = layer._describe(builder, value, units)
        program, tensors = builder.finish(value)
    except UnfitError as reason:
        return str(reason)
    if is_compiling() or not training.takes(x, tensors):
        return "no compiled tier takes these tensors"
    return Chain(program, tensors, builder.units)


class Made(NamedTuple):
    """A chain that ran, and the layers that it was made of."""

    parts: Sequence[Part]
    chain: Chain


def run(parts: Sequence[Part], x: Tensor, made: list[Made] | None = None) -> Tensor | str:
    """Run layers as one chain, which becomes one of those `made`; or why that cannot be."""
    chain = chain_of(parts, x)
    if isinstance(chain, str):
        return chain
    if made is not None:
        made.append(Made(parts, chain))
    result = training.chain(chain.program, x, chain.tensors)
    count_batches(counters_of(chain.units))
    return result


_warned = False


def warn_of_sync(units: Sequence[Unit]) -> None:
    """Say once that BatchNorms which agree with other processes are left to torch."""
    global _warned
    if not _warned and any(isinstance(unit.bn, nn.SyncBatchNorm) for unit in units):
        _warned = True
        message = "fastblocks: layers with nn.SyncBatchNorm run their children, by plain torch"
        warnings.warn(message, UserWarning, stacklevel=3)
