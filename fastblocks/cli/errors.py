"""The exceptions that the command turns into one line."""

from __future__ import annotations

import click

__all__ = ["Disagreement", "UserError"]


class UserError(click.ClickException):
    """Something the user can mend: a file, an option, the network."""

    exit_code = 2


class Disagreement(click.ClickException):
    """fastblocks and torch computed different logits: a fault of ours, no timing is worth printing."""

    exit_code = 1
