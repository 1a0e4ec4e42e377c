"""The roofline (Williams, Waterman and Patterson 2009): what a machine's arithmetic and memory allow at most."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Bound", "attainable", "bound"]


class Bound(NamedTuple):
    """The least time of some work, and what sets it."""

    seconds: float
    by: str
    """"arithmetic" or "memory"."""


def attainable(intensity: float, gflops: float, gbps: float) -> float:
    """The speed in GFLOP/s that work of this intensity can reach.

    Args:
        intensity: operations a byte.
        gflops: the machine's peak in 1e9 operations a second.
        gbps: its memory bandwidth in 1e9 bytes a second.

    Example:
        >>> attainable(2.0, 100.0, 10.0), attainable(50.0, 100.0, 10.0)
        (20.0, 100.0)
    """
    return min(gflops, intensity * gbps)


def bound(multiply_adds: int, moved: int, gflops: float, gbps: float) -> Bound:
    """The least time for these multiply-adds, two operations each, and bytes: the roofline read as a time.

    It holds for work without arithmetic, too. Divided by a measured time it is the share of the roofline.

    Example:
        >>> bound(10**9, 10**6, 100.0, 10.0)
        Bound(seconds=0.02, by='arithmetic')
        >>> bound(0, 10**9, 100.0, 10.0)
        Bound(seconds=0.1, by='memory')
    """
    arithmetic, memory = 2 * multiply_adds / (1e9 * gflops), moved / (1e9 * gbps)
    return Bound(max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory")
