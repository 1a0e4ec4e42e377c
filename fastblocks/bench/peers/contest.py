"""Rounds of turns, interleaved, and what comes of them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastblocks
from fastblocks.bench import stock
from fastblocks.bench.errors import BenchError
from fastblocks.bench.machine import Limits, limits
from fastblocks.bench.peers import ENGINES, PEERS, worker
from fastblocks.bench.peers.environments import python_of
from fastblocks.bench.peers.problem import cost, write_problem
from fastblocks.bench.process import Peer, environment
from fastblocks.bench.timing import quartiles

__all__ = ["TOLERANCE", "Contest", "hold", "summarise"]

TOLERANCE = 1e-3  # of the largest logit: engines multiply in other orders, some by Winograd's method
FAILURES = (RuntimeError, OSError, KeyError)  # of a peer: no answer, no process, an answer without what it should say
PATIENCE = 60.0  # seconds for a turn, beside its own length


class Contest(NamedTuple):
    """What is compared: a network, the images a call, and how long."""

    model: str
    batch: int
    threads: int
    rounds: int
    seconds: float
    peers: Sequence[str]


class _Row:
    """A contender's process and the milliseconds of its turns."""

    def __init__(self, process: Peer, version: str, error: float) -> None:
        self.process, self.version, self.error = process, version, error
        self.milliseconds: list[float] = []


def hold(contest: Contest, tell: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Run a contest; the result holds plain numbers and strings, ready for json.

    Rounds go A B C ... A B C ..., so that a slow spell of the machine falls on everybody, and each round measures the
    machine's limits too. A contender that is not installed, computes something else or crashes is left out and named
    with the reason; the others go on.

    Args:
        contest: what to compare; `threads` becomes torch's number of threads here, too.
        tell: is called with a word about what goes on.

    Raises:
        BenchError: there is no such network, or nobody could be timed.
    """
    if contest.model not in fastblocks.models.list():
        expected = ", ".join(fastblocks.models.list())
        raise BenchError(f"model: no network {contest.model!r}, expected one of {expected}")
    torch.set_num_threads(contest.threads)
    left_out: dict[str, str] = {}
    rows: dict[str, _Row] = {}
    machine: list[Limits] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tell("writing the network")
        failures = write_problem(contest.model, contest.batch, {PEERS[name].reads for name in contest.peers}, folder)
        try:
            for name in contest.peers:
                tell(f"starting {PEERS[name].title}")
                row = failures.get(PEERS[name].reads) or _start(name, contest, folder)
                if isinstance(row, str):
                    left_out[name] = row
                else:
                    rows[name] = row
            for number in range(contest.rounds):
                tell(f"round {number + 1} of {contest.rounds}")
                machine.append(limits())
                _play(rows, left_out, contest.seconds)
        finally:
            for row in rows.values():
                row.process.close()
    if not any(row.milliseconds for row in rows.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise BenchError(f"peers: none of them could be timed ({reasons})")
    return summarise(contest, rows, machine, left_out)


def _start(name: str, contest: Contest, folder: Path) -> _Row | str:
    """A contender that is ready, or why there is none."""
    peer = PEERS[name]
    python = python_of(peer)
    if python is None:
        return f"not installed: pip install {' '.join(peer.packages)}, or fastblocks bench --setup-peers"
    options = {"peer": name, "folder": folder, "threads": contest.threads, "stock": stock.__file__}
    command = [python, worker.__file__, *(part for key, value in options.items() for part in (f"--{key}", value))]
    try:
        process = Peer(name, [str(part) for part in command], environment(contest.threads))
    except OSError as error:
        return _reason(error)
    try:
        found = process.answer()
        row = _Row(process, found["version"], found["error"])
    except FAILURES as error:
        process.close()
        return _reason(error)
    if not row.error <= TOLERANCE:  # a NaN is left out, too
        process.close()
        return f"its output differs by {row.error:.1e} of the largest logit, allowed is {TOLERANCE:.0e}"
    return row


def _play(rows: dict[str, _Row], left_out: dict[str, str], seconds: float) -> None:
    """One round; who fails in it is out."""
    for name in list(rows):
        try:
            rows[name].milliseconds.append(rows[name].process.ask(seconds, PATIENCE + seconds)["milliseconds"])
        except FAILURES as error:
            rows.pop(name).process.close()
            left_out[name] = f"it failed while it was timed: {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"its answer has no {error}" if isinstance(error, KeyError) else str(error)


def summarise(
    contest: Contest, rows: dict[str, Any], machine: Sequence[Limits], left_out: dict[str, str]
) -> dict[str, Any]:
    """Medians, spreads and ratios of a contest.

    ``fastblocks_takes`` is the median over rounds of fastblocks' time divided by the row's in the same round;
    ``share_of_peak`` the median of the network's operations a second divided by the limit measured in the same round.
    """
    spent = cost(contest.model)
    flops = 2 * spent["multiply_adds"] * contest.batch
    ours = rows["fastblocks"].milliseconds if "fastblocks" in rows else None
    result = []
    for name, row in rows.items():
        times = row.milliseconds
        shares = [flops / (1e6 * time * limit.gflops) for time, limit in zip(times, machine, strict=True)]
        result.append(
            {
                "name": name,
                "title": PEERS[name].title,
                "version": row.version,
                "milliseconds": statistics.median(times),
                "quartiles": quartiles(times)[::2],
                "fastblocks_takes": None if ours is None or name == "fastblocks" else _ratio(ours, times),
                "share_of_peak": statistics.median(shares),
                "difference": row.error,
                "rounds": times,
            }
        )
    engines = [rows[name].milliseconds for name in ENGINES if name in rows]
    best = None
    if ours and engines:
        best = _ratio(ours, [min(round_) for round_ in zip(*engines, strict=True)])
    return {
        **{key: value for key, value in contest._asdict().items() if key != "peers"},
        **spent,
        "gflops": statistics.median(limit.gflops for limit in machine),
        "gbps": statistics.median(limit.gbps for limit in machine),
        "limit_by": machine[0].how,
        "rows": result,
        "left_out": left_out,
        "fastblocks_takes_of_best_engine": best,
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
