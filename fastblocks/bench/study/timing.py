"""Torch beside fastblocks, row by row, where each row is a small network or layer."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastblocks.bench.errors import BenchError
from fastblocks.bench.timing import AGREEMENT, difference, interleaved, quartiles, speed_up

__all__ = ["Pair", "busy", "compare", "rounds_for", "spread", "timed"]

BUSY = 0.4  # of the median, between the quartiles
FEWEST, MOST = 3, 2000  # rounds
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

Run = Callable[[], object]


class Pair(NamedTuple):
    """The same function in plain torch and of fastblocks' layers, and the input of both."""

    plain: nn.Module
    ours: nn.Module
    x: Tensor


def rounds_for(runners: Sequence[Run], seconds: float) -> int:
    """How many rounds of `interleaved` fit into so many seconds; each round calls each runner twice."""
    for run in runners:
        run()
    start = time.perf_counter()
    for run in runners:
        run()
    return min(MOST, max(FEWEST, int(seconds / (2 * (time.perf_counter() - start)))))


def spread(found: Sequence[float]) -> float:
    """How far quartiles lie apart, as a share of the median.

    Example:
        >>> spread([0.9, 1.0, 1.1]) < 0.21
        True
    """
    low, median, high = found
    return (high - low) / median


def busy(spreads: Sequence[float]) -> str:
    """Words for rows that scatter as they do on a machine that does something else as well; none if they do not."""
    count = sum(value > BUSY for value in spreads)
    return f"; the machine was busy: {count} of {len(spreads)} rows scatter too much to be trusted" if count else ""


def timed(pairs: Mapping[str, Pair], seconds: float) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Seconds a call for each row, of "torch" and of "fastblocks", in interleaved rounds; and torch's layout.

    Torch runs eagerly, in channels_last and in contiguous tensors, and the faster of the two counts.

    Raises:
        BenchError: the outputs of a row do not agree.
    """
    runners: dict[str, Run] = {}
    for name, (plain, ours, x) in pairs.items():
        plain.eval(), ours.eval()
        with torch.no_grad():
            expected, found = plain(x), ours(x)
        off = difference(found, expected)
        if not off <= AGREEMENT:
            raise BenchError(f"{name}: fastblocks and torch differ by {off:.1e} of the largest output")
        for layout, memory_format in LAYOUTS.items():
            moved = copy.deepcopy(plain).to(memory_format=memory_format)
            runners[f"{name}\t{layout}"] = partial(moved, x.contiguous(memory_format=memory_format))
        ours.to(memory_format=torch.channels_last)
        runners[f"{name}\tfastblocks"] = partial(ours, x.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        all_times = interleaved(runners, rounds_for(list(runners.values()), seconds * len(pairs)))
    times: dict[str, dict[str, list[float]]] = {}
    layouts: dict[str, str] = {}
    for name in pairs:
        layouts[name] = min(LAYOUTS, key=lambda layout: statistics.median(all_times[f"{name}\t{layout}"]))
        torchs, ours_ = all_times[f"{name}\t{layouts[name]}"], all_times[f"{name}\tfastblocks"]
        times[name] = {"torch": torchs, "fastblocks": ours_}
    return times, layouts


def compare(pairs: Mapping[str, Pair], cost: Mapping[str, int], base: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Time rows at (nearly) equal cost.

    Args:
        pairs: what to run, by the row's name.
        cost: multiply-adds of each row.
        base: the row that the others are compared with.
        seconds: to spend on a row.

    Returns:
        For each row and for "torch" and "fastblocks": quartiles of the seconds a call, and of ``slower``: how many
        times longer a multiply-add takes than in the base row, in the same round. Beside them torch's layout, and the
        median over rounds of fastblocks' speed-up.
    """
    times, layouts = timed(pairs, seconds)
    result: dict[str, dict[str, Any]] = {}
    for name, each in times.items():
        row: dict[str, Any] = {"multiply_adds": cost[name], "layout": layouts[name]}
        for who, values in each.items():
            scale = cost[base] / cost[name]
            slower = [scale * a / b for a, b in zip(values, times[base][who], strict=True)]
            row[who] = {"seconds": quartiles(values), "slower": quartiles(slower)}
        row["speed_up"] = round(speed_up(each["torch"], each["fastblocks"]), 3)
        row["rounds"] = len(each["torch"])
        result[name] = row
    return result
