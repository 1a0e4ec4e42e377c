"""How a bench looks in a terminal: what goes on while it runs, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastblocks.bench.peers import TORCH
from fastblocks.bench.words import counted, digits, torch_version

__all__ = ["print_bench", "progress"]


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that tells what goes on; where stderr is no terminal, nothing."""
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        yield lambda line: status.update(Text(line))


def print_bench(result: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Print a table a contest, who was left out and why, and where the files are."""
    console = Console(highlight=False)
    for contest in result["contests"]:
        threads, rounds = counted(contest["threads"], "thread"), counted(contest["rounds"], "round")
        how = f", batch {contest['batch']}, {threads}, {rounds}"
        console.print(Text.assemble((contest["model"], "bold"), (how, "dim")))
        console.print(_table(contest))
        for name, reason in contest["left_out"].items():
            console.print(Text.assemble((f"{name} left out: ", "yellow"), reason))
        best = contest["fastblocks_takes_of_best_engine"]
        if best is not None:
            console.print(Text.assemble("ratio to the best engine, round by round: ", (f"{best:.3f}", "bold")))
        limits = f"{contest['gflops']:.0f} GFLOP/s ({contest['limit_by']}), {contest['gbps']:.0f} GB/s"
        console.print(Text(f"the machine's limits in this run: {limits}", "dim"), "")
    facts = result["facts"]
    note = "ratio: fastblocks' time divided by the row's; of peak: multiply-adds against the machine's limit"
    console.print(Text(note, "dim"))
    console.print(Text(f"{facts['cpu']}, torch {torch_version(facts)}, {facts['date']}", "dim"))
    for file in files:
        console.print(Text(str(file), "dim"), soft_wrap=True)


def _table(contest: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for heading in ("ms", "middle half", "ratio", "of peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in contest["rows"]:
        low, high = row["quartiles"]
        takes = row["fastblocks_takes"]
        name = Text.assemble(row["title"], ("" if row["name"] in TORCH else f" {row['version']}", "dim"))
        ratio = Text("" if takes is None else f"{takes:.3f}", "red" if takes is not None and takes > 1 else "")
        table.add_row(
            name,
            digits(row["milliseconds"]),
            f"{digits(low)}-{digits(high)}",
            ratio,
            f"{100 * row['share_of_peak']:.0f} %",
            style="bold green" if row["name"] == "fastblocks" else "",
        )
    return table
