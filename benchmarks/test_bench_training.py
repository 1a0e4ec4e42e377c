"""Training steps of whole networks, beside the same ones in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
from contenders import CONTENDERS
from rows import FULL, THREADS, Row, Training, count, run_training
from shapes import MODELS

pytest_plugins = ["bench_plugin"]

# Compiling a step takes torch a minute, so the quick profile has one, which is small besides.
STEPS = [Training(model, 224, 16) for model in MODELS] if FULL else [Training("mobilenet_v2", 128, 8)]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("threads", THREADS if FULL else THREADS[-1:], ids=lambda n: count("thread", n))
@pytest.mark.parametrize("training", STEPS, ids=lambda t: f"{t.model}_{t.resolution}x{t.resolution}-batch-{t.batch}")
def test_training_step(benchmark: Any, rows: list[Row], training: Training, threads: int, contender: str) -> None:
    run_training(benchmark, rows, training, contender, threads)
