"""What pytest shows after pytest-benchmark's tables: how fastblocks fares in each group.

A plugin, which the modules of benchmarks name, and no conftest.py: tests/ imports its own by that name. As its doctest
may have been collected before it is a plugin: PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Sequence
from typing import NamedTuple

import pytest
from contenders import TORCH
from rich.table import Table
from rows import Row
from training import slim_table, wide_console

import fastblocks
from fastblocks.bench.words import digits

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """What was measured in this session. A plain `pytest` times nothing."""
    option = request.config.getoption
    if not (option("benchmark_only") or option("benchmark_enable")):
        pytest.skip("benchmarks run with --benchmark-only")
    return request.config.stash.setdefault(ROWS, [])


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    """Also if pytest-benchmark finds a regression, for which it raises."""
    try:
        return (yield)
    finally:
        measured: list[Row] = config.stash.setdefault(ROWS, [])
        groups = compare(measured)
        if groups:
            console = wide_console()
            with console.capture() as text:
                console.print(table(groups))
                console.print()
                console.print(headline(groups))
            terminalreporter.section("fastblocks beside the best row of torch, medians in ms", sep="-", blue=True)
            terminalreporter.write(text.get())


class Group(NamedTuple):
    """Fastblocks beside the fastest row of torch."""

    name: str
    seconds: float
    best: str
    best_seconds: float
    missing: tuple[str, ...]
    """Rows of torch that there are not."""

    @property
    def ratio(self) -> float:
        """Of times: above one, fastblocks is slower."""
        return self.seconds / self.best_seconds


def compare(rows: Sequence[Row]) -> list[Group]:
    """The groups that have a row of fastblocks and one of torch, where fastblocks fares worst first.

    Example:
        >>> rows = [Row("a", "eager", 2.0), Row("a", "fastblocks", 1.0)]
        >>> rows += [Row("b", "fastblocks", 3.0), Row("b", "eager", 2.0)]
        >>> [(group.name, group.ratio) for group in compare(rows)]
        [('b', 1.5), ('a', 0.5)]
    """
    by_group: dict[str, dict[str, float]] = {}
    for row in rows:
        by_group.setdefault(row.group, {})[row.contender] = row.seconds
    groups = []
    for name, seconds in by_group.items():
        torchs = {who: seconds[who] for who in TORCH if who in seconds}
        if torchs and "fastblocks" in seconds:
            best = min(torchs, key=torchs.__getitem__)
            missing = tuple(who for who in TORCH if who not in torchs)
            groups.append(Group(name, seconds["fastblocks"], best, torchs[best], missing))
    return sorted(groups, key=lambda group: -group.ratio)


def table(groups: Sequence[Group]) -> Table:
    result = slim_table("group", "ratio", "fastblocks", "torch")
    result.columns[0].no_wrap = False
    result.columns[0].overflow = "fold"
    result.add_column("which")
    for group in groups:
        slower = group.ratio > 1
        ratio = "slower " * slower + f"{group.ratio:.2f}"
        times = (digits(1e3 * seconds) for seconds in (group.seconds, group.best_seconds))
        result.add_row(group.name, ratio, *times, group.best, style="red" if slower else "")
    return result


def headline(groups: Sequence[Group]) -> str:
    slower = sum(group.ratio > 1 for group in groups)
    middle = statistics.median(group.ratio for group in groups)
    tier = fastblocks.backend_info()
    lines = [
        f"fastblocks ({tier['backend']}, {tier['isa']}) is slower than the best of torch in {slower} of {len(groups)}; "
        f"the median ratio of times is {middle:.2f}."
    ]
    for who in TORCH:
        if missing := sum(who in group.missing for group in groups):
            lines.append(f"Without a row of {who}: {missing} of {len(groups)}.")
    return "\n".join(lines)
