"""Large tensors of the numba tier, from memory that is used again.

The C allocator gives large blocks back at every free, and each page of the next one is then faulted in anew: a fifth of
a training step. So large maps lie in one reserved range of addresses, whose parts come back here when torch has no use
for them any more, and join.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from bisect import insort
from collections import deque

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty_cache", "empty_image", "stats"]

_LEAST = 1 << 20  # bytes: smaller tensors come from torch
_UNIT = 1 << 12  # bytes: what parts are rounded up to
_FLOOR = 128 << 20
_NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on


class _Hole:
    """A free part: where it begins, its size, and how much of it has memory behind it."""

    __slots__ = ("dirty", "size", "start")

    def __init__(self, start: int, size: int, dirty: int) -> None:
        self.start, self.size, self.dirty = start, size, dirty

    def __lt__(self, other: _Hole) -> bool:
        return self.start < other.start


def _reserve() -> mmap.mmap | None:
    """A range of addresses without memory behind it; None where there is none to have."""
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    while size >= _FLOOR:
        try:
            found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except (OSError, ValueError):
            size //= 2
            continue
        with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
            found.madvise(mmap.MADV_HUGEPAGE)
        return found
    return None


class _Arena:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        # A part may come back while this thread is in here: then no lock can be taken, only something appended.
        self.returned: deque[tuple[int, int]] = deque()
        self.active = self.peak = self.hits = self.misses = 0
        self.memory = _reserve()
        self.holes: list[_Hole] = []
        if self.memory is not None:
            self.bytes = np.frombuffer(self.memory, np.uint8)
            self.holes.append(_Hole(0, len(self.memory), 0))

    def dirty(self) -> int:
        """Bytes that are free and have memory behind them."""
        return sum(hole.dirty for hole in self.holes)

    def limit(self) -> int:
        """Bytes that may be held, in use or not."""
        return max(_FLOOR, self.peak * 9 // 8)

    def settle(self) -> None:
        """Take in what came back; give the system what is beyond the limit."""
        if not self.returned:
            return
        while self.returned:
            start, size = self.returned.popleft()
            self.active -= size
            insort(self.holes, _Hole(start, size, size))
        joined = [self.holes[0]]
        for hole in self.holes[1:]:
            last = joined[-1]
            if last.start + last.size == hole.start:
                last.size += hole.size
                last.dirty += hole.dirty
            else:
                joined.append(hole)
        self.holes = joined
        while self.active + self.dirty() > self.limit():
            self.drop(max(self.holes, key=lambda hole: hole.dirty))

    def drop(self, hole: _Hole) -> None:
        """Give the memory behind a free part back to the system."""
        assert self.memory is not None
        self.memory.madvise(mmap.MADV_DONTNEED, hole.start, hole.size)
        hole.dirty = 0

    def take(self, size: int) -> int | None:
        """Where a part of so many bytes begins, in the smallest hole that has room; None where none has."""
        with self.lock:
            self.settle()
            fitting = [hole for hole in self.holes if hole.size >= size]
            if not fitting:
                return None
            hole = min(fitting, key=lambda hole: hole.size)
            start = hole.start
            if hole.dirty >= size:
                self.hits += 1
            else:
                self.misses += 1
            hole.start += size
            hole.size -= size
            hole.dirty = max(0, hole.dirty - size)
            if not hole.size:
                self.holes.remove(hole)
            self.active += size
            self.peak = max(self.peak, self.active)
            return start


_arena = _Arena()


def _after_fork() -> None:
    # another thread of the parent may have held it
    _arena.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def empty_image(n: int, c: int, h: int, w: int) -> Tensor:
    """A tensor ``(N, C, H, W)`` in channels_last, whatever was in its memory."""
    size = 4 * n * c * h * w
    rounded = (size + _UNIT - 1) // _UNIT * _UNIT
    start = _arena.take(rounded) if size >= _LEAST else None
    if start is None:
        return torch.empty((n, c, h, w), memory_format=torch.channels_last)
    strides = (4 * h * w * c, 4, 4 * w * c, 4 * c)
    array: np.ndarray = np.ndarray((n, c, h, w), np.float32, _arena.bytes, start, strides)
    # torch keeps the array for as long as it uses the memory
    weakref.finalize(array, _arena.returned.append, (start, rounded)).atexit = False
    return torch.from_numpy(array)


def stats() -> dict[str, int]:
    """Bytes in use and kept, as `fastblocks.memory_stats` has them."""
    with _arena.lock:
        _arena.settle()
        return {
            "active_bytes": _arena.active,
            "peak_active_bytes": _arena.peak,
            "cached_bytes": _arena.dirty(),
            "limit_bytes": _arena.limit(),
            "hits": _arena.hits,
            "misses": _arena.misses,
        }


def empty_cache() -> None:
    """Give back what nothing uses."""
    with _arena.lock:
        _arena.settle()
        for hole in _arena.holes:
            if hole.dirty:
                _arena.drop(hole)
        _arena.peak = _arena.active
