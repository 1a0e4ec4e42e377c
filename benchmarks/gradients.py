"""Gradients of the networks in training mode: fastblocks and torch, both in float32, against torch in float64.

For each network and seed, one forward and backward pass of a small batch; for the input and each parameter, the norm of
the gradient's error over the norm of the gradient. What counts is the median over seeds. Fastblocks may be off by twice
what torch's float32 is off by, or by 1e-5.

    python benchmarks/gradients.py
    python benchmarks/gradients.py --models mobilenet_v2 --seeds 3 --json gradients.json

Two things would make these figures noise, and are taken out:

- Where a value lies at a kink of an activation, float32 may take the other side than float64 does. `kinks.py` moves the
  shifts of BatchNorm such that none does.
- The shift of a BatchNorm that a 1x1 convolution and another BatchNorm follow has no effect: its gradient is zero but
  for rounding. Its error is taken over the norm of the gradient of the same BatchNorm's scale.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kinks import away_from_kinks
from rich.console import Console
from shapes import MODELS
from torch import Tensor, nn
from training import State, batch_of, fresh_state, ours, scale, slim_table, stock, wide_console

TIMES_TORCH, FLOOR = 2.0, 1e-5  # the bar: so many times torch's error, or so much
SHOWN = 5  # parameters in each table


class Row(NamedTuple):
    """Errors of one parameter's gradient, medians over seeds."""

    parameter: str
    fastblocks: float
    torch: float
    vanishing: bool

    @property
    def allowed(self) -> float:
        return max(TIMES_TORCH * self.torch, FLOOR)

    @property
    def of_allowed(self) -> float:
        """What the bar is compared by; an error that is no number misses it."""
        share = self.fastblocks / self.allowed
        return share if share == share else float("inf")


def gradients(model: nn.Module, x: Tensor, target: Tensor) -> State:
    """The gradients of the input and of all parameters, in float64."""
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), target).backward()
    tensors = {"input": x, **dict(model.named_parameters())}
    return {name: tensor.grad.double() for name, tensor in tensors.items() if tensor.grad is not None}


def one_seed(name: str, seed: int, batch: int, resolution: int) -> tuple[dict[str, tuple[float, float, bool]], float]:
    """For each parameter: the errors of fastblocks and torch, and whether the gradient vanishes. And the margin."""
    x, target = batch_of(batch, resolution, seed)
    state, margin = away_from_kinks(fresh_state(name, seed), x)
    truth = gradients(stock(state).double(), x.double(), target)
    found = [gradients(model, x, target) for model in (ours(name, state), stock(state))]
    errors = {}
    for parameter, exact in truth.items():
        size, vanishing = scale(truth, parameter)
        ours_error, torch_error = ((side[parameter] - exact).norm().item() / size for side in found)
        errors[parameter] = (ours_error, torch_error, vanishing)
    return errors, margin


def compare(name: str, seeds: int, batch: int, resolution: int) -> tuple[list[Row], float]:
    """All parameters of a network, the one that is nearest to the bar first; and the least margin."""
    runs, margins = zip(*(one_seed(name, seed, batch, resolution) for seed in range(seeds)), strict=True)
    rows = []
    for parameter in runs[0]:
        errors = [run[parameter] for run in runs]
        mine, theirs = (statistics.median(error[side] for error in errors) for side in (0, 1))
        rows.append(Row(parameter, mine, theirs, vanishing=any(error[2] for error in errors)))
    return sorted(rows, key=lambda row: -row.of_allowed), min(margins)


def summary(name: str, rows: list[Row], margin: float, seconds: float) -> dict[str, Any]:
    missed = sum(row.of_allowed > 1 for row in rows)
    return {
        "model": name,
        "ok": missed == 0,
        "parameters": len(rows) - 1,  # and the input
        "missed": missed,
        "vanishing": sum(row.vanishing for row in rows),
        "nearest_to_a_kink": margin,
        "seconds": seconds,
        "rows": [{**row._asdict(), "allowed": row.allowed, "of_allowed": row.of_allowed} for row in rows],
    }


def print_network(result: dict[str, Any], console: Console) -> None:
    """A line on the network, and a table of the parameters that are nearest to the bar."""
    verdict = "[bold green]ok[/]" if result["ok"] else f"[bold red]missed by {result['missed']}[/]"
    facts = f"{result['parameters']} parameters and the input, {result['vanishing']} gradients vanish"
    console.print(f"[bold]{result['model']}[/]: {verdict}  [dim]{facts}, {result['seconds']:.0f} s[/]", soft_wrap=True)
    table = slim_table("nearest to the bar", "fastblocks", "torch float32", "ratio", "of the bar")
    for row in result["rows"][:SHOWN]:
        ratio = row["fastblocks"] / row["torch"] if row["torch"] else float("nan")
        numbers = (f"{row['fastblocks']:.1e}", f"{row['torch']:.1e}", f"{ratio:.2f}", f"{row['of_allowed']:.2f}")
        name = row["parameter"] + " (vanishes)" * row["vanishing"]
        table.add_row(name, *numbers, style="red" if row["of_allowed"] > 1 else "")
    console.print(table, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of fastblocks.models.list()")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all parameters' errors to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = wide_console()
    results = []
    for name in arguments.models:
        start = time.perf_counter()
        rows, margin = compare(name, arguments.seeds, arguments.batch, arguments.resolution)
        results.append(summary(name, rows, margin, time.perf_counter() - start))
        print_network(results[-1], console)
    if arguments.json:
        setting = {key: getattr(arguments, key) for key in ("seeds", "batch", "resolution", "threads")}
        arguments.json.write_text(json.dumps({**setting, "networks": results}, indent=2))
    sys.exit(any(not result["ok"] for result in results))


if __name__ == "__main__":
    main()
