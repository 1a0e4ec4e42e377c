"""ShuffleNetV2's unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastblocks.layers.base import Fused, Op
from fastblocks.layers.conv import positive
from fastblocks.layers.fuse import Unit, depthwise_reason, pointwise_reason
from fastblocks.layers.shuffle import shuffled
from fastblocks.layers.train import Builder

_RIGHT = ((0, 1, 2), (3, 4), (5, 6, 7))
_LEFT = ((0, 1), (2, 3, 4))


class ShuffleUnitV2(Fused):
    """ShuffleNetV2's unit (Ma et al. 2018, section 4), as one op where it may be.

    At stride 1 the left half of the channels passes through; the right half goes through a 1x1 convolution, a 3x3
    depthwise convolution and another 1x1 convolution, each with normalisation, the 1x1 ones with ReLU. At stride 2 both
    branches see all channels, and the left one is a depthwise and a 1x1 convolution. Then the branches are joined and
    their channels shuffled with two groups. Children and ``state_dict`` keys are those of torchvision's block:
    ``branch1`` and ``branch2``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; an even number.
        stride: 1 or 2, of the depthwise convolutions.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> unit = ShuffleUnitV2(24, 116, stride=2).eval()
        >>> tuple(unit(torch.ones(1, 24, 56, 56)).shape)
        (1, 116, 28, 28)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        in_channels = positive("in_channels", in_channels)
        out_channels = positive("out_channels", out_channels)
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
        if out_channels % 2:
            raise ValueError(f"out_channels: expected an even number, for two branches, got {out_channels}")
        if stride == 1 and in_channels != out_channels:
            raise ValueError(f"out_channels: expected in_channels = {in_channels} at stride 1, got {out_channels}")
        half = out_channels // 2
        left: list[nn.Module] = []
        if stride == 2:
            left = [*_depthwise(in_channels, stride), *_pointwise(in_channels, half)]
        self.branch1 = nn.Sequential(*left)
        self.branch2 = nn.Sequential(
            *_pointwise(in_channels if stride == 2 else half, half), *_depthwise(half, stride), *_pointwise(half, half)
        )
        self.stride = stride
        self.out_channels = out_channels

    def _containers(self) -> tuple[tuple[str, nn.Module], ...]:
        return (("branch1", self.branch1), ("branch2", self.branch2))

    def _units(self) -> tuple[Unit, ...] | str:
        if tuple(self._modules) != ("branch1", "branch2"):
            return "the layer has other children than it was built with"
        units: list[Unit] = []
        for (name, branch), parts in zip(
            self._modules.items(), (_LEFT if self.stride == 2 else (), _RIGHT), strict=True
        ):
            if type(branch) is not nn.Sequential:
                return f"{name} is a {type(branch).__name__}, not an nn.Sequential"
            children = list(branch._modules.values())
            if len(children) != sum(map(len, parts)) or None in children:
                return f"{name} has other children than it was built with"
            for places in parts:
                conv, bn, act = (*(children[place] for place in places), None)[:3]
                units.append(Unit(f"{name}.{places[0]}", conv, bn, act))  # type: ignore[arg-type]
        return tuple(units)

    def _channels(self, units: tuple[Unit, ...]) -> int | None:
        channels = super()._channels(units)
        return channels if channels is None or self.stride == 2 else 2 * channels

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        *left, first, depthwise, last = units
        reason = pointwise_reason(first) or depthwise_reason(depthwise, same=True) or pointwise_reason(last)
        if left:
            reason = reason or depthwise_reason(left[0], same=True) or pointwise_reason(left[1])
        if reason is not None:
            return reason
        activation = first.activation()
        if any(unit.activation() != activation for unit in (*left[1:], last)):
            return "the activations differ"
        for unit in (*left[:1], depthwise):
            conv: Any = unit.conv
            if conv.stride != (self.stride, self.stride):
                return f"{unit.name} has the stride {conv.stride}, the unit {self.stride}"
        eps = (1e-5, 1e-5, *(unit.eps() for unit in units))[-5:]
        return Op("shuffle_unit_v2", (eps, self.stride, activation), first=() if left else ((), ()))

    def _describe(self, builder: Builder, value: int, units: tuple[Unit, ...]) -> int:
        *left, first, depthwise, last = units
        if left:
            other = builder.conv(builder.conv(value, left[0]), left[1])
            result = builder.conv(value, first)
        else:
            half = builder.shapes[value][0] // 2
            result = builder.conv(value, first, first=half, channels=half)
        result = builder.conv(builder.conv(result, depthwise), last)
        if left:
            return builder.interleave(other, result)
        return builder.interleave(value, result, 0, half)

    def _run_children(self, x: Any) -> Any:
        left, right = x.chunk(2, 1) if self.stride == 1 else (self.branch1(x), x)
        return shuffled(torch.cat((left, self.branch2(right)), 1), 2)


def _pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]
