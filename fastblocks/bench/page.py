"""A page of results: one HTML file with everything in it, which opens anywhere and asks no server for anything."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2

from fastblocks.bench.charts import Picture

__all__ = ["Figure", "Section", "Table", "Text", "render_page"]


class Text(NamedTuple):
    """A paragraph. `kind` is "text", "verdict" (bold), "note" (smaller) or "code"."""

    text: str
    kind: str = "text"


class Table(NamedTuple):
    """Rows of cells under headings; the first column is text, the others stand to the right.

    `strong` has the numbers of the rows to set in bold. A table of `words` stands to the left, and its cells wrap.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()
    words: bool = False


class Figure(NamedTuple):
    """A chart and the line below it."""

    picture: Picture
    caption: str = ""


class Section(NamedTuple):
    """A heading and what stands below it."""

    heading: str
    blocks: Sequence[Text | Table | Figure]


def render_page(title: str, subtitle: str, sections: Sequence[Section], facts: Mapping[str, Any]) -> str:
    """The page as HTML; `facts` (see `machine.facts`) stand at its foot.

    Example:
        >>> "<h1>A &lt; B</h1>" in render_page("A < B", "", [], {})
        True
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = files("fastblocks.bench").joinpath("data/page.html").read_text("utf-8")
    kinds = [
        {"heading": section.heading, "blocks": [(type(block).__name__, block) for block in section.blocks]}
        for section in sections
    ]
    return environment.from_string(source).render(
        title=title, subtitle=subtitle, sections=kinds, facts=facts, data_url=_data_url
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
