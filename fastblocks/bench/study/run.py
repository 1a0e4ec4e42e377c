"""All claims, one after the other, as one plain dictionary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastblocks.bench.errors import BenchError
from fastblocks.bench.machine import facts
from fastblocks.bench.study import guidelines, mobilenet, mobilenet_v2, shufflenet
from fastblocks.bench.study.claim import Claim

__all__ = ["CLAIMS", "chosen", "study"]

FORMAT = 1
CLAIMS: tuple[Claim, ...] = (*mobilenet.CLAIMS, *shufflenet.CLAIMS, *mobilenet_v2.CLAIMS, *guidelines.CLAIMS)


def study(
    keys: Sequence[str] = (), *, seconds: float = 1.0, tell: Callable[[Claim], object] = lambda claim: None
) -> dict[str, Any]:
    """Measure claims.

    Args:
        keys: which; none is all of them.
        seconds: to spend on each timed row.
        tell: is called in front of each claim.

    Returns:
        Facts of the machine, and for each claim its words, what was measured, and a verdict; or its error.

    Raises:
        BenchError: there is no such claim.

    Example:
        >>> study(["groups"])["claims"]["groups"]["outcome"]
        'holds'
    """
    claims = chosen(keys)
    result: dict[str, Any] = {"format": FORMAT, "facts": facts() | {"threads": torch.get_num_threads()}}
    result |= {"seconds_a_row": seconds, "claims": {}}
    for claim in claims:
        tell(claim)
        entry: dict[str, Any] = {"title": claim.title, "paper": claim.paper}
        try:
            measured = claim.measure(seconds)
            entry |= {"measured": measured} | verdict(claim, measured)
        except Exception as error:  # whatever it is, it is this claim's alone
            entry["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result["claims"][claim.key] = entry
    return result


def verdict(claim: Claim, measured: Mapping[str, Any]) -> dict[str, str]:
    """What a measurement says of its claim."""
    found = claim.summarise(measured)
    return {"paper_says": found.paper, "found": found.ours, "outcome": found.outcome, "because": found.words}


def chosen(keys: Sequence[str]) -> list[Claim]:
    """The claims of these names, in the order of the papers."""
    known = [claim.key for claim in CLAIMS]
    for key in keys:
        if key not in known:
            raise BenchError(f"--only: no claim {key!r}, expected some of {', '.join(known)}")
    return [claim for claim in CLAIMS if not keys or claim.key in keys]
