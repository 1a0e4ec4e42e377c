"""What the two halves of a training step share: the values of a chain, and passes over their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastblocks.backends.numba_maps import Map, address, read, read_even, room, scratch, whole
from fastblocks.backends.numba_norm import ROWS, join, moments, norm_forward
from fastblocks.backends.numba_passes import CLAMPS, FREE, Pair, step_of
from fastblocks.backends.numba_pool import bits, run, threads
from fastblocks.backends.program import ACTIVATIONS, Kind, Node

__all__ = ["Chain", "Moments", "Part", "chunks", "clamps_of", "image_chunks", "join_parts", "part", "pass_of"]

CHUNK = 1 << 20
"""Floats of the largest tensor of a chunk of pixels, on which several passes are made while it is in cache."""

PARTS = 8
"""Items of a chunk with sums: few, for all parts are added up."""

_CHANNELS = 64
_BY_NUMBER = {number: CLAMPS[name] for name, number in ACTIVATIONS.items()}


def clamps_of(node: Node) -> Pair:
    """The bounds of a node's activation."""
    return _BY_NUMBER[node.activation]


def chunks(pixels: int, channels: int) -> Iterator[tuple[int, int]]:
    """Ranges of pixels; the shape alone decides."""
    size = max(64, CHUNK // channels)
    count = max(1, round(pixels / size))
    for i in range(count):
        yield pixels * i // count, pixels * (i + 1) // count


def image_chunks(images: int, floats: int) -> Iterator[tuple[int, int]]:
    """Ranges of images of so many floats each."""
    size = max(1, CHUNK // max(floats, 1))
    for first in range(0, images, size):
        yield first, min(images, first + size)


def pass_of(pixels: int, channels: int, *, sums: bool = False) -> tuple[int, int]:
    """Items of a pass over pixels, and pixels an item."""
    step = max(step_of(channels), -(-pixels // PARTS)) if sums else step_of(channels)
    return -(-pixels // step), step


Reading = tuple[int, int, int]
"""Constants of a BatchNorm (0: none), and the bounds of the activation behind it."""

PLAIN: Reading = (0, *FREE)


class Part(NamedTuple):
    """Some pixels of a map with evenly spaced ones."""

    address: int
    stride: int
    channels: int
    pixels: int


def part(m: Map, first: int = 0, last: int = -1) -> Part:
    """The pixels from first to last, or all."""
    last = m.pixels if last < 0 else last
    return Part(m.address + 4 * first * m.pixel, m.pixel, m.c, last - first)


class Chain:
    """The values of a program, as far as they are there."""

    def __init__(self, program: Sequence[Node], x: Tensor, weights: Sequence[Tensor]) -> None:
        self.program = program
        self.values: list[Map | None] = [read_even(x) if self._even(0) else read(x)]
        self.weights = weights
        self.convs: list[int] = []
        """Which convolution a node is, -1 for none."""
        count = 0
        for node in program:
            self.convs.append(count if node.kind <= Kind.DENSE else -1)
            count += node.kind <= Kind.DENSE
        self.norm_at = [0]
        for weight in weights:
            self.norm_at.append(self.norm_at[-1] + ROWS * room(weight.shape[0]))
        self.norms: Tensor = torch.empty(0)

    def _even(self, value: int) -> bool:
        """Whether a node reads pixels of a value and not rows."""
        return any(value in (n.input, n.other) and n.kind != Kind.DEPTHWISE for n in self.program)

    def value(self, value: int) -> Map:
        """A value that is there."""
        found = self.values[value]
        assert found is not None
        return found

    def conv_of(self, value: int) -> int:
        """Which convolution made a value; -1 for none."""
        return self.convs[value - 1] if value else -1

    def norm(self, value: int) -> int:
        """The constants of the BatchNorm that a value stands for, or 0."""
        conv = self.conv_of(value)
        return 0 if conv < 0 else self.norms.data_ptr() + 4 * self.norm_at[conv]

    def clamps(self, value: int) -> Pair:
        """The bounds within which a value is read."""
        return clamps_of(self.program[value - 1]) if self.norm(value) else FREE

    def line(self, value: int) -> int:
        """Floats of a row of a value's constants."""
        return room(self.value(value).c)

    def normed(self, value: int) -> dict[str, Pair | int]:
        """How a depthwise convolution reads a value."""
        norm = self.norm(value)
        if not norm:
            return {}
        line = 4 * self.line(value)
        clamps = self.clamps(value)
        return {"normed": (norm + line, norm + 2 * line), "center": norm, "in_clamps": clamps}

    def reading(self, value: int) -> Reading:
        """The constants and bounds with which a value is read."""
        low, high = self.clamps(value)
        return self.norm(value), low, high

    def activated(
        self, value: int, first: int = 0, last: int = -1, channels: Pair | None = None, slot: str = "a"
    ) -> Map:
        """Pixels of a value, in one row, as the next convolution sees them: in place, or in scratch."""
        m = self.value(value)
        last = m.pixels if last < 0 else last
        to = m.rows(first, last)
        if self.norm(value):
            to = whole(scratch(slot, (last - first) * m.c), 1, 1, last - first, m.c)
            join_parts(part(m, first, last), self.reading(value), part(to))
        return to if channels is None else to.slice(*channels)


def join_parts(
    a: Part, reading: Reading, to: Part, b: Part | None = None, other: Reading = PLAIN, clamps: Pair = FREE,
    turns: bool = False,
) -> None:  # fmt: skip
    """Read one or two values, and write their sum, or their channels by turns."""
    items, step = pass_of(a.pixels, a.channels)
    slices = min(threads(), items)
    memory = scratch("pixels", slices * 4 * room(a.channels)).data_ptr() if turns else 0
    second = (0, 0) if b is None else (b.address, b.stride)
    run(
        join, items, a.pixels, step, a.channels, a.address, a.stride, *reading, *second, *other, to.address, to.stride,
        *clamps, int(turns), memory, slices=slices,
    )  # fmt: skip


class Moments:
    """The statistics of a convolution's output, gathered part by part."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, z: Part) -> None:
        """The statistics of some pixels."""
        items, step = pass_of(z.pixels, z.channels, sums=True)
        out = torch.empty((items, 1 + 2 * z.channels), dtype=torch.float64)
        slices = min(threads(), items)
        memory = scratch("lines", slices * 3 * room(z.channels)).data_ptr()
        run(moments, items, z.pixels, step, z.channels, z.address, z.stride, out.data_ptr(), memory, slices=slices)
        self.parts.append(out)

    def finish(
        self, node: Node, channels: int, count: int, affine: Sequence[Tensor | None], running: Sequence[Tensor | None],
        momentum: float, norm: int,
    ) -> None:  # fmt: skip
        """The constants of the BatchNorm, and the running statistics."""
        parts = torch.cat(self.parts) if self.parts else torch.empty((0, 1))
        update = node.update and not node.frozen and running[0] is not None
        run(
            norm_forward, -(-channels // _CHANNELS), channels, count, 0 if node.frozen else parts.shape[0],
            parts.data_ptr(), *map(address, affine), *map(address, running), int(update), bits(momentum),
            bits(node.eps), norm,
        )  # fmt: skip
