"""Whole networks, beside the same ones in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import CONTENDERS, NETWORKS, Shape, ids, only_when_asked, run_benchmark, threads

__all__ = ["only_when_asked", "threads"]  # fixtures


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", NETWORKS, ids=ids)
@pytest.mark.parametrize("batch", (1, 8), ids=lambda n: f"batch-{n}")
def test_network(benchmark: Any, shape: Shape, batch: int, threads: int, contender: str) -> None:
    run_benchmark(benchmark, NETWORKS, Shape, ids, contender, batch, threads)
