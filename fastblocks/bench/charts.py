"""Charts that are read as well on a light page as on a dark one: each is drawn twice, in two palettes."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fastblocks.bench.files import replace

__all__ = ["DARK", "LIGHT", "Picture", "Theme", "draw", "tidy"]

DPI = 144


class Theme(NamedTuple):
    """Colours. `ours` is fastblocks, `others` are told apart in grey, too, `torch` is torch eager."""

    name: str
    paper: str
    ink: str
    faint: str
    grid: str
    ours: str
    torch: str
    others: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#59636e", "#dfe3e8", "#0a7d4f", "#6b7785",
    ("#0b5cad", "#b3541e", "#7d3fa0", "#a0780a", "#b02a5b", "#2b8a9e"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#e6edf3", "#9aa5b1", "#2a313a", "#3ddc97", "#9aa5b1",
    ("#6cb2ff", "#ff9d5c", "#d2a0f0", "#e8c34a", "#ff86ab", "#6fd6e8"),
)  # fmt: skip


class Picture(NamedTuple):
    """A chart as two PNG files, and in words."""

    light: bytes
    dark: bytes
    alt: str

    def save(self, stem: Path) -> list[Path]:
        """Write ``STEM-light.png`` and ``STEM-dark.png``, each whole or not at all; returns their paths."""
        paths = [stem.with_name(f"{stem.name}-{theme}.png") for theme in ("light", "dark")]
        for path, data in zip(paths, (self.light, self.dark), strict=True):
            replace(path, partial(_write, data))
        return paths


def draw(paint: Callable[[Figure, Theme], Any], size: tuple[float, float], alt: str) -> Picture:
    """Draw a chart in both palettes.

    Args:
        paint: fills the figure, whose ground, text and lines already have the theme's colours.
        size: width and height in inches, of 144 pixels each.
        alt: what the chart shows, for whoever does not see it.
    """
    files: list[bytes] = []
    for theme in (LIGHT, DARK):
        with mpl.rc_context(_settings(theme)):  # type: ignore[arg-type]
            figure = Figure(figsize=size, dpi=DPI, layout="constrained")
            paint(figure, theme)
            file = io.BytesIO()
            figure.savefig(file, format="png")
        files.append(_small(file))
    return Picture(files[0], files[1], alt)


def _small(png: BinaryIO) -> bytes:
    """The same picture with a palette of 128 colours, at a third of the size: a chart has few, and shades of them."""
    file = io.BytesIO()
    Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def tidy(axes: Axes, *, grid: str = "both") -> None:
    """Take away the frame's upper and right side, and put a faint grid (x, y or both) behind the marks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "figure.constrained_layout.h_pad": 0.1,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "font.size": 10,
        "font.family": "DejaVu Sans",
    }
