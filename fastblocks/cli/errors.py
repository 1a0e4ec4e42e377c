"""The exceptions that the command turns into one line."""

from __future__ import annotations

from importlib.util import find_spec

import click

__all__ = ["Disagreement", "UserError", "need"]


class UserError(click.ClickException):
    """Something the user can mend: a file, an option, the network."""

    exit_code = 2


class Disagreement(click.ClickException):
    """fastblocks and torch computed different logits: a fault of ours, no timing is worth printing."""

    exit_code = 1


def need(extra: str, what: str, *packages: str) -> None:
    """Raise a UserError where one of the packages is not installed: `what` needs it, and the extra brings it."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{what} needs {package}: pip install 'fastblocks[{extra}]'")
