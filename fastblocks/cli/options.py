"""Options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["as_json", "rounds", "threads"]

Command = TypeVar("Command", bound=Callable[..., Any])


def threads(command: Command) -> Command:
    """``--threads``: an argument `threads`, None if it is not given."""
    kind = click.IntRange(1, os.cpu_count())
    return click.option("--threads", type=kind, metavar="N", help="CPU threads.  [default: torch's]")(command)


def as_json(instead_of: str) -> Callable[[Command], Command]:
    """``--json``: a flag `as_json`. `instead_of` is what is printed without it."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print JSON instead of {instead_of}.")


def rounds(default: int, if_none: str = "") -> Callable[[Command], Command]:
    """``--rounds``: an argument `rounds`. With 0 of them there is what `if_none` says; without it, 0 is refused."""
    kind = click.IntRange(0 if if_none else 1, 10_000)
    text = "Timing rounds" + (f"; 0: {if_none}." if if_none else ".")
    return click.option("--rounds", type=kind, default=default, show_default=True, metavar="N", help=text)
