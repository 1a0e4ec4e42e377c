"""What a chain of layers does in training, as data that every tier reads.

A program is a tuple of nodes. Value 0 is the chain's input, value ``i + 1`` the output of node ``i``. A convolution's
value stands for the convolution with the BatchNorm and the activation behind it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Kind(enum.IntEnum):
    """What a node does. The extension has the same numbers."""

    POINTWISE = 0
    DEPTHWISE = 1
    DENSE = 2
    ADD = 3
    POOL_CAT = 4
    INTERLEAVE = 5
    MAX_POOL = 6
    ACTIVATE = 7
    MEAN = 8


ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "relu6": 2}


class Node(NamedTuple):
    """One step of a chain."""

    kind: Kind
    input: int
    first: int = 0
    """The first channel that is read."""
    channels: int = -1
    """How many; -1 for all."""
    other: int = -1
    """A join's second value."""
    groups: int = 1
    shuffle: int = 1
    """Groups of the channel shuffle in front of a depthwise convolution."""
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    kernel: Pair = (1, 1)
    activation: int = 0
    frozen: bool = False
    """The BatchNorm uses its running statistics."""
    update: bool = False
    """The BatchNorm updates its running statistics."""
    eps: float = 0.0

    def flat(self) -> tuple[int | float, ...]:
        """For the extension."""
        pairs = (*self.stride, *self.padding, *self.dilation, *self.kernel)
        head = (int(self.kind), self.input, self.first, self.channels, self.other, self.groups, self.shuffle)
        return (*head, *pairs, self.activation, int(self.frozen), int(self.update), self.eps)


Program = tuple[Node, ...]


class Tensors(NamedTuple):
    """The tensors of a program's convolutions, in their order."""

    weights: Sequence[Tensor]
    affine: Sequence[Tensor | None]
    """BatchNorm's weight and bias, one pair a convolution."""
    running: Sequence[Tensor | None]
    """Running mean and variance, one pair a convolution."""
    momenta: Sequence[float]


def makes_conv(program: Program, value: int) -> bool:
    """Whether a value is a convolution's."""
    return value > 0 and program[value - 1].kind <= Kind.DENSE


def output_is_saved(program: Program) -> bool:
    """Whether the backward half reads the chain's output."""
    return bool(program[-1].kind == Kind.ADD and program[-1].activation)
