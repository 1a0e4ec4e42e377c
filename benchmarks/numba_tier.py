"""The numba tier beside torch eager, channels_last: the ops that it compiles, and the networks.

    python benchmarks/numba_tier.py ops
    python benchmarks/numba_tier.py networks --batch 8

Rounds are interleaved; each row has the medians, and the median over rounds of torch's time divided by fastblocks'.
Everything is compiled and run once before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable

import torch
from shapes import OPS, Shape
from torch import Tensor, nn

import fastblocks
from fastblocks.bench.machine import cpu_name
from fastblocks.bench.stock import stock_model
from fastblocks.bench.timing import interleaved, speed_up
from fastblocks.models.common import channels_last

NETWORKS = ("mobilenet_v1", "mobilenet_v2", "shufflenet_v1_g3", "shufflenet_v2_x1_0")
TOLERANCE = 1e-4  # of the largest value

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def op(shape: Shape, batch: int) -> Pair:
    """An op of the benchmarks' shapes: torch's and ours."""
    stock = shape.stock().eval()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    ours = shape.ours().eval()
    ours.load_state_dict(stock.state_dict())
    stock = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    x = torch.randn(batch, *shape.size).contiguous(memory_format=torch.channels_last)
    channels_last(ours)
    return lambda: stock(x), lambda: ours(x)


def network(name: str, batch: int) -> Pair:
    """A network: torch's and ours."""
    ours = fastblocks.models.create(name).eval()
    stock = stock_model(ours.state_dict()).eval().to(memory_format=torch.channels_last)
    image = torch.randn(batch, 3, 224, 224)
    last = image.contiguous(memory_format=torch.channels_last)
    return lambda: stock(last), lambda: ours(image)


def measure(title: str, rows: list[tuple[str, Pair]], rounds: int) -> float:
    """Time the rows; the geometric mean of what fastblocks is faster by."""
    print(title)
    ratios = []
    for name, (stock, ours) in rows:
        want, found = stock(), ours()
        error = ((found - want).abs().max() / want.abs().max()).item()
        if not error <= TOLERANCE:
            raise SystemExit(f"{name}: the output is off by {error:.2g} of the largest value")
        seconds = interleaved({"torch": stock, "fastblocks": ours}, rounds)
        ratios.append(speed_up(seconds["torch"], seconds["fastblocks"]))
        times = (statistics.median(seconds[who]) * 1e3 for who in ("torch", "fastblocks"))
        print(f"  {name:56}" + "".join(f"{t:10.3f}" for t in times) + f"{ratios[-1]:8.2f} x")
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
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.tier}, batch {arguments.batch}, {arguments.threads} threads, {cpu_name()}; ms of torch, fastblocks"
    )
    with torch.no_grad(), fastblocks.use_backend(arguments.tier):
        if arguments.what == "networks":
            rows = [(name, network(name, arguments.batch)) for name in NETWORKS]
            measure("networks", rows, arguments.rounds)
        else:
            for kind in dict.fromkeys(shape.name.split()[0] for shape in OPS):
                rows = [(s.name, op(s, arguments.batch)) for s in OPS if s.name.split()[0] == kind]
                measure(kind, rows, arguments.rounds)
        fallbacks = fastblocks.backend_info(counts=True)["fallbacks"]
        print(f"fallbacks: {fallbacks or 'none'}")


if __name__ == "__main__":
    main()
