"""Fair timing of a few functions on a machine that is never quite idle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved", "speed_up"]

WARM_UP = 3


def interleaved(runners: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each runner in each round.

    Rounds go A B C A B C, so that a slow spell of the machine falls on everybody; each turn starts with an untimed
    call, so that nobody pays for the caches his predecessor has filled.
    """
    for run in runners.values():
        for _ in range(WARM_UP):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed_up(slow: list[float], fast: list[float]) -> float:
    """How many times faster `fast` is: the median over rounds of the ratio within a round.

    >>> speed_up([2.0, 2.0, 9.0], [1.0, 1.0, 1.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
