"""Times of a network and of its blocks: plain torch in two layouts, and fastblocks, in interleaved rounds."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fastblocks
from fastblocks.analysis import Operator, count
from fastblocks.bench.errors import BenchError
from fastblocks.bench.profile.blocks import tensors
from fastblocks.bench.profile.loading import Subject, calm, one_line
from fastblocks.bench.timing import AGREEMENT, difference, interleaved

__all__ = ["CHANNELS_LAST", "FUSED", "STOCK", "Side", "Times", "call_overhead", "operator_times", "race", "sides"]

STOCK, CHANNELS_LAST, FUSED = "torch NCHW", "torch channels_last", "fastblocks"
OPERATOR_ROUNDS = 10
OVERHEAD_ROUNDS = 50

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Of one call."""
Times = dict[str, list[float]]
"""Seconds of each round by the name of the side."""


class Side(NamedTuple):
    """One way to compute the network."""

    name: str
    model: nn.Module
    channels_last: bool
    """Whether blocks get their inputs in this layout."""
    backend: str | None = None
    """The tier under which it runs; None leaves it as it is."""

    def run(self, paths: Sequence[str], calls: Sequence[Inputs]) -> list[Any]:
        """Call modules one after the other, for each of these inputs of the first; their results."""
        modules = [self.model.get_submodule(path) for path in paths]
        results = []
        with fastblocks.use_backend(self.backend) if self.backend else contextlib.nullcontext():
            for args, kwargs in calls:
                out = modules[0](*args, **kwargs)
                for module in modules[1:]:
                    out = module(out)
                results.append(out)
        return results


def sides(subject: Subject) -> list[Side]:
    """The ways there are: torch, torch in channels_last if the network can be brought into it, fastblocks if it can."""
    own = subject.fused is subject.stock
    reference = "reference" if own else None
    found = [Side(STOCK, subject.stock, False, reference)]
    try:
        with calm():
            other = copy.deepcopy(subject.stock).to(memory_format=torch.channels_last)
    except Exception:  # whatever the user's modules or their tensors cannot do
        other = None
    if other is not None:
        found.append(Side(CHANNELS_LAST, other, True, reference))
    if subject.fused is not None:
        found.append(Side(FUSED, other if own and other is not None else subject.fused, True))
    return found


def race(name: str, ways: Sequence[Side], paths: Sequence[str], calls: Sequence[Inputs], rounds: int) -> Times | str:
    """Seconds of modules that run one after the other, on these inputs; or why they cannot run by themselves.

    Raises:
        BenchError: fastblocks computes something else than torch.
    """
    try:
        with torch.no_grad():
            runners = _checked_runners(name, ways, paths, calls)
            return interleaved(runners, rounds)
    except BenchError:
        raise
    except Exception as error:  # the user's modules may raise anything
        return one_line(error)


def _checked_runners(
    name: str, ways: Sequence[Side], paths: Sequence[str], calls: Sequence[Inputs]
) -> dict[str, Callable[[], object]]:
    """What is to be timed, after each side's results were found to agree."""
    runners: dict[str, Callable[[], object]] = {}
    results: dict[str, list[Any]] = {}
    for side in ways:
        inputs = _copied(calls, side.channels_last)
        before = _copied(inputs, False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            results[side.name] = side.run(paths, inputs)
        changed = any(not torch.equal(*pair) for pair in zip(tensors(inputs), tensors(before), strict=True))
        runners[side.name] = _runner(side, paths, before, changed)
    if FUSED in results:
        _compare(name, results[FUSED], results.get(CHANNELS_LAST, results[STOCK]))
    return runners


def _runner(side: Side, paths: Sequence[str], inputs: Sequence[Inputs], changed: bool) -> Callable[[], object]:
    """A block that writes into its input gets a fresh copy each time."""
    if changed:
        return lambda: side.run(paths, _copied(inputs, False))
    return lambda: side.run(paths, inputs)


def _copied(calls: Sequence[Inputs], channels_last: bool) -> list[Inputs]:
    """Copies of the tensors among the inputs, in their own layout or in channels_last."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if channels_last and leaf.dim() == 4:
            return leaf.clone(memory_format=torch.channels_last)
        return leaf.clone()

    return [tree_map(copied, call) for call in calls]


def _compare(name: str, ours: Any, theirs: Any) -> None:
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        if not (b.is_floating_point() and b.numel()):
            continue
        off = difference(a, b)
        if not off <= AGREEMENT:
            raise BenchError(
                f"{name}: {off:.1e} of the largest value lies between fastblocks and torch, allowed is "
                f"{AGREEMENT:.0e}; this is a fault of fastblocks, please report it"
            )


def operator_times(side: Side, x: Tensor, rounds: int) -> list[Operator]:
    """The operators of a run of the network, each with the median of its seconds."""
    x = _copied([((x,), {})], side.channels_last)[0][0][0]
    with fastblocks.use_backend(side.backend) if side.backend else contextlib.nullcontext():
        runs = [count(side.model, x) for _ in range(min(rounds, OPERATOR_ROUNDS) + 1)][1:]
    if len({len(run) for run in runs}) > 1:  # the network decides anew each time what it runs
        return runs[-1]
    return [
        calls[-1]._replace(seconds=statistics.median(call.seconds for call in calls))
        for calls in zip(*runs, strict=True)
    ]


def call_overhead() -> float:
    """Seconds of a convolution of 8 channels on one pixel: next to nothing to compute."""
    conv, x = nn.Conv2d(8, 8, 1), torch.ones(1, 8, 1, 1)
    with torch.no_grad():
        return statistics.median(interleaved({"": lambda: conv(x)}, OVERHEAD_ROUNDS)[""])
