"""The compiled loops as functions on maps, and torch's products between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.backends.numba_depthwise import depthwise
from fastblocks.backends.numba_kernels import finish, fold, pack_taps, permute, pool
from fastblocks.backends.numba_maps import Map, address, room, scratch, shuffle_order
from fastblocks.backends.numba_pool import bits, run, run_alone, threads
from fastblocks.backends.numba_vector import WIDTH

__all__ = [
    "CLAMPS",
    "FREE",
    "Folded",
    "bands_of",
    "ring_floats",
    "run_depthwise",
    "run_finish",
    "run_permute",
    "run_pool",
    "run_product",
    "spatial",
    "step_of",
]

Conv = Sequence[Tensor | None]
Pair = Sequence[int]

ITEM = 1 << 14
"""Floats of an item of a loop over pixels."""

_BOUNDS = {None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
CLAMPS = {name: (bits(low), bits(high)) for name, (low, high) in _BOUNDS.items()}
FREE = CLAMPS[None]
_ONE = (1, 1)


class Folded:
    """Scales and shifts of some convolutions, computed at once."""

    def __init__(self, convs: Sequence[Conv], eps: Sequence[float], slot: str = "folded") -> None:
        self.rooms = [room(conv[0].shape[0]) for conv in convs]  # type: ignore[union-attr]
        self.memory = scratch(slot, 2 * sum(self.rooms))
        at = self.memory.data_ptr()
        words: list[int] = []
        self.scales: list[int] = []
        for conv, e, size in zip(convs, eps, self.rooms, strict=True):
            weight, *vectors = conv
            words += [weight.shape[0], *map(address, vectors), bits(e), at]  # type: ignore[union-attr]
            self.scales.append(at)
            at += 8 * size
        run_alone(fold, len(convs), *words)

    def scale(self, index: int) -> int:
        """Where the scale of a convolution is."""
        return self.scales[index]

    def shift(self, index: int) -> int:
        """Where its shift is."""
        return self.scales[index] + 4 * self.rooms[index]


def step_of(channels: int) -> int:
    return max(1, ITEM // max(channels, 1))


def run_finish(
    z: Map, scale: int, shift: int, activation: str | None, to: Map, residual: Map | None = None, shuffle: int = 1
) -> None:
    step = step_of(z.c)
    items = -(-z.pixels // step)
    slices = min(threads(), items)
    order = memory = 0
    if shuffle > 1:
        order = shuffle_order(z.c, shuffle).data_ptr()
        memory = scratch("pixels", slices * room(z.c)).data_ptr()
    added = (0, 0) if residual is None else (residual.address, residual.pixel)
    clamps = CLAMPS[activation]
    run(
        finish, items, z.pixels, step, z.c, z.address, z.pixel, scale, shift, *added, to.address, to.pixel, *clamps,
        order, memory, slices=slices,
    )  # fmt: skip


def run_product(x: Map, weight: Tensor, groups: int, to: Map) -> None:
    """1x1 convolution without anything around it."""
    out, fan = weight.shape[:2]
    w = weight.as_strided((out, fan), weight.stride()[:2])
    a, z = x.matrix(), to.matrix()
    if groups == 1:
        torch.mm(a, w.t(), out=z)
        return
    p = x.pixels
    a = a.as_strided((groups, p, fan), (fan, x.pixel, 1))
    w = weight.as_strided(
        (groups, fan, out // groups), (out // groups * weight.stride(0), weight.stride(1), weight.stride(0))
    )
    torch.bmm(a, w, out=z.as_strided((groups, p, out // groups), (out // groups, to.pixel, 1)))


def spatial(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def bands_of(images: int, rows: int) -> int:
    """Parts of an image; the shape alone decides."""
    return max(1, min(rows // 7, -(-8 // images)))


def ring_floats(width: int, channels: int, kernel: Pair, padding: Pair, dilation: Pair, least: int = 0) -> int:
    """Scratch of one slice of a depthwise convolution: rows as wide as the padded input, or as `least`, and a pixel."""
    line = room(channels)
    return ((kernel[0] - 1) * dilation[0] + 1) * max(width + 2 * padding[1], least) * line + line


def run_depthwise(
    x: Map, weight: Tensor, to: Map, stride: Pair, padding: Pair, dilation: Pair, *, scale: int = 0, start: int = 0,
    clamps: Pair = FREE, normed: Pair = (0, 0), in_clamps: Pair = FREE, order: int = 0, center: int = 0,
    gradient: Pair = (0,) * 5, spread: Pair = _ONE, flipped: bool = False,
) -> None:  # fmt: skip
    """Depthwise convolution from map to map.

    `scale` goes into the taps, `normed` are scale and shift of the input. With `gradient` (z's address and strides, and
    factors) the input is a gradient, and what is convolved is dz.
    """
    kernel = weight.shape[2:]
    taps = scratch("taps", kernel[0] * kernel[1] * room(x.c))
    rows, columns = weight.stride(2), weight.stride(3)
    at = weight.data_ptr()
    if flipped:
        at += 4 * ((kernel[0] - 1) * rows + (kernel[1] - 1) * columns)
        rows, columns = -rows, -columns
    run_alone(
        pack_taps, kernel[0] * kernel[1], at, weight.stride(0), rows, columns, kernel[1], x.c, scale, taps.data_ptr()
    )
    bands = bands_of(x.n, to.h)
    items = x.n * bands
    slices = min(threads(), items)
    reach = (to.w - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1
    floats = ring_floats((x.w - 1) * spread[1] + 1, x.c, kernel, padding, dilation, reach)
    memory = scratch("ring", slices * floats)
    run(
        depthwise, items, x.address, x.image, x.row, x.pixel, x.h, x.w, x.c, to.address, to.image, to.row, to.pixel,
        to.h, to.w, *kernel, *stride, *padding, *dilation, bands, taps.data_ptr(), start, *normed, *in_clamps, order,
        *clamps, memory.data_ptr(), floats, center, *gradient, *spread, slices=slices,
    )  # fmt: skip


def run_permute(inputs: Sequence[Map], outputs: Sequence[Map], groups: int) -> None:
    """Shuffle the channels of one or two maps together, to one or two maps."""
    channels = sum(m.c for m in inputs)
    step = step_of(channels)
    items = -(-inputs[0].pixels // step)
    slices = min(threads(), items)
    memory = scratch("pixels", slices * 2 * (room(channels) + 2 * WIDTH))
    none = (0, 0, 0)
    a, b = [(m.address, m.pixel, m.c) for m in inputs] + [none] * (2 - len(inputs))
    y, w = [(m.address, m.pixel, m.c) for m in outputs] + [none] * (2 - len(outputs))
    order = 0 if groups == 2 else shuffle_order(channels, groups).data_ptr()
    pixels = inputs[0].pixels
    run(permute, items, pixels, step, *a, *b, order, *y, *w, memory.data_ptr(), slices=slices)


def run_pool(x: Map, to: Map, largest: bool, kernel: Pair, stride: Pair, padding: Pair) -> None:
    """A pooling from map to map."""
    run(
        pool, x.n * to.h, int(largest), x.address, x.image, x.row, x.pixel, x.h, x.w, x.c, to.address, to.image, to.row,
        to.pixel, to.h, to.w, *kernel, *stride, *padding,
    )  # fmt: skip
