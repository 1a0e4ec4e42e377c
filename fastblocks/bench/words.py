"""How numbers, machines and files of results are written, the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["counted", "digits", "stem", "torch_version"]


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Example:
        >>> counted(1, "thread"), counted(2, "thread")
        ('1 thread', '2 threads')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def digits(value: float) -> str:
    """A number with three digits that say something.

    Example:
        >>> digits(1234.5), digits(123.45), digits(12.345), digits(1.2), digits(0.012345), digits(0)
        ('1,234', '123', '12.3', '1.20', '0.0123', '0.00')
    """
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def torch_version(facts: Mapping[str, Any]) -> str:
    """Torch's version without the tag of its build.

    Example:
        >>> torch_version({"torch": "2.14.1+cpu"})
        '2.14.1'
    """
    return str(facts["torch"]).partition("+")[0]


def stem(what: Sequence[str], facts: Mapping[str, Any]) -> str:
    """A file name without its ending: what was measured, on which processor, with which torch, when.

    Args:
        what: words; signs that do not belong into a file name become hyphens.
        facts: see `machine.facts`.

    Example:
        >>> stem(["bench", "mobilenet_v2"], {"cpu": "AMD EPYC 7", "torch": "2.14.1+cpu", "date": "2026-11-24"})
        'bench-mobilenet_v2-amd-epyc-7-torch2.14.1-2026-11-24'
    """
    parts = [*what, str(facts["cpu"]).lower(), f"torch{torch_version(facts)}", str(facts["date"])]
    return "-".join(filter(None, (re.sub(r"[^\w.+]+", "-", part).strip("-.") for part in parts)))
