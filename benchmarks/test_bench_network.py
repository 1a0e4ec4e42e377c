"""Whole networks, beside the same ones in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
from contenders import CONTENDERS
from rows import FULL, THREADS, Row, count, run_inference
from shapes import NETWORKS, Shape, ids

pytest_plugins = ["bench_plugin"]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("threads", THREADS, ids=lambda n: count("thread", n))
@pytest.mark.parametrize("batch", (1, 8) if FULL else (1,), ids=lambda n: f"batch-{n}")
@pytest.mark.parametrize("shape", NETWORKS, ids=ids)
def test_network(benchmark: Any, rows: list[Row], shape: Shape, batch: int, threads: int, contender: str) -> None:
    run_inference(benchmark, rows, shape, contender, batch, threads)
