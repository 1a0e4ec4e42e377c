"""Fair timing of a few functions on a machine that is never quite idle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["AGREEMENT", "difference", "interleaved", "quartiles", "speed_up"]

AGREEMENT = 1e-4
"""Of the largest value: ten times what another order of float32 sums makes."""

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


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile, with six digits.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0]), quartiles([7.0])
        ([2.0, 3.0, 4.0], [7.0, 7.0, 7.0])
    """
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    return [float(f"{value:.6g}") for value in found]


def difference(found: Tensor, expected: Tensor) -> float:
    """How far two tensors lie apart at most, as a share of the largest expected value.

    Example:
        >>> difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, -4.0])), difference(torch.zeros(2), torch.zeros(2))
        (1.75, 0.0)
    """
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)
