"""What a claim is: words, a measurement, and how the measurement is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastblocks.bench.charts import Picture
from fastblocks.bench.page import Table

__all__ = ["HOLDS", "IN_PART", "NOT_HERE", "Claim", "Data", "Summary", "outcome"]

Data = Mapping[str, Any]
"""What a measurement found: plain numbers, strings, lists and dictionaries."""

HOLDS, IN_PART, NOT_HERE = "holds", "holds in part", "not seen here"


class Summary(NamedTuple):
    """A measurement in a few words."""

    paper: str
    """The number that the paper prints."""
    ours: str
    """The same, measured."""
    outcome: str
    """"holds", "holds in part" or "not seen here"."""
    words: str
    """Why."""


class Claim(NamedTuple):
    """A sentence of a paper, and how it is put to the test.

    `measure` takes the seconds to spend on a timed row and returns plain data; the others make words, tables and a
    picture of that data alone, so that they can do it again from a file.
    """

    key: str
    title: str
    paper: str
    statement: str
    method: str
    measure: Callable[[float], dict[str, Any]]
    summarise: Callable[[Data], Summary]
    tables: Callable[[Data], list[Table]]
    picture: Callable[[Data], Picture]
    caption: str


def outcome(*tests: bool) -> str:
    """How a claim fares that holds if all of these do.

    Example:
        >>> outcome(True, True), outcome(True, False), outcome(False)
        ('holds', 'holds in part', 'not seen here')
    """
    return HOLDS if all(tests) else IN_PART if any(tests) else NOT_HERE
