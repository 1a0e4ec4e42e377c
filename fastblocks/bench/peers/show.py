"""A bench's results as files: JSON, a page and charts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing

from fastblocks.bench.charts import Picture, Theme, draw, tidy
from fastblocks.bench.files import folder, replace_text, told_of
from fastblocks.bench.page import Figure, Section, Table, Text, render_page
from fastblocks.bench.peers import TORCH
from fastblocks.bench.words import counted, digits, stem

__all__ = ["chart", "file_stem", "page", "write_files"]

METHOD = (
    "Each contender runs in a process of its own and takes its turns in rounds, A B C ... A B C ..., so that a slow "
    "spell of the machine falls on everybody. A row's time is the median over rounds of the median call of a turn; "
    "a ratio is the median over rounds of the ratio within a round. Outputs were compared with torch's before "
    "anything was timed. The share of peak is the network's multiply-adds against what the processor did in a loop of "
    "nothing but multiply-adds, measured in the same round."
)


def file_stem(result: Mapping[str, Any]) -> str:
    """A file name without its ending: what, on which processor, with which torch, when.

    Example:
        >>> facts = {"cpu": "AMD EPYC 7", "torch": "2.14.1+cpu", "date": "2026-11-24"}
        >>> file_stem({"facts": facts, "contests": [{"model": "mobilenet_v2", "batch": 1, "threads": 2}]})
        'bench-mobilenet_v2-batch1-2threads-amd-epyc-7-torch2.14.1-2026-11-24'
    """
    contests = result["contests"]
    models = list(dict.fromkeys(contest["model"] for contest in contests))
    batches = list(dict.fromkeys(contest["batch"] for contest in contests))
    which = models[0] if len(models) == 1 else f"{len(models)}networks"
    images = "+".join(map(str, batches))
    return stem(["bench", which, f"batch{images}", f"{contests[0]['threads']}threads"], result["facts"])


def write_files(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the JSON, the page and the charts; returns their paths.

    Raises:
        BenchError: the folder cannot be written to.
    """
    picture = chart(result)
    path = folder(out, "--out") / file_stem(result)
    with told_of("--out", out):
        written = [path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.html")]
        replace_text(written[0], json.dumps(result, indent=1) + "\n")
        replace_text(written[1], page(result, picture))
        return [*written, *picture.save(path)]


def page(result: Mapping[str, Any], picture: Picture) -> str:
    """The results as one self-contained HTML page."""
    sections = [Section("At a glance", [Text(_sentence(result)), Figure(picture, _caption(result))])]
    for contest in result["contests"]:
        blocks: list[Text | Table | Figure] = [_table(contest)]
        limits = f"{contest['gflops']:.0f} GFLOP/s ({contest['limit_by']}) and {contest['gbps']:.0f} GB/s"
        work = f"{contest['multiply_adds'] / 1e6:.2f} million multiply-adds an image"
        blocks.append(Text(f"{work}; the machine's limits in this run: {limits}.", "note"))
        blocks += [Text(f"Left out: {name}: {reason}", "note") for name, reason in contest["left_out"].items()]
        sections.append(Section(_heading(contest), blocks))
    sections.append(Section("How it was measured", [Text(METHOD), Text(result["command"], "code")]))
    facts = result["facts"]
    return render_page("fastblocks beside its peers", f"{facts['cpu']}, {facts['date']}", sections, facts)


def chart(result: Mapping[str, Any]) -> Picture:
    """Bars of the time an image, the fastest on top, a panel a contest."""
    contests = result["contests"]
    columns = min(len(contests), 2)
    lines = -(-len(contests) // columns)
    most = max(len(contest["rows"]) for contest in contests)

    def paint(figure: Drawing, theme: Theme) -> None:
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for axes, contest in zip(panels, contests, strict=False):
            rows = sorted(contest["rows"], key=lambda row: -row["milliseconds"])
            times = [row["milliseconds"] / contest["batch"] for row in rows]
            colours = [_colour(row["name"], theme) for row in rows]
            bars = axes.barh([row["title"] for row in rows], times, color=colours, height=0.7)
            axes.bar_label(bars, [digits(time) for time in times], padding=4, color=theme.ink, fontsize=9)
            for label, row in zip(axes.get_yticklabels(), rows, strict=True):
                if row["name"] == "fastblocks":
                    label.set_fontweight("bold")
            axes.set_title(_heading(contest))
            axes.set_xlabel("ms an image")
            axes.margins(x=0.12)
            tidy(axes, grid="x")
        for axes in list(panels):
            axes.set_visible(False)

    size = (5.2 * columns + 1.6, (0.27 * most + 1.0) * lines)
    return draw(paint, size, f"Bars of milliseconds an image. {_sentence(result)}")


def _colour(name: str, theme: Theme) -> str:
    if name == "fastblocks":
        return theme.ours
    return theme.torch if name in TORCH else theme.others[0]


def _heading(contest: Mapping[str, Any]) -> str:
    return f"{contest['model']}, batch {contest['batch']}, {counted(contest['threads'], 'thread')}"


def _caption(result: Mapping[str, Any]) -> str:
    rounds = counted(result["contests"][0]["rounds"], "round")
    return f"Median time an image; green is fastblocks, grey torch, blue the inference engines. {rounds}."


def _sentence(result: Mapping[str, Any]) -> str:
    """What came out, in words: where fastblocks was behind, it says so."""
    parts = []
    for contest in result["contests"]:
        takes = contest["fastblocks_takes_of_best_engine"]
        if takes is not None:
            parts.append(f"{_heading(contest)}: fastblocks takes {takes:.2f} of the best engine's time")
    return "; ".join(parts) + "." * bool(parts)


def _table(contest: Mapping[str, Any]) -> Table:
    headings = ("", "version", "ms", "middle half of rounds", "fastblocks takes", "share of peak", "largest difference")
    rows: list[Sequence[str]] = []
    for row in contest["rows"]:
        low, high = row["quartiles"]
        takes = row["fastblocks_takes"]
        cells = (
            row["title"],
            row["version"],
            digits(row["milliseconds"]),
            f"{digits(low)} to {digits(high)}",
            "" if takes is None else f"{takes:.2f} of it",
            f"{100 * row['share_of_peak']:.0f} %",
            f"{row['difference']:.0e}",
        )
        rows.append(cells)
    strong = [index for index, row in enumerate(contest["rows"]) if row["name"] == "fastblocks"]
    return Table(headings, rows, strong)
