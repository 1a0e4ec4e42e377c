"""How often each op was called, by which tier, and what a tier left to plain torch.

Counted are the calls that pass through Python. A layer of the native tier is checked there once; its later calls run in
C and are not counted. Whatever falls back is counted at every call, in every tier.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["called", "fell_back", "reset", "snapshot"]

_calls: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[tuple[str, str]] = Counter()


def called(op: str, tier: str) -> None:
    """Count a call of an op."""
    _calls[op, tier] += 1


def fell_back(what: str, reason: str) -> None:
    """Count a call that the current tier left to plain torch: of an op, or of a layer, which ran its children."""
    _fallbacks[what, reason] += 1


def reset() -> None:
    """Start again from nothing."""
    _calls.clear()
    _fallbacks.clear()


def snapshot() -> dict[str, Any]:
    """The counts so far: ``calls`` by op and tier, ``fallbacks`` by op or layer and reason.

    Example:
        >>> import torch, fastblocks
        >>> reset()
        >>> _ = fastblocks.functional.global_avg_pool(torch.ones(1, 2, 3, 3, dtype=torch.float64))
        >>> snapshot()["calls"]
        {'global_avg_pool': {'reference': 1}}
    """
    found: dict[str, Any] = {"calls": {}, "fallbacks": {}}
    for part, counter in (("calls", _calls), ("fallbacks", _fallbacks)):
        for (what, detail), count in sorted(counter.items()):
            found[part].setdefault(what, {})[detail] = count
    return found
