"""MobileNetV2 as a whole, beside torchvision's."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import CONTENDERS, NETWORK, only_when_asked, run_benchmark, threads

__all__ = ["only_when_asked", "threads"]  # fixtures


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", (1, 8), ids=lambda n: f"batch-{n}")
def test_network(benchmark: Any, batch: int, threads: int, contender: str) -> None:
    run_benchmark(benchmark, NETWORK, contender, batch, threads)
