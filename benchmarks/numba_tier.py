"""The numba tier beside torch eager, channels_last: the ops that it compiles, and the networks.

    python benchmarks/numba_tier.py ops
    python benchmarks/numba_tier.py networks --batch 8

Rounds are interleaved; each row has the medians, and the median over rounds of torch's time divided by fastblocks'.
Everything is compiled, run and compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence

import torch
from contenders import check, problem, runner
from shapes import NETWORKS, OPS, Shape

import fastblocks
from fastblocks.bench.machine import cpu_name
from fastblocks.bench.timing import interleaved, speed_up


def measure(title: str, shapes: Sequence[Shape], batch: int, rounds: int) -> float:
    """Time the shapes; the geometric mean of what fastblocks is faster by."""
    print(title)
    ratios = []
    for shape in shapes:
        task = problem(shape, batch)
        contenders = {who: runner(shape, who, task.state, task.x) for who in ("channels_last", "fastblocks")}
        for who, run in contenders.items():
            try:
                check(run(), task.truth)
            except AssertionError as error:
                raise SystemExit(f"{shape.name}, {who}: {error}") from None
        seconds = interleaved(contenders, rounds)
        ratios.append(speed_up(seconds["channels_last"], seconds["fastblocks"]))
        times = (statistics.median(times) * 1e3 for times in seconds.values())
        print(f"  {shape.name:56}" + "".join(f"{t:10.3f}" for t in times) + f"{ratios[-1]:8.2f} x")
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"  {'geometric mean':76}{mean:8.2f} x")
    return mean


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ops", "networks"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tier", default="numba", choices=fastblocks.backends.NAMES)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.tier}, batch {arguments.batch}, {arguments.threads} threads, {cpu_name()}; ms of torch, fastblocks"
    )
    with torch.no_grad(), fastblocks.use_backend(arguments.tier):
        if arguments.what == "networks":
            measure("networks", NETWORKS, arguments.batch, arguments.rounds)
        else:
            for kind in dict.fromkeys(shape.name.split()[0] for shape in OPS):
                shapes = [shape for shape in OPS if shape.name.split()[0] == kind]
                measure(kind, shapes, arguments.batch, arguments.rounds)
        fallbacks = fastblocks.backend_info(counts=True)["fallbacks"]
        print(f"fallbacks: {fallbacks or 'none'}")


if __name__ == "__main__":
    main()
