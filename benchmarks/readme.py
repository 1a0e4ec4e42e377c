"""Writes the README's measured tables, and its chart, from files of results: no number there is typed.

    fastblocks bench mobilenet_v1 mobilenet_v2 shufflenet_v1_g3 shufflenet_v2_x1_0 --batch 1 --batch 8 --threads 2
    python benchmarks/readme.py benchmarks/results/bench-....json        # inference, with the charts beside the file
    python benchmarks/train_step.py --model NAME --memory --json FILE    # once a network
    python benchmarks/readme.py FILE ...                                 # training, all the files at once
    python benchmarks/train_step.py --malloc-tuned --json FILE
    python benchmarks/readme.py FILE                                     # what torch gains by a glibc that keeps memory
    python benchmarks/numba_tier.py ops|networks --batch N --json FILE   # ops once, networks once a batch
    python benchmarks/train_step.py --model NAME --modes channels_last fastblocks_numba --json FILE
    python benchmarks/readme.py FILE ...                                 # the numba tier, all the files at once

Each table stands between two comments that name its files, so `--check` can tell whether it still says what they say.
What names no files is left as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastblocks.bench.files import replace_text
from fastblocks.bench.timing import speed_up
from fastblocks.bench.words import counted, digits, torch_version

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- (?P<kind>inference|training|malloc|numba):(?P<files>[^>]*) -->\n.*?<!-- end -->", re.DOTALL)

Result = dict[str, Any]


def rows_of(heading: str, columns: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    """A table in Markdown, its first column named."""
    lines = [f"| {heading} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]


def machine(facts: Result, threads: int) -> str:
    return (
        f"{facts['cores']}-core {facts['cpu']}, {facts['isa']}, torch {torch_version(facts)}, "
        f"{counted(threads, 'thread')}, {facts['date']}"
    )


def read(files: Sequence[str], *same: str) -> list[Result]:
    """What the files of a table hold.

    Raises:
        ValueError: they were not measured on one processor with one torch, one number of threads, and what else is to
            be the `same`.
    """
    results: list[Result] = [json.loads((ROOT / file).read_text()) for file in files]
    for key in ("cpu", "torch", "threads", *same):
        found = {str(value) for each in results if (value := each["facts"].get(key, each.get(key))) is not None}
        if len(found) > 1:
            raise ValueError(f"{key}: expected the same in {', '.join(files)}, got {', '.join(sorted(found))}")
    return results


def inference(files: Sequence[str]) -> str:
    """The tables of one bench, one a batch, and its chart."""
    (result,) = read(files)
    contests = result["contests"]
    stem = files[0].removesuffix(".json")
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


def share_of_peak(contest: Result) -> str:
    shares = [row["share_of_peak"] for row in contest["rows"] if row["name"] == "fastblocks"]
    return f"{100 * shares[0]:.0f} %" if shares else "-"


def title_of(row: Result) -> str:
    engine = row["name"] not in ("fastblocks", "eager", "channels_last", "compile", "jit")
    return f"{row['title']} {row['version']}" if engine else row["title"]


def cell(contest: Result, name: str) -> str:
    for row in contest["rows"]:
        if row["name"] == name:
            takes = row["fastblocks_takes"]
            return digits(row["milliseconds"]) + ("" if takes is None else f" ({takes:.2f})")
    return "-"


def training(files: Sequence[str]) -> str:
    """The table of training steps, a column a file."""
    results = read(files, "batch", "resolution", "rounds", "steps")
    first = results[0]
    titles = {"fastblocks": "fastblocks", "eager": "torch eager", "channels_last": "torch eager, channels_last"}
    titles |= {"compile": "torch.compile", "compile_channels_last": "torch.compile, channels_last"}
    table = {title: [step_cell(result, mode) for result in results] for mode, title in titles.items()}
    own = [rows_by_mode(result).get("fastblocks", {}) for result in results]
    table["peak memory, of channels_last's"] = [ratio(row.get("peak_of_channels_last")) for row in own]
    side = first["resolution"]
    head = f"{machine(first['facts'], first['threads'])}, batch {first['batch']}, {side}x{side}:"
    how = f"{counted(first['rounds'], 'round')} of {counted(first['steps'], 'step')}"
    lines = [head, f"`python benchmarks/train_step.py --model NAME --memory`, {how}.", ""]
    return "\n".join([*lines, *rows_of("training step", [result["model"] for result in results], table)])


def step_cell(result: Result, mode: str) -> str:
    rows = rows_by_mode(result)
    if mode not in rows:
        return "-"
    ours, ms = rows.get("fastblocks"), rows[mode]["ms"]
    return digits(ms) + ("" if ours is None or mode == "fastblocks" else f" ({ours['ms'] / ms:.2f})")


def rows_by_mode(result: Result) -> dict[str, Result]:
    return {row["mode"]: row for row in result["rows"]}


def malloc(files: Sequence[str]) -> str:
    """What a glibc that keeps its memory does for a training step in torch."""
    (result,) = read(files)
    best = [row["ms"] for row in result["rows"] if row["best_torch"]]
    if not best:
        raise ValueError(f"{files[0]}: expected a mode of torch beside fastblocks")
    ours = ratio(rows_by_mode(result)["fastblocks"]["of_best_torch"])
    return (
        "Much of torch's time goes into memory that it gives back and asks for again. With a glibc that is told to\n"
        f"keep it (`--malloc-tuned`) its best mode takes {digits(best[0])} ms for {result['model']}, and fastblocks "
        f"{ours} of that."
    )


def numba(files: Sequence[str]) -> str:
    """The numba tier beside torch: networks and training steps, a column a network, then the ops."""
    results = read(files)
    runs = sorted((each for each in results if "tier" in each), key=lambda each: int(each["batch"]))
    if not runs:
        raise ValueError(f"{', '.join(files)}: expected a file of numba_tier.py among them")
    faster: dict[str, dict[str, float]] = {}
    for each in runs:
        for row in each["rows"].get("networks", ()):
            faster.setdefault(f"batch {each['batch']}", {})[row["name"].split()[0]] = row["faster"]
    for each in results:
        if "tier" not in each:
            faster.setdefault(f"a training step, batch {each['batch']}", {})[each["model"]] = gain(each)
    models = list(dict.fromkeys(model for row in faster.values() for model in row))
    table = {title: [f"{row[model]:.1f}" if model in row else "-" for model in models] for title, row in faster.items()}
    lines = [
        f"The numba tier, {machine(runs[0]['facts'], runs[0]['threads'])}: how many times it is as fast as torch",
        "eager, channels_last, the median over interleaved rounds. `python benchmarks/numba_tier.py ops` and",
        "`networks`, `python benchmarks/train_step.py --model NAME --modes channels_last fastblocks_numba`:",
        "",
        *rows_of("numba tier", models, table),
    ]
    for each in runs:
        if each["what"] == "ops":
            means = ", ".join(f"{kind} {mean:.1f}" for kind, mean in each["means"].items())
            lines += ["", f"Ops alone, batch {each['batch']}, geometric means of the benchmarks' shapes: {means}."]
    return "\n".join(lines)


def gain(step: Result) -> float:
    rows = rows_by_mode(step)
    return speed_up(rows["channels_last"]["times"], rows["fastblocks_numba"]["times"])


MAKERS = {"inference": inference, "training": training, "malloc": malloc, "numba": numba}


def kind_of(result: Result) -> str:
    """Which block a file is for.

    Raises:
        ValueError: for none.
    """
    modes = {row["mode"] for row in result["rows"]} if "malloc_tuned" in result else set()
    if "contests" in result:
        return "inference"
    if "fastblocks" in modes:
        return "malloc" if result["malloc_tuned"] else "training"
    if result.get("tier") == "numba" or {"channels_last", "fastblocks_numba"} <= modes:
        return "numba"
    raise ValueError("expected results of fastblocks bench, train_step.py, or numba_tier.py with the numba tier")


def block(kind: str, files: Sequence[str]) -> str:
    return f"<!-- {kind}: {' '.join(files)} -->\n{MAKERS[kind](files)}\n<!-- end -->"


def remade(text: str, chosen: Mapping[str, Sequence[str]]) -> str:
    """The README with its tables made anew, from the files that it names or from those `chosen` for a kind."""

    def made(found: re.Match[str]) -> str:
        files = chosen.get(found["kind"], found["files"].split())
        return block(found["kind"], files) if files else found[0]

    return BLOCK.sub(made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results to take from now on")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is not its files'")
    arguments = parser.parse_args()
    chosen: dict[str, list[str]] = {}
    for file in arguments.files:
        try:
            kind = kind_of(json.loads(file.read_text()))
        except ValueError as error:
            sys.exit(f"{file}: {error}")
        chosen.setdefault(kind, []).append(os.path.relpath(file.resolve(), ROOT))
    readme = ROOT / "README.md"
    before = readme.read_text()
    try:
        after = remade(before, chosen)
    except ValueError as error:
        sys.exit(str(error))
    if arguments.check:
        sys.exit(before != after)
    replace_text(readme, after)


if __name__ == "__main__":
    main()
