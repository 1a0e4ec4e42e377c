"""How results look in a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastblocks.bench.words import counted, torch_version

__all__ = ["print_classification", "print_info", "print_json", "print_warmup"]

BAR = 24  # characters of a probability of 1


def print_json(result: Mapping[str, Any]) -> None:
    """Print one JSON document."""
    print(json.dumps(result, indent=2, default=str))


def print_classification(result: Mapping[str, Any]) -> None:
    """Print a table of labels for each photograph, then one of times."""
    console = Console(highlight=False)
    for photo in result["photos"]:
        width, height = photo["size"]
        console.print(Text.assemble((photo["photo"], "bold"), (f", {width} x {height}", "dim")))
        console.print(_labels_table(photo["labels"], "#" if console.options.ascii_only else "━"), "")
    if timing := result.get("timing"):
        how = f", {counted(result['threads'], 'thread')}, median of {counted(timing['rounds'], 'interleaved round')}"
        console.print(Text.assemble(("time an image", "bold"), (how, "dim")))
        console.print(_times_table(timing["rows"], result["backend"]), "")
    if "largest_difference" in result:
        worst = f"{result['largest_difference']:.1e}"
        console.print(Text.assemble("largest difference of the logits: ", (worst, "bold"), " of the largest logit"))
    facts = [f"{result['model']}, weights: {result['weights']}", f"torch {torch_version(result)}", result["cpu"]]
    console.print(Text(", ".join(facts), style="dim"))


def _labels_table(labels: list[Mapping[str, Any]], block: str) -> Table:
    table = _table(show_header=False)
    table.add_column(max_width=40, no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="cyan")
    for rank, row in enumerate(labels):
        bar = block * round(BAR * row["probability"])
        table.add_row(Text(row["label"], "bold" if rank == 0 else ""), f"{100 * row['probability']:.1f} %", bar)
    return table


def _times_table(rows: list[Mapping[str, Any]], backend: Mapping[str, Any]) -> Table:
    table = _table()
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("fastblocks' speed-up", justify="right")
    for row in rows:
        ours = row["name"] == "fastblocks"
        name = f"fastblocks ({_backend_phrase(backend)})" if ours else row["name"]
        ratio = "" if ours else f"{row['fastblocks_speed_up']:.2f} x"
        table.add_row(Text(name), f"{row['milliseconds']:.2f}", ratio, style="bold green" if ours else "")
    return table


def print_info(facts: Mapping[str, Any]) -> None:
    """Print the facts as a table of two columns."""
    table = _table(show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key in ("torch", "numpy", "python", "system", "cpu"):
        table.add_row(key, Text(facts[key]))
    for key, value in facts["backend"].items():
        if value not in (None, "", [], ()):
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            table.add_row(key.replace("_", " "), Text(shown, "bold green" if value == "native" else ""))
    for name, state in facts["weights"].items():
        table.add_row(f"weights of {name}", Text(state["path"] if state["cached"] else "not fetched yet"))
    console = Console(highlight=False)
    console.print(Text(f"fastblocks {facts['fastblocks']}", "bold"))
    console.print(table)


def print_warmup(result: Mapping[str, Any]) -> None:
    """Print what a warm-up did, in a line."""
    console = Console(highlight=False)
    known = result["kernels"] - result["compiled"]
    done = f"{counted(result['compiled'], 'kernel')} compiled for {result['cpu']}, {known} were there"
    where = f"kept in {result['cache']}" if result["cache"] else "not kept: no directory for them can be written"
    text = Text.assemble((done, "bold"), f", {result['seconds']:.1f} s; {where}")
    console.print(text, soft_wrap=True)


def _backend_phrase(backend: Mapping[str, Any]) -> str:
    """The backend in a word or two: "native x86_64_v3", or "reference"."""
    native = backend["backend"] == "native" and backend.get("isa")
    return f"native {backend['isa']}" if native else str(backend["backend"])


def _table(show_header: bool = True) -> Table:
    return Table(box=box.SIMPLE_HEAD, show_header=show_header, show_edge=False, pad_edge=False, header_style="dim")
