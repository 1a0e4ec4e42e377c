"""The numba tier beside torch eager, channels_last: the ops that it compiles, and the networks.

    python benchmarks/numba_tier.py ops
    python benchmarks/numba_tier.py networks --batch 8 --json networks.json

Rounds are interleaved; each row has the medians, and the median over rounds of torch's time divided by fastblocks'.
Everything is compiled, run and compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import check, problem, runner
from shapes import NETWORKS, OPS, Shape

import fastblocks
from fastblocks.bench.machine import facts
from fastblocks.bench.timing import interleaved, speed_up
from fastblocks.bench.words import counted

WHO = ("channels_last", "fastblocks")


def measure(title: str, shapes: Sequence[Shape], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time the shapes; a row for each, with how many times faster fastblocks is."""
    print(title)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        task = problem(shape, batch)
        contenders = {who: runner(shape, who, task.state, task.x) for who in WHO}
        for who, run in contenders.items():
            try:
                check(run(), task.truth)
            except AssertionError as error:
                raise SystemExit(f"{shape.name}, {who}: {error}") from None
        seconds = interleaved(contenders, rounds)
        ms = {who: statistics.median(seconds[who]) * 1e3 for who in WHO}
        rows.append({"name": shape.name, "ms": ms, "faster": speed_up(*(seconds[who] for who in WHO))})
        print(f"  {shape.name:56}" + "".join(f"{ms[who]:10.3f}" for who in WHO) + f"{rows[-1]['faster']:8.2f} x")
    print(f"  {'geometric mean':76}{geometric_mean(rows):8.2f} x")
    return rows


def geometric_mean(rows: Sequence[dict[str, Any]]) -> float:
    """Of what fastblocks is faster by.

    >>> round(geometric_mean([{"faster": 1.0}, {"faster": 4.0}]), 9)
    2.0
    """
    return math.exp(statistics.fmean(math.log(row["faster"]) for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ops", "networks"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tier", default="numba", choices=fastblocks.backends.NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    setting = {key: getattr(arguments, key) for key in ("tier", "what", "batch", "threads", "rounds")}
    with torch.no_grad(), fastblocks.use_backend(arguments.tier):
        setting["facts"] = facts()
        how = f"batch {arguments.batch}, {counted(arguments.threads, 'thread')}, {setting['facts']['cpu']}"
        print(f"{arguments.tier}, {how}; ms of torch, fastblocks")
        shapes: dict[str, list[Shape]] = {"networks": list(NETWORKS)}
        if arguments.what == "ops":
            kinds = dict.fromkeys(shape.name.split()[0] for shape in OPS)
            shapes = {kind: [shape for shape in OPS if shape.name.split()[0] == kind] for kind in kinds}
        rows = {kind: measure(kind, some, arguments.batch, arguments.rounds) for kind, some in shapes.items()}
        fallbacks = fastblocks.backend_info(counts=True)["fallbacks"]
        print(f"fallbacks: {fallbacks or 'none'}")
    if arguments.json:
        means = {kind: geometric_mean(some) for kind, some in rows.items()}
        arguments.json.write_text(json.dumps({**setting, "means": means, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
