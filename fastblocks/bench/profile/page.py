"""The profile as a page, with its roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fastblocks.analysis import attainable
from fastblocks.bench import page
from fastblocks.bench.charts import Picture, Theme, draw, tidy
from fastblocks.bench.profile.columns import (
    Column,
    advice_blocks,
    count_columns,
    headline,
    milliseconds,
    network_times,
    notes,
    time_columns,
)
from fastblocks.bench.profile.timing import FUSED

__all__ = ["html", "roofline", "times_chart"]

LABELLED = 2  # blocks whose names stand in the roofline
Row = Mapping[str, Any]


def roofline(result: Row) -> Picture:
    """Each block's speed over its intensity, below what the machine allows.

    Plain torch moves each operator's tensors, a fused block its own only: so its point lies further to the right.
    """
    limits, best = result["limits"], result["network"]["best"]
    rows = [row for row in result["blocks"] if row["multiply_adds"] and row.get("seconds", {}).get(best)]
    alt = f"Roofline of {result['model']}: GFLOP/s of each block over operations a byte"

    def speed(row: Row, side: str) -> float:
        return float(2e-9 * row["multiply_adds"] / row["seconds"][side])

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        points = [("intensity", best, theme.torch, "o", f"{best}, operator by operator")]
        if any(FUSED in row["seconds"] for row in rows):
            points.append(("fused_intensity", FUSED, theme.ours, "D", "fastblocks, a block as one operator"))
        spots = [row[key] for key, *_ in points for row in rows]
        low, high = min([0.5, *spots]) / 1.5, max([*spots, 2 * limits["gflops"] / limits["gbps"]]) * 1.5
        x = np.geomspace(low, high, 200)
        roof = [attainable(i, limits["gflops"], limits["gbps"]) for i in x]
        can = f"the machine: {limits['gflops']:.0f} GFLOP/s, {limits['gbps']:.0f} GB/s"
        axes.loglog(x, roof, color=theme.ink, linewidth=1.6, label=can)
        for row in rows:
            if FUSED in row["seconds"]:
                axes.annotate("", (row["fused_intensity"], speed(row, FUSED)), (row["intensity"], speed(row, best)),
                              arrowprops={"arrowstyle": "-", "color": theme.grid, "linewidth": 0.9})  # fmt: skip
        longest = max((row["seconds"][best] for row in rows), default=1.0)
        for key, side, colour, marker, label in points:
            shown = [row for row in rows if side in row["seconds"]]
            areas = [20 + 180 * row["seconds"][side] / longest for row in shown]
            axes.scatter([row[key] for row in shown], [speed(row, side) for row in shown], areas, color=colour,
                         marker=marker, alpha=0.85, label=label, zorder=3, linewidth=0)  # fmt: skip
        for row in sorted(rows, key=lambda row: -row["seconds"][best])[:LABELLED]:
            axes.annotate(row["name"], (row["intensity"], speed(row, best)), (0, -16), textcoords="offset points",
                          ha="center", fontsize=8, color=theme.ink)  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        bottom = min([roof[0], *(speed(row, best) for row in rows)]) / 1.6
        axes.set(xlabel="operations a byte", ylabel="GFLOP/s", xlim=(low, high), ylim=(bottom, None))
        axes.legend(loc="lower right", markerscale=0.8)
        tidy(axes)

    return draw(paint, (8, 5), alt)


def times_chart(result: Row) -> Picture:
    """Each block's time, plain torch beside fastblocks."""
    best = result["network"]["best"]
    rows = [row for row in result["blocks"] if row.get("seconds")]
    names = [best, FUSED] if FUSED in result["network"]["seconds"] else [best]
    alt = f"Time of each block of {result['model']}: " + " and ".join(names)

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        thick = 0.8 / len(names)
        for place, name in enumerate(names):
            times = [1e3 * row["seconds"].get(name, 0.0) for row in rows]
            at = [number + (place - (len(names) - 1) / 2) * thick for number in range(len(rows))]
            axes.barh(at, times, thick, color=theme.ours if name == FUSED else theme.torch, label=name)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("ms")
        axes.legend(loc="best")
        tidy(axes, grid="x")

    return draw(paint, (8, 1.2 + 0.24 * len(rows)), alt)


def html(result: Row) -> str:
    """The whole profile as one HTML page."""
    sections = []
    if result["network"] is not None:
        times = network_times(result)
        rows = [[name, milliseconds(s), f"{ratio:.2f} x" if ratio else ""] for name, s, ratio in times]
        strong = [number for number, entry in enumerate(times) if entry[0] == FUSED]
        headings = ["", "time", "fastblocks' speed-up"] if strong else ["", "time", ""]
        sections.append(page.Section("The whole network", [page.Table(headings, rows, strong)]))
    counted, timed, remarks = count_columns(result), time_columns(result), [page.Text(n, "note") for n in notes(result)]
    sections.append(page.Section("What each block costs", [_table(counted), *(() if timed else remarks)]))
    if timed:
        sections.append(page.Section("How fast each block is", [_table([counted[0], *timed]), *remarks]))
    if result["network"] is not None:
        sections += [
            page.Section("Where the time goes", [page.Figure(times_chart(result))]),
            page.Section(
                "Roofline",
                [
                    page.Figure(
                        roofline(result),
                        "The line is what the machine can do at most, as measured in this run. The larger a mark, the "
                        "longer its block takes. Points above the slope get their data from a cache.",
                    )
                ],
            ),
        ]
    sections.append(page.Section("Advice", _advice(result)))
    return page.render_page(f"Profile of {result['model']}", headline(result), sections, result["machine"])


def _table(found: Sequence[Column]) -> page.Table:
    headings = [" ".join(filter(None, (column.heading, column.unit))).replace("- ", "-") for column in found]
    rows = [*zip(*(column.cells for column in found), strict=True), [column.total for column in found]]
    return page.Table(headings, rows, [len(rows) - 1])


def _advice(result: Row) -> list[page.Text | page.Table | page.Figure]:
    if not result["advice"]:
        return [page.Text("The guidelines of ShuffleNetV2 (Ma et al. 2018) find nothing to better.")]
    texts: list[page.Text | page.Table | page.Figure] = [
        page.Text(
            "The guidelines of ShuffleNetV2 (Ma et al. 2018, section 2), the most expensive first. The costs are "
            "estimates for plain torch; they overlap, and are not to be summed.",
            "note",
        )
    ]
    for advice in result["advice"]:
        texts += [
            page.Text(f"{advice['guideline']}: {advice['title']}{cost(result, advice)}. Better: {advice['remedy']}."),
            page.Text(f"{advice_blocks(advice)}. Estimate: {advice['how']}.", "note"),
        ]
    return texts


def cost(result: Row, advice: Row) -> str:
    """An advice's estimated cost in words; nothing where nothing was measured."""
    if advice["seconds"] is None:
        return ""
    share = 100 * advice["seconds"] / result["network"]["seconds"][result["network"]["best"]]
    return f", about {milliseconds(advice['seconds'])} or {share:.1f} % of the network"
