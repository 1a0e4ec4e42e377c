"""The profile's table as text: the same columns in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastblocks.bench.profile.timing import FUSED
from fastblocks.bench.words import counted, digits

__all__ = [
    "Column",
    "advice_blocks",
    "columns",
    "count_columns",
    "headline",
    "milliseconds",
    "network_times",
    "notes",
    "time_columns",
]

NAMED = 3  # blocks of an advice that are named

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column: its heading in two parts, a cell for each block, the total's, and whether it can be spared."""

    heading: str
    unit: str
    cells: Sequence[str]
    total: str
    spare: int = 0
    """In a narrow place the columns with the highest number go first; 0 stays."""


def columns(result: Row) -> list[Column]:
    """All columns of a profile, the blocks' names first."""
    return [*count_columns(result), *time_columns(result)]


def count_columns(result: Row) -> list[Column]:
    """The blocks' names, and what was counted."""
    return [
        Column("", "block", [row["name"] for row in result["blocks"]], "total"),
        _column(result, "mult-", "adds M", lambda row: f"{row['multiply_adds'] / 1e6:.2f}"),
        _column(result, "params", "k", lambda row: f"{row['parameters'] / 1e3:.1f}", 5),
        _column(result, "moved", "MB", lambda row: f"{row['moved'] / 1e6:.2f}", 2),
        _column(result, "least", "MB", lambda row: f"{row['least'] / 1e6:.2f}", 7),
        _column(result, "flop/B", "moved", lambda row: f"{row['intensity']:.1f}"),
        _column(result, "flop/B", "least", lambda row: f"{row['fused_intensity']:.1f}", 6),
        _column(result, "peak", "MB", lambda row: f"{row['peak'] / 1e6:.2f}", 4),
    ]


def time_columns(result: Row) -> list[Column]:
    """What was measured; nothing if nothing was."""
    if result["network"] is None:
        return []
    best, fused = result["network"]["best"], FUSED in result["network"]["seconds"]
    places = 2 if result["network"]["seconds"][best] >= 0.1 else 3

    def time(side: str) -> Callable[[Row], str]:
        return lambda row: _known(row, side, lambda seconds: f"{1e3 * seconds:.{places}f}")

    def share(side: str) -> Callable[[Row], str]:
        return lambda row: _known(row, side, lambda seconds: f"{100 * row['roofline_seconds'] / seconds:.0f}")

    if not fused:
        return [_column(result, "ms", "torch", time(best)), _column(result, "roof %", "torch", share(best))]
    return [
        _column(result, "ms", "torch", time(best)),
        _column(result, "ms", FUSED, time(FUSED)),
        _column(result, "times", "faster", lambda row: _known(row, FUSED, lambda s: f"{row['seconds'][best] / s:.1f}")),
        _column(result, "roof %", "torch", share(best), 3),
        _column(result, "roof %", "ours", share(FUSED)),
    ]


def _column(result: Row, heading: str, unit: str, cell: Callable[[Row], str], spare: int = 0) -> Column:
    return Column(heading, unit, [cell(row) for row in result["blocks"]], cell(result["total"]), spare)


def _known(row: Row, side: str, shown: Callable[[float], str]) -> str:
    """A cell made of a measured time, "-" where there is none."""
    seconds = row.get("seconds", {}).get(side)
    return shown(seconds) if seconds else "-"


def milliseconds(seconds: float) -> str:
    """A time with three digits.

    Example:
        >>> milliseconds(0.0123456), milliseconds(1.23456)
        ('12.3 ms', '1,235 ms')
    """
    return f"{digits(1e3 * seconds)} ms"


def headline(result: Row) -> str:
    """What was profiled, in a line."""
    batch, channels, height, width = result["input"]
    threads = counted(result["threads"], "thread")
    return f"{result['class']} of {result['source']}, input {batch} x {channels} x {height} x {width}, {threads}"


def network_times(result: Row) -> list[tuple[str, float, float | None]]:
    """The whole network's times: who, seconds, and how many times faster fastblocks is (None for itself)."""
    seconds = result["network"]["seconds"]
    ours = seconds.get(FUSED)
    return [(name, s, s / ours if ours and name != FUSED else None) for name, s in seconds.items()]


def advice_blocks(advice: Row) -> str:
    """The blocks that an advice concerns, the most expensive ones by name."""
    named = [f"{block} ({example})" for block, example in zip(advice["blocks"], advice["examples"], strict=True)]
    more = len(named) - NAMED
    return ", ".join(named[:NAMED]) + (f" and {more} more" if more > 0 else "")


def notes(result: Row) -> list[str]:
    """How to read the table, and what could not be done."""
    found = [
        "moved: what plain torch's operators read and write, weights included; least: the block's input, output and "
        "weights, each once. flop/B: two operations a multiply-add. peak: most activations in memory while it runs."
    ]
    network = result["network"]
    if network is not None:
        limits, shown = result["limits"], [name for name in (network["best"], FUSED) if name in network["seconds"]]
        found.append(
            f"The column torch is {network['best']}, the faster layout. roof: share of what the machine allows "
            f"with the least memory access: {limits['gflops']:.0f} GFLOP/s ({limits['how']}) and {limits['gbps']:.0f} "
            "GB/s in this run. Above 100 the data come from a cache, or the machine was busy when that was measured."
        )
        sums = {name: sum(row.get("seconds", {}).get(name, 0.0) for row in result["blocks"]) for name in shown}
        parts = " and ".join(f"{milliseconds(seconds)} ({name})" for name, seconds in sums.items())
        found.append(
            f"Each block ran by itself, on the input that it has in the network; they sum to {parts}. The total's time "
            f"is the whole network's. Medians of {counted(result['rounds'], 'interleaved round')}."
        )
    found += [
        f"{row['name']} does not run by itself ({row['why_not_timed']})."
        for row in result["blocks"]
        if "why_not_timed" in row
    ]
    if result["fastblocks"] == "none":
        found.append("There is no fastblocks counterpart for this model yet.")
    if result["uncounted"]:
        found.append(f"No multiply-adds are known for {', '.join(result['uncounted'])}: they count as 0.")
    return found
