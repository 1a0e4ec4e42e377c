"""One row of `pytest --benchmark-only`: compared with float64, then timed, in the group of those that do the same.

    pytest --benchmark-only                         # quick: under five minutes on two cores
    FASTBLOCKS_BENCH=full pytest --benchmark-only   # all ops, batches, numbers of threads and training steps; an hour
    FASTBLOCKS_BENCH_SECONDS=0.01 ...               # how long each row is timed

A group has four rows: fastblocks and three ways of running plain torch (`contenders.py`). They run one after another,
each with enough rounds for a steady median; but a slow spell of the machine falls on one row and not on its neighbour.
Side-by-side ratios for publication come from ``fastblocks bench``, which interleaves its rounds, and those of a
training step from ``python benchmarks/train_step.py``. All rows share a process, and so an allocator: torch's training
steps may find memory here that a fresh process must ask the kernel for.

Without --benchmark-only or --benchmark-enable every benchmark skips itself before it builds anything.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from contenders import check, compiling, nothing_left_to_torch, problem, runner
from kinks import away_from_kinks
from shapes import Shape
from torch import Tensor
from training import State, batch_of, contender, forward_backward, fresh_state, gradients_of, scale, step_of, stock

import fastblocks
from fastblocks.bench import machine
from fastblocks.bench.words import counted

FULL = os.environ.get("FASTBLOCKS_BENCH", "") == "full"
SECONDS = float(os.environ.get("FASTBLOCKS_BENCH_SECONDS", "1.0" if FULL else "0.25"))
WARM_UP = 3
LEAST_ROUND = 1e-3  # seconds: shorter calls are timed several to a round
LEAST_ROUNDS = 7

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3
"""Of the norm of each parameter's gradient, with no value at a kink (`kinks.py`). Rounding in float32 makes up to 3e-4
of it in torch, 3e-5 in fastblocks. A value on the wrong side of a kink makes 1e-2 of it, a missing term 1e-1."""


def _thread_counts() -> list[int]:
    """One and all; in the full profile also the powers of two between them."""
    most = torch.get_num_threads()
    between = [1 << i for i in range(1, most.bit_length())] if FULL else []
    return sorted({1, *between, most})


THREADS = _thread_counts()


class Row(NamedTuple):
    """What was measured of a contender."""

    group: str
    contender: str
    seconds: float
    """Median of a call."""


class Training(NamedTuple):
    """A training step: of which network, on pictures of which size, how many."""

    model: str
    resolution: int
    batch: int

    @property
    def name(self) -> str:
        return f"training step {self.model} {self.resolution}x{self.resolution}"


def count(word: str, n: int) -> str:
    return counted(n, word).replace(" ", "-")


# ------------------------------------------------------------------------------------------------------------- running


def run_inference(benchmark: Any, rows: list[Row], shape: Shape, who: str, batch: int, threads: int) -> None:
    """Compare one contender's output, then time it."""
    with torch.no_grad(), _setting(who, threads, freezing=True):
        task = problem(shape, batch)
        run = runner(shape, who, task.state, task.x)
        with _guard(who):
            check(run(), task.truth)
        row = _time(benchmark, run, shape.name, who, batch, threads)
        peak = _limits(threads).gflops
        share = 2 * task.multiply_adds / row.seconds / peak / 1e9 if task.multiply_adds else None
    benchmark.extra_info |= {"multiply_adds": task.multiply_adds, "peak_gflops": peak, "share_of_peak": share}
    rows.append(row)


def run_training(benchmark: Any, rows: list[Row], training: Training, who: str, threads: int) -> None:
    """Compare one contender's loss and gradients, then time its steps."""
    mode = "compile_channels_last" if who == "compile" else who
    with _setting(who, threads, freezing=False):
        state, images, target, loss, truth = _training_problem(training)
        network, run, images = contender(training.model, mode, state, images)
        with _guard(who):
            found = forward_backward(network, run, images, target).item()
        assert abs(found - loss) <= LOSS_TOLERANCE * abs(loss), f"the loss is {found:.8g}, in float64 {loss:.8g}"
        check_gradients(gradients_of(network), truth)
        step = step_of(network, run, images, target)
        rows.append(_time(benchmark, step, training.name, who, training.batch, threads))


def check_gradients(found: State, truth: State) -> None:
    """Raises an AssertionError if a gradient is not what float64 says, up to float32's rounding."""
    assert found.keys() == truth.keys(), sorted(found.keys() ^ truth.keys())
    for name, true in truth.items():
        error = (found[name] - true).norm().item() / scale(truth, name)[0]
        assert error <= GRADIENT_TOLERANCE, f"the gradient of {name} is off by {error:.2g} of its norm"


@functools.lru_cache(maxsize=1)
def _training_problem(training: Training) -> tuple[State, Tensor, Tensor, float, State]:
    """Weights, pictures and classes, and the loss and gradients in float64."""
    images, target = batch_of(training.batch, training.resolution)
    state, _ = away_from_kinks(fresh_state(training.model), images)
    network = stock(state).double()
    loss = forward_backward(network, network, images.double(), target).item()
    return state, images, target, loss, gradients_of(network)


@contextlib.contextmanager
def _setting(who: str, threads: int, *, freezing: bool) -> Iterator[None]:
    """That many torch threads, which fastblocks uses too, and a compiler that starts from nothing."""
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if who != "compile":
            yield
            return
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            pytest.skip(f"torch.compile needs a C++ compiler, and there is no {compiler}")
        with compiling(freezing=freezing):
            yield
    finally:
        torch.set_num_threads(former)


def _guard(who: str) -> contextlib.AbstractContextManager[None]:
    return nothing_left_to_torch() if who == "fastblocks" else contextlib.nullcontext()


@functools.lru_cache
def _limits(threads: int) -> machine.Limits:
    """What the machine can do with the present number of threads; measured once."""
    assert threads == torch.get_num_threads()
    return machine.limits()


_facts = functools.lru_cache(machine.facts)


def _time(benchmark: Any, run: Callable[[], object], what: str, who: str, batch: int, threads: int) -> Row:
    group = f"{what}, batch {batch}, {counted(threads, 'thread')}"
    benchmark.group = group
    for _ in range(WARM_UP):
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
    iterations = max(1, round(LEAST_ROUND / once))
    rounds = min(max(round(SECONDS / (once * iterations)), LEAST_ROUNDS), 1000)
    benchmark.pedantic(run, rounds=rounds, iterations=iterations)
    tier = fastblocks.current_backend() if who == "fastblocks" else None
    benchmark.extra_info |= {"contender": who, "batch": batch, "threads": threads, "tier": tier, "machine": _facts()}
    return Row(group, who, benchmark.stats.stats.median)
