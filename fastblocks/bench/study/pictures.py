"""The charts of the study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from fastblocks.bench.charts import Picture, Theme, draw, tidy

__all__ = ["bars", "bits", "clouds", "shares"]

WIDTH = 8.6  # inches
SERIES: dict[str, Callable[[Theme], str]] = {
    "counted": lambda theme: theme.others[0],
    "paper": lambda theme: theme.others[1],
    "torch": lambda theme: theme.torch,
    "fastblocks": lambda theme: theme.ours,
}
KINDS = ("1x1", "depthwise", "3x3", "linear", "BatchNorm, ReLU")

Groups = Mapping[str, Mapping[str, Mapping[str, float]]]


def bars(groups: Groups, axis: str, alt: str, *, line: float | None = None, form: str = "{:.2f}") -> Picture:
    """Bars: a panel a group, a cluster a row, in it a bar for each series that the row has.

    Args:
        groups: values by panel, row and series ("counted", "paper", "torch" or "fastblocks").
        axis: what the values are.
        alt: the picture in words.
        line: a value to mark.
        form: how a value is written on its bar.
    """

    def paint(figure: Figure, theme: Theme) -> None:
        panels: Any = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        top = max(value for rows in groups.values() for row in rows.values() for value in row.values())
        for axes, (title, rows) in zip(panels, groups.items(), strict=True):
            _cluster(axes, rows, theme, form, 7 if len(groups) > 1 else 9)
            axes.set_title(title if len(groups) > 1 else "")
            axes.set_xlim(0, 1.16 * top)
            axes.set_xlabel(axis)
            if line is not None:
                axes.axvline(line, color=theme.faint, linewidth=0.8, linestyle=(0, (4, 3)))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))

    clusters = max(len(rows) for rows in groups.values())
    series = max(len(row) for rows in groups.values() for row in rows.values())
    return draw(paint, (WIDTH, 1.0 + 0.19 * clusters * (series + 0.8)), alt)


def _cluster(axes: Axes, rows: Mapping[str, Mapping[str, float]], theme: Theme, form: str, size: float) -> None:
    thick = 0.8 / max(len(row) for row in rows.values())
    for name, colour in SERIES.items():
        values, at = [], []
        for index, row in enumerate(rows.values()):
            if name in row:
                values.append(row[name])
                at.append(index + thick * (list(row).index(name) + 0.5 - len(row) / 2))
        if not values:
            continue
        drawn = axes.barh(at, values, 0.9 * thick, color=colour(theme), label=name)
        axes.bar_label(drawn, [form.format(value) for value in values], padding=2, fontsize=size, color=theme.ink)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    tidy(axes, grid="x")
    axes.tick_params(axis="y", length=0)


def shares(rows: Mapping[str, Mapping[str, float]], alt: str) -> Picture:
    """A bar of 100 % a row, divided by kind of layer."""

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        kinds = [kind for kind in KINDS if any(kind in row for row in rows.values())]
        colours = (theme.ours, *theme.others[:3], theme.torch)
        left = np.zeros(len(rows))
        for kind, colour in zip(kinds, (colours[KINDS.index(kind)] for kind in kinds), strict=True):
            values = np.array([100 * row.get(kind, 0.0) for row in rows.values()])
            drawn = axes.barh(range(len(rows)), values, 0.62, left=left, color=colour, label=kind)
            words = [f"{value:.1f}" if value > 4 else "" for value in values]
            axes.bar_label(drawn, words, label_type="center", fontsize=9, color=theme.paper)
            left += values
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("per cent")
        tidy(axes, grid="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(kinds))

    return draw(paint, (WIDTH, 1.1 + 0.42 * len(rows)), alt)


def bits(panels: Mapping[str, Sequence[str]], alt: str) -> Picture:
    """Square matrices of 0 and 1, a string a row: outputs downwards, inputs to the right."""

    def paint(figure: Figure, theme: Theme) -> None:
        row: Any = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, lines) in zip(row, panels.items(), strict=True):
            matrix = np.array([[int(sign) for sign in line] for line in lines])
            axes.imshow(matrix, cmap=ListedColormap([theme.grid, theme.ours]), vmin=0, vmax=1, interpolation="nearest")
            axes.set(title=title, xlabel="input channel", ylabel="output channel", xticks=[], yticks=[])

    return draw(paint, (WIDTH, 3.6), alt)


def clouds(panels: Mapping[str, Mapping[str, Any]], alt: str) -> Picture:
    """Points in the plane, a panel each: ``points`` as pairs; ``lost`` as a string of 0 and 1, which marks some."""

    def paint(figure: Figure, theme: Theme) -> None:
        row: Any = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, panel) in zip(row, panels.items(), strict=True):
            points, lost = np.array(panel["points"]), np.array([sign == "1" for sign in panel["lost"]])
            axes.plot(*points.T, color=theme.grid, linewidth=0.8, zorder=1)
            axes.scatter(*points[~lost].T, s=6, color=theme.ours, linewidths=0, zorder=2)
            axes.scatter(*points[lost].T, s=12, color=theme.others[1], linewidths=0, marker="X", zorder=3)
            axes.set(title=title, xticks=[], yticks=[], aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
            axes.spines[:].set_color(theme.grid)
            axes.set_xlabel(panel["note"], fontsize=8.5)

    return draw(paint, (WIDTH, 2.05), alt)
