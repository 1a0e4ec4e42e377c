"""The profile of a network as one plain dictionary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks.analysis import Operator, Rates, advise, bound, count
from fastblocks.analysis.cost import total
from fastblocks.bench import machine
from fastblocks.bench.errors import BenchError
from fastblocks.bench.profile import blocks as parts
from fastblocks.bench.profile.blocks import Block
from fastblocks.bench.profile.loading import Subject, load, told_of
from fastblocks.bench.profile.timing import FUSED, Times, call_overhead, operator_times, race, sides

__all__ = ["REST", "profile"]

PASSES = 3
AGAIN = "it ran once, but not again"
REST = "(rest)"
"""What the network computes outside its blocks."""

OnStep = Callable[[int, int, str], object]


@torch.random.fork_rng(devices=[])
def profile(
    model: str,
    *,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    rounds: int = 30,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Count a network block by block, time it beside fastblocks, and say what the design guidelines make of it.

    Args:
        model: see `loading.load`.
        batch: images at once.
        size: height and width of the images; None: those that the network was made for.
        threads: CPU threads; None: torch's.
        rounds: of timing; 0: counts only.
        on_step: called with steps done, steps in all and what is being done.

    Returns:
        Plain numbers and strings, ready for json; seconds and bytes have no prefix. ``blocks`` is a list of rows that
        sum to ``total``, the last of them, "(rest)", what is outside all blocks; ``network`` has the times of the
        whole network, ``limits`` what the machine can do at most, ``advice`` the guidelines.

    Raises:
        BenchError: there is no such network, it takes something else than an image, or fastblocks and torch disagree.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    told = on_step or (lambda done, steps, what: None)
    told(0, 0, f"building {model}")
    torch.manual_seed(0)
    subject = load(model)
    x = torch.randn(batch, 3, *(size or subject.size))
    own = subject.fused is subject.stock
    with told_of(model, f"it failed on one float32 image tensor {tuple(x.shape)}, which is what it was given"):
        with torch.no_grad():
            subject.stock(x)  # lazy modules find their shapes
        operators = count(subject.stock, x)
    with told_of(model, AGAIN):
        found = parts.find(subject.stock, lambda: subject.stock(x), operators, subject.fused)
    rows = _rows(subject.stock, found, operators)
    result: dict[str, Any] = {
        "model": subject.name,
        "source": subject.source,
        "class": type(subject.fused if subject.source == "fastblocks" else subject.stock).__name__,
        "fastblocks": "none" if subject.fused is None else "own layers" if own else "counterpart",
        "input": list(x.shape),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "backend": fastblocks.backend_info(),
        "machine": machine.facts(),
        "blocks": rows,
        "total": _total(subject.stock, rows, operators),
        "uncounted": sorted({operator.name for operator in operators if operator.kind == "uncounted"}),
    }
    if not rounds:
        advice = advise(_grouped(found, operators), timed=False)
        return result | {"limits": None, "network": None, "advice": [entry._asdict() for entry in advice]}
    return result | _measured(subject, x, found, result, told)


def _measured(
    subject: Subject, x: Tensor, found: Sequence[Block], result: dict[str, Any], told: OnStep
) -> dict[str, Any]:
    """Time everything, in a few passes over the network, so that a slow spell of the machine falls on all alike."""
    rows, ways = result["blocks"], sides(subject)
    limits: list[machine.Limits] = []
    passes = min(PASSES, result["rounds"])
    steps = passes * (len(found) + 2)
    whole: Times = {}
    times: list[Times] = [{} for _ in found]
    for turn in range(passes):
        rounds = (result["rounds"] + turn) // passes
        done = turn * (len(found) + 2)
        told(done, steps, "the machine's limits")
        limits.append(machine.limits())
        told(done + 1, steps, "the whole network")
        seconds = race(subject.name, ways, [""], [((x,), {})], rounds)
        if isinstance(seconds, str):
            raise BenchError(f"MODEL {subject.name!r}: {AGAIN}: {seconds}")
        _add(whole, seconds)
        for number, block in enumerate(found):
            told(done + 2 + number, steps, block.name)
            seconds = race(block.name, ways, block.runs, [(call.args, call.kwargs) for call in block.calls], rounds)
            if isinstance(seconds, str):
                rows[number]["why_not_timed"] = seconds
            else:
                _add(times[number], seconds)
    network = _medians(whole)
    best = min((name for name in network if name != FUSED), key=lambda name: network[name])
    with told_of(subject.name, AGAIN):
        timed = operator_times(next(side for side in ways if side.name == best), x, result["rounds"])
    grouped = _grouped(found, timed)
    for row, seconds in zip(rows, times, strict=False):
        row["seconds"] = _medians(seconds)
    if rows and rows[-1]["name"] == REST:
        rows[-1]["seconds"] = {best: sum(operator.seconds for operator in grouped.get(REST, ()))}
    gflops, gbps = max(limit.gflops for limit in limits), max(limit.gbps for limit in limits)
    for row in (*rows, result["total"]):
        row["roofline_seconds"], row["bound_by"] = bound(row["multiply_adds"], row["least"], gflops, gbps)
    result["total"]["seconds"] = network
    call_seconds = call_overhead()
    return {
        "limits": {"gflops": gflops, "gbps": gbps, "how": limits[0].how, "call_seconds": call_seconds},
        "network": {"seconds": network, "best": best},
        "advice": [entry._asdict() for entry in advise(grouped, Rates(1e9 * gbps, call_seconds))],
    }


def _add(times: Times, more: Times) -> None:
    for name, seconds in more.items():
        times.setdefault(name, []).extend(seconds)


def _medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _grouped(found: Sequence[Block], operators: Sequence[Operator]) -> dict[str, list[Operator]]:
    """The operators by block, in the blocks' order; the rest at the end, if there is any."""
    groups: dict[str, list[Operator]] = {block.name: [] for block in found}
    for operator in operators:
        name = next((block.name for block in found if block.holds(operator.module)), REST)
        groups.setdefault(name, []).append(operator)
    return groups


