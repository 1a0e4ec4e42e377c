"""The machine: what it is, and what it can do at most."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastblocks
from fastblocks import backends

__all__ = ["Limits", "cpu_name", "facts", "limits"]

SECONDS = 0.05  # of one measurement of a limit
ROUNDS = 5
STREAM_BYTES = 1 << 27  # far beyond any cache


class Limits(NamedTuple):
    """What the machine does at most with torch's present number of threads."""

    gflops: float
    """Float32 multiply-adds, two operations each, in 1e9 operations a second."""
    gbps: float
    """Memory traffic in 1e9 bytes a second: what is read plus what is written."""
    how: str
    """Whose multiply-adds they were: an instruction set level's, or torch.mm's where there are no native kernels."""


def facts() -> dict[str, Any]:
    """Processor, versions and date, as plain strings and numbers.

    Example:
        >>> sorted(facts())
        ['cores', 'cpu', 'date', 'fastblocks', 'isa', 'python', 'system', 'torch']
    """
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": fastblocks.backend_info().get("isa"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastblocks": fastblocks.__version__,
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The processor's name as Linux tells it, else as the platform module does."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def limits() -> Limits:
    """Measure them, in about a second.

    The best of several tries counts: what disturbs a measurement only ever makes it slower. Bandwidth is that of a sum
    (which only reads) or of a copy (which reads and writes as much), whichever is higher.
    """
    source = torch.ones(STREAM_BYTES // 4)
    target = torch.ones_like(source)
    copy = 2 * STREAM_BYTES / _fastest(lambda: target.copy_(source))
    read = STREAM_BYTES / _fastest(lambda: source.sum())
    spin, how = _multiply_adds()
    return Limits(spin / 1e9, max(copy, read) / 1e9, how)


def _multiply_adds() -> tuple[float, str]:
    spin = backends.spin
    if spin is None:
        side = 1024
        a, b = torch.ones(side, side), torch.ones(side, side)
        return 2 * side**3 / _fastest(lambda: a @ b), "torch.mm"
    steps, seconds = 1 << 12, 0.0
    while seconds < SECONDS:
        steps *= 2
        seconds = _seconds(partial(spin, steps))
    flops, level = spin(steps)
    return flops / _fastest(partial(spin, steps)), level


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _fastest(run: Callable[[], object]) -> float:
    run()
    return min(_seconds(run) for _ in range(ROUNDS))
