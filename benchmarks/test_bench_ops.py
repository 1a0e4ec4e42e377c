"""Each op in sizes of MobileNetV2, beside torch."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import CONTENDERS, FULL, OPS, Shape, ids, only_when_asked, run_benchmark, threads

__all__ = ["only_when_asked", "threads"]  # fixtures


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", (1, 8) if FULL else (1,), ids=lambda n: f"batch-{n}")
@pytest.mark.parametrize("shape", OPS, ids=ids)
def test_op(benchmark: Any, shape: Shape, batch: int, threads: int, contender: str) -> None:
    run_benchmark(benchmark, shape, contender, batch, threads)
