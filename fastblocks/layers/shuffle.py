"""Channel shuffles: between two group convolutions (ShuffleNet), and with the split that follows (ShuffleNetV2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastblocks import functional
from fastblocks.functional.arguments import divisor
from fastblocks.layers.base import Fused, Op
from fastblocks.layers.conv import positive
from fastblocks.layers.fuse import Unit, input_reason


class ChannelShuffle(Fused, nn.ChannelShuffle):
    """Mix the channels of groups (Zhang et al. 2017, section 3.1), by the op where it may be.

    The channels are taken as ``groups`` rows, and read by columns: ``(groups, C / groups)``, transposed, flattened. The
    other convention, ``(C / groups, groups)``, is the inverse permutation: a shuffle with ``C / groups`` groups.

    Args:
        groups: how many groups the input's channels have.

    Shape:
        ``(N, C, H, W)`` to the same, C divisible by `groups`.

    Raises:
        ValueError, TypeError: `groups` is no positive int, or does not divide the channels.

    Example:
        >>> import torch
        >>> ChannelShuffle(2)(torch.arange(6.0).view(1, 6, 1, 1)).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """

    def __init__(self, groups: int) -> None:
        super().__init__(positive("groups", groups))

    def _units(self) -> tuple[Unit, ...]:
        return ()

    def _shape_reason(self, x: Tensor, units: tuple[Unit, ...]) -> str | None:
        return None if x.dim() == 4 else f"the input has {x.dim()} dimensions"

    def _op(self, units: tuple[Unit, ...]) -> Op:
        return Op("channel_shuffle", (self.groups,))

    def _run_children(self, x: Any) -> Any:
        return nn.ChannelShuffle.forward(self, x)

    def _refuse(self, x: Any) -> None:
        if _has_channels(x):
            divisor("groups", self.groups, x.shape[1], "the input's channels")


class ChannelShuffleSplit(Fused):
    """`ChannelShuffle` and the split into two halves behind it, by one op where it may be.

    What stands between two units of ShuffleNetV2 (Ma et al. 2018, section 4): the shuffle that ends the one, the split
    that begins the other. The halves are tensors of their own, not views.

    Args:
        groups: how many groups the input's channels have.

    Shape:
        ``(N, C, H, W)`` to two of ``(N, C / 2, H, W)``, C even and divisible by `groups`.

    Raises:
        ValueError, TypeError: `groups` is no positive int, or the channels do not fit.

    Example:
        >>> import torch
        >>> left, right = ChannelShuffleSplit()(torch.arange(4.0).view(1, 4, 1, 1))
        >>> left.flatten().tolist(), right.flatten().tolist()
        ([0.0, 2.0], [1.0, 3.0])
    """

    groups: int

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = positive("groups", groups)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"groups={self.groups}"

    def _units(self) -> tuple[Unit, ...]:
        return ()

    def _op(self, units: tuple[Unit, ...]) -> Op:
        return Op("channel_shuffle_split", (self.groups,))

    def _run_children(self, x: Any) -> Any:
        left, right = torch.channel_shuffle(x, self.groups).chunk(2, 1)
        return left, right

    def _shape_reason(self, x: Tensor, units: tuple[Unit, ...]) -> str | None:
        return None if x.dim() == 4 else f"the input has {x.dim()} dimensions"

    def _refuse(self, x: Any) -> None:
        if _has_channels(x):
            divisor("groups", self.groups, x.shape[1], "the input's channels")
            if x.shape[1] % 2:
                raise ValueError(f"input: expected an even number of channels to split, got {x.shape[1]}")


def _has_channels(x: Any) -> bool:
    """Whether this is a tensor of which the channels can be counted, which tracers' stand-ins cannot."""
    return isinstance(x, Tensor) and x.dim() > 1 and not torch.jit.is_tracing()


def shuffled(x: Any, groups: int) -> Any:
    """The shuffle as a function: the op where torch would notice no difference."""
    if is_compiling() or input_reason(x) is not None or x.dim() != 4:
        return torch.channel_shuffle(x, groups)
    return functional.channel_shuffle(x, groups)
