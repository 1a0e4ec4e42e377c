"""ShuffleNet's unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastblocks.layers.base import Fused, Op
from fastblocks.layers.conv import ConvBNAct, block_units, positive
from fastblocks.layers.fuse import (
    ACTIVATIONS,
    Unit,
    activation_reason,
    depthwise_reason,
    groups_reason,
    pointwise_reason,
)
from fastblocks.layers.shuffle import ChannelShuffle
from fastblocks.layers.train import Builder

_BLOCKS = ("compress", "depthwise", "expand")
_SHUFFLES = (ChannelShuffle, nn.ChannelShuffle)
_POOL = {
    "kernel_size": (3, (3, 3)),
    "stride": (2, (2, 2)),
    "padding": (1, (1, 1)),
    "ceil_mode": (False,),
    "count_include_pad": (True,),
    "divisor_override": (None,),
}


class ShuffleUnit(Fused):
    """ShuffleNet's unit (Zhang et al. 2017, section 3.2), as one op where it may be.

    A bottleneck of ``out_channels / 4``: grouped 1x1 convolution with normalisation and ReLU, channel shuffle, 3x3
    depthwise convolution and grouped 1x1 convolution, both with normalisation alone. At stride 1 the result is
    ``ReLU(x + branch)``. At stride 2 the branch makes ``out_channels - in_channels`` channels, which stand behind those
    of the 3x3 average-pooled input: ``cat(pool(x), ReLU(branch))``.

    The children are ``compress``, ``depthwise`` and ``expand``, each with the keys of a `ConvBNAct`; ``shuffle``,
    ``activation`` and at stride 2 ``pool`` have no keys.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2, of the depthwise convolution.
        groups: groups of the 1x1 convolutions and of the shuffle.
        first_grouped: whether the first 1x1 convolution is grouped; the one behind ShuffleNet's stem is not.
        shuffle_groups: groups of the shuffle, where they are others: ``out_channels / 4 / groups`` is the inverse
            permutation, which some checkpoints were trained with. The unit is several ops then.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> unit = ShuffleUnit(24, 240, stride=2, groups=3, first_grouped=False).eval()
        >>> tuple(unit(torch.ones(1, 24, 56, 56)).shape)
        (1, 240, 28, 28)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int,
        first_grouped: bool = True,
        shuffle_groups: int | None = None,
    ) -> None:
        super().__init__()
        in_channels = positive("in_channels", in_channels)
        out_channels = positive("out_channels", out_channels)
        groups = positive("groups", groups)
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
        if stride == 1 and in_channels != out_channels:
            raise ValueError(f"out_channels: expected in_channels = {in_channels} at stride 1, got {out_channels}")
        if stride == 2 and in_channels >= out_channels:
            raise ValueError(
                f"out_channels: expected more than in_channels = {in_channels} at stride 2, got {out_channels}"
            )
        if out_channels % 4:
            raise ValueError(f"out_channels: expected a multiple of 4, got {out_channels}")
        bottleneck = out_channels // 4
        branch = out_channels if stride == 1 else out_channels - in_channels
        shuffle_groups = groups if shuffle_groups is None else positive("shuffle_groups", shuffle_groups)
        for name, number, channels, what in (
            ("groups", groups, bottleneck, "out_channels / 4"),
            ("groups", groups, out_channels - in_channels, "out_channels - in_channels"),
            ("shuffle_groups", shuffle_groups, bottleneck, "out_channels / 4"),
        ):
            if channels % number:
                raise ValueError(f"{name}: expected a divisor of {what} = {channels}, got {number}")
        self.compress = ConvBNAct(
            in_channels, bottleneck, 1, groups=groups if first_grouped else 1, activation_layer=nn.ReLU
        )
        self.shuffle = ChannelShuffle(shuffle_groups)
        self.depthwise = ConvBNAct(bottleneck, bottleneck, 3, stride, groups=bottleneck, activation_layer=None)
        self.expand = ConvBNAct(bottleneck, branch, 1, groups=groups, activation_layer=None)
        if stride == 2:
            self.pool = nn.AvgPool2d(3, 2, 1)
        self.activation = nn.ReLU(inplace=True)
        self.stride = stride
        self.groups = groups
        self.out_channels = out_channels

    def _containers(self) -> tuple[tuple[str, nn.Module], ...]:
        return tuple(self._modules.items())  # type: ignore[arg-type]

    def _units(self) -> tuple[Unit, ...] | str:
        names = {*_BLOCKS, "shuffle", "activation", *(("pool",) if self.stride == 2 else ())}
        if self._modules.keys() != names or None in self._modules.values():
            return "the layer has other children than it was built with"
        units: list[Unit] = []
        for name in _BLOCKS:
            found = block_units(self._modules[name], name)
            if isinstance(found, str):
                return found
            units += found
        return tuple(units)

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        compress, depthwise, expand = units
        reason = (
            pointwise_reason(compress, grouped=True)
            or depthwise_reason(depthwise, same=True)
            or pointwise_reason(expand, grouped=True)
            or self._others_reason()
        )
        if reason is not None:
            return reason
        activation = ACTIVATIONS[type(self.activation)]
        for unit, expected in ((compress, activation), (depthwise, None), (expand, None)):
            if unit.activation() != expected:
                return f"{unit.name} has the activation {unit.activation()}, expected {expected}"
        groups = self.shuffle.groups
        first: Any = compress.conv
        last: Any = expand.conv
        for unit, allowed in ((compress, (1, groups)), (expand, (groups,))):
            conv: Any = unit.conv
            if conv.groups not in allowed:
                return f"{groups_reason(unit)}, the shuffle has {groups}"
        stride = self.stride
        if depthwise.conv.stride != (stride, stride):
            return f"{depthwise.name} has the stride {depthwise.conv.stride}, the unit {stride}"
        if stride == 1 and last.weight.shape[0] != first.weight.shape[1] * first.groups:
            return "the output has another shape than the input that it is added to"
        return Op("shuffle_unit", (tuple(unit.eps() for unit in units), stride, groups, activation))

    def _others_reason(self) -> str | None:
        """Why the children without tensors are none that the op knows, or None."""
        if type(self.shuffle) not in _SHUFFLES:
            return f"shuffle is a {type(self.shuffle).__name__}, not a ChannelShuffle"
        reason = activation_reason(self.activation)
        if reason is not None:
            return f"activation {reason}"
        if self.stride == 2:
            if type(self.pool) is not nn.AvgPool2d:
                return f"pool is a {type(self.pool).__name__}, not an nn.AvgPool2d"
            for name, allowed in _POOL.items():
                found = getattr(self.pool, name)
                if found not in allowed:
                    return f"pool has {name} {found!r}, expected {allowed[0]!r}"
        return None

    def _describe(self, builder: Builder, value: int, units: tuple[Unit, ...]) -> int:
        compress, depthwise, expand = units
        activation = ACTIVATIONS[type(self.activation)]
        result = builder.conv(builder.conv(value, compress), depthwise, shuffle=self.shuffle.groups)
        if self.stride == 1:
            return builder.add(value, builder.conv(result, expand), activation)
        return builder.pool_cat(value, builder.conv(result, expand, activation=activation))

    def _run_children(self, x: Any) -> Any:
        y = self.expand(self.depthwise(self.shuffle(self.compress(x))))
        if self.stride == 1:
            return self.activation(x + y)
        return torch.cat((self.pool(x), self.activation(y)), 1)