def _rows(model: nn.Module, found: Sequence[Block], operators: Sequence[Operator]) -> list[dict[str, Any]]:
    """A row for each block, and one for the rest if there is any: counts only."""
    groups, counted = _grouped(found, operators), set[int]()
    rows = []
    for block in found:
        modules = [model.get_submodule(path) for path in block.paths]
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        weights = sum(t.numel() * t.element_size() for t in tensors.values() if t.is_floating_point())
        least = sum(call.moved for call in block.calls) + weights
        row = _row(block.name, type(modules[0]).__name__, groups[block.name], least)
        rows.append(row | {"parameters": _parameters(modules, counted)})
    parameters = _parameters([model], counted)
    if groups.get(REST) or parameters:
        rows.append(_row(REST, "", groups.get(REST, []), None) | {"parameters": parameters})
    return rows


def _row(name: str, kind: str, operators: Sequence[Operator], least: int | None) -> dict[str, Any]:
    sums: Mapping[str, int] = total(operators)
    least = sums["moved"] if least is None else min(least, sums["moved"])
    return {
        "name": name,
        "class": kind,
        **sums,
        "least": least,
        "operators": len(operators),
        **_intensities(sums["multiply_adds"], sums["moved"], least),
    }


def _intensities(multiply_adds: int, moved: int, least: int) -> dict[str, float]:
    """Operations a byte: of the operators one by one, and of the block as one operator."""
    return {
        "intensity": 2 * multiply_adds / moved if moved else 0.0,
        "fused_intensity": 2 * multiply_adds / least if least else 0.0,
    }


def _parameters(modules: Sequence[nn.Module], counted: set[int]) -> int:
    """Numbers in the parameters that no earlier row has counted."""
    new = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in counted}
    counted |= set(new)
    return sum(new.values())


def _total(model: nn.Module, rows: Sequence[Mapping[str, Any]], operators: Sequence[Operator]) -> dict[str, Any]:
    sums, least = total(operators), sum(row["least"] for row in rows)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **sums,
        "least": least,
        "operators": len(operators),
        **_intensities(sums["multiply_adds"], sums["moved"], least),
    }
