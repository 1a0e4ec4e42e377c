"""Writes the README's measured tables, and its chart, from files of results: no number there is typed.

    fastblocks bench mobilenet_v1 mobilenet_v2 shufflenet_v1_g3 shufflenet_v2_x1_0 --batch 1 --batch 8 --threads 2
    python benchmarks/readme.py benchmarks/results/bench-....json        # inference, with the charts beside the file
    python benchmarks/train_step.py --model NAME --memory --json FILE    # once a network
    python benchmarks/readme.py FILE ...                                 # training, all the files at once

Each table stands between two comments that name its files, so `--check` can tell whether it still says what they say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastblocks.bench.files import replace_text
from fastblocks.bench.words import counted, digits, torch_version

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- (?P<kind>inference|training): (?P<files>[^>]*) -->\n.*?<!-- end -->", re.DOTALL)


def rows_of(heading: str, columns: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    """A table in Markdown, its first column named."""
    lines = [f"| {heading} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]


def machine(facts: dict[str, Any], threads: int) -> str:
    return (
        f"{facts['cores']}-core {facts['cpu']}, {facts['isa']}, torch {torch_version(facts)}, "
        f"{counted(threads, 'thread')}, {facts['date']}"
    )


def inference(files: Sequence[str]) -> str:
    """The tables of one bench, one a batch, and its chart."""
    (file,) = files
    result = json.loads((ROOT / file).read_text())
    contests = result["contests"]
    stem = file.removesuffix(".json")
    best = [takes for contest in contests if (takes := contest["fastblocks_takes_of_best_engine"]) is not None]
    lines = [
        f"{machine(result['facts'], contests[0]['threads'])}, median of {contests[0]['rounds']} interleaved rounds:",
        f"`{result['command']}`.",
        "",
        "<picture>",
        f'<source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.png">',
        f'<img alt="Milliseconds an image of fastblocks and its peers" src="{stem}-light.png">',
        "</picture>",
    ]
    for batch in dict.fromkeys(contest["batch"] for contest in contests):
        chosen = [contest for contest in contests if contest["batch"] == batch]
        table: dict[str, list[str]] = {}
        for name, title in {row["name"]: title_of(row) for contest in chosen for row in contest["rows"]}.items():
            table[title] = [cell(contest, name) for contest in chosen]
        ratios = [ratio(contest["fastblocks_takes_of_best_engine"]) for contest in chosen]
        table["ratio to the best engine, round by round"] = ratios
        table["fastblocks' share of the FMA peak"] = [share_of_peak(contest) for contest in chosen]
        lines += ["", *rows_of(f"batch {batch}", [contest["model"] for contest in chosen], table)]
    behind = sum(takes > 1 for takes in best)
    if best:
        ahead = f"fastblocks is ahead in {len(best) - behind} of {len(best)}"
        lines += ["", f"Against the best engine of each column {ahead}."]
    return "\n".join(lines)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def share_of_peak(contest: dict[str, Any]) -> str:
    shares = [row["share_of_peak"] for row in contest["rows"] if row["name"] == "fastblocks"]
    return f"{100 * shares[0]:.0f} %" if shares else "-"


def title_of(row: dict[str, Any]) -> str:
    engine = row["name"] not in ("fastblocks", "eager", "channels_last", "compile", "jit")
    return f"{row['title']} {row['version']}" if engine else row["title"]


def cell(contest: dict[str, Any], name: str) -> str:
    for row in contest["rows"]:
        if row["name"] == name:
            takes = row["fastblocks_takes"]
            return digits(row["milliseconds"]) + ("" if takes is None else f" ({takes:.2f})")
    return "-"


def training(files: Sequence[str]) -> str:
    """The table of training steps, a column a file."""
    results = [json.loads((ROOT / file).read_text()) for file in files]
    first = results[0]
    titles = {"fastblocks": "fastblocks", "eager": "torch eager", "channels_last": "torch eager, channels_last"}
    titles |= {"compile": "torch.compile", "compile_channels_last": "torch.compile, channels_last"}
    table = {title: [step_cell(result, mode) for result in results] for mode, title in titles.items()}
    own = [rows_by_mode(result).get("fastblocks", {}) for result in results]
    table["peak memory, of channels_last's"] = [ratio(row.get("peak_of_channels_last")) for row in own]
    side = first["resolution"]
    head = f"{machine(first['facts'], first['threads'])}, batch {first['batch']}, {side}x{side}:"
    lines = [head, "`python benchmarks/train_step.py --model NAME --memory`.", ""]
    return "\n".join([*lines, *rows_of("training step", [result["model"] for result in results], table)])


def step_cell(result: dict[str, Any], mode: str) -> str:
    rows = rows_by_mode(result)
    if mode not in rows:
        return "-"
    ours, ms = rows.get("fastblocks"), rows[mode]["ms"]
    return digits(ms) + ("" if ours is None or mode == "fastblocks" else f" ({ours['ms'] / ms:.2f})")


def rows_by_mode(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["mode"]: row for row in result["rows"]}


MAKERS = {"inference": inference, "training": training}


def block(kind: str, files: Sequence[str]) -> str:
    return f"<!-- {kind}: {' '.join(files)} -->\n{MAKERS[kind](files)}\n<!-- end -->"


def remade(text: str, chosen: dict[str, Sequence[str]]) -> str:
    """The README with its tables made anew, from the files that it names or from those `chosen` for a kind."""
    return BLOCK.sub(lambda found: block(found["kind"], chosen.get(found["kind"], found["files"].split())), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results to take from now on")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is not its files'")
    arguments = parser.parse_args()
    chosen: dict[str, list[str]] = {}
    for file in arguments.files:
        kind = "inference" if "contests" in json.loads(file.read_text()) else "training"
        chosen.setdefault(kind, []).append(os.path.relpath(file.resolve(), ROOT))
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = remade(before, chosen)
    if arguments.check:
        sys.exit(before != after)
    replace_text(readme, after)


if __name__ == "__main__":
    main()
