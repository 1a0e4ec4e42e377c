"""What the tests of `fastblocks study` share; the fixture `quick_study` is in conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastblocks.bench.study import CLAIMS
from fastblocks.bench.study.claim import Claim

KEYS = ["separable", "shares", "resnext", "groups", "manifold", "memory", "g1", "g2", "g3", "g4"]
Study = tuple[Path, dict[str, Any]]
"""A folder with the files of a study, and its result."""


def claim(key: str) -> Claim:
    return next(each for each in CLAIMS if each.key == key)
