"""Tensors as the compiled loops see them: an address and strides, channels dense."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastblocks.backends.numba_memory import empty_image
from fastblocks.backends.numba_vector import WIDTH

__all__ = ["Map", "address", "empty_map", "output", "read", "read_even", "room", "scratch", "shuffle_order", "whole"]

_RECYCLED = 1 << 22  # floats: larger scratch is not kept
_local = threading.local()


def scratch(slot: str, floats: int) -> Tensor:
    """Memory of this thread, whatever was in it; the same again at the next call for the slot."""
    kept: dict[str, Tensor] = _local.__dict__
    found = kept.get(slot)
    if found is None or found.shape[0] < floats:
        if floats > _RECYCLED:
            return empty_image(1, 1, 1, floats).view(-1)
        found = kept[slot] = torch.empty(max(floats, 16))
    return found


class Map(NamedTuple):
    """An image batch: what an address and strides in floats say, and the tensor that keeps the memory."""

    owner: Tensor
    address: int
    n: int
    h: int
    w: int
    c: int
    image: int
    row: int
    pixel: int

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.n * self.h * self.w

    def matrix(self) -> Tensor:
        """Pixels times channels; the pixels must be evenly spaced."""
        return self.owner.as_strided((self.pixels, self.c), (self.pixel, 1), self.offset())

    def offset(self) -> int:
        """Floats from the beginning of the owner's storage."""
        return int(self.owner.storage_offset()) + (self.address - self.owner.data_ptr()) // 4

    def tensor(self) -> Tensor:
        """The map in torch's order of dimensions."""
        if self.owner.shape == (self.n, self.c, self.h, self.w) and self.owner.data_ptr() == self.address:
            return self.owner
        strides = (self.image, 1, self.row, self.pixel)
        return self.owner.as_strided((self.n, self.c, self.h, self.w), strides, self.offset())

    def rows(self, first: int, last: int) -> Map:
        """Some of the pixels, which are evenly spaced, as one row."""
        return self._replace(address=self.address + 4 * first * self.pixel, n=1, h=1, w=last - first)

    def shaped(self, n: int, h: int, w: int) -> Map:
        """As many evenly spaced pixels in another shape."""
        return self._replace(n=n, h=h, w=w, image=h * w * self.pixel, row=w * self.pixel)

    def images(self, first: int, last: int) -> Map:
        """Some of the images."""
        return self._replace(address=self.address + 4 * first * self.image, n=last - first)

    def slice(self, first: int, channels: int) -> Map:
        """Some of the channels."""
        return self._replace(address=self.address + 4 * first, c=channels)


def whole(owner: Tensor, n: int, h: int, w: int, c: int) -> Map:
    """A dense map in the memory of a tensor."""
    return Map(owner, owner.data_ptr(), n, h, w, c, h * w * c, w * c, c)


def read(x: Tensor) -> Map:
    """A tensor ``(N, C, H, W)`` as a map: its own memory where channels are dense, else a copy."""
    n, c, h, w = x.shape
    image, channel, row, pixel = x.stride()
    if c > 1 and channel != 1:
        x = x.contiguous(memory_format=torch.channels_last)
        image, channel, row, pixel = x.stride()
    return Map(x, x.data_ptr(), n, h, w, c, image, row, pixel)


def read_even(x: Tensor) -> Map:
    """As `read`, with all pixels evenly spaced: a matrix."""
    m = read(x)
    n, h, w, c = m.n, m.h, m.w, m.c
    pixel = m.pixel if w > 1 else m.row if h > 1 else m.image if n > 1 else c
    rows = h < 2 or m.row == w * pixel
    if rows and pixel >= c and (n < 2 or m.image == h * w * pixel):
        return m._replace(image=h * w * pixel, row=w * pixel, pixel=pixel)
    copy = empty_map(n, h, w, c)
    copy.owner.copy_(x)
    return copy


def empty_map(n: int, h: int, w: int, c: int) -> Map:
    """A new dense map, whose owner is a tensor ``(N, C, H, W)``."""
    return whole(empty_image(n, c, h, w), n, h, w, c)


def output(m: Map, channels_last: bool) -> Tensor:
    """A new map as a result, in one of torch's two memory formats."""
    return m.owner if channels_last else torch.empty((m.n, m.c, m.h, m.w)).copy_(m.owner)


@lru_cache(maxsize=256)
def shuffle_order(channels: int, groups: int) -> Tensor:
    """Which channel of the input each channel of a shuffle's output is."""
    return torch.arange(channels).view(groups, channels // groups).t().contiguous().flatten()


def room(channels: int) -> int:
    """Channels with room for a last vector."""
    return (channels + WIDTH - 1) // WIDTH * WIDTH


def address(tensor: Tensor | None) -> int:
    """Of a vector, or 0."""
    return 0 if tensor is None else tensor.data_ptr()
