"""Channel shuffles beside plain torch: fused with the split behind them, and in the stores of grouped 1x1 convolutions.

    python benchmarks/shuffles.py split
    python benchmarks/shuffles.py grouped --json grouped.json

split: `channel_shuffle_split` beside torch's shuffle and chunk, in both memory formats, out of the caches and in them.
Both sides write to memory that they wrote to before. torch has the better of `channel_shuffle` and of views that are
copied; halves that lie apart already, as an NCHW image's do, are not copied again. The copy beside them is torch's
`copy_`, of as many bytes: its time divided by ours is our share of that bandwidth. Where it does not store past the
caches, a copy that does is faster.

grouped: a grouped 1x1 convolution with BatchNorm, ReLU and shuffle beside the same in torch eager, channels_last: the
widths of ShuffleNet's three stages with 2, 3, 4 and 8 groups, into the bottleneck and out of it.

Rounds are interleaved, and results compared with torch's before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as tF
from numba_tier import geometric_mean, measure
from shapes import grouped
from torch import Tensor

from fastblocks import functional
from fastblocks.bench.machine import facts
from fastblocks.bench.timing import interleaved, speed_up
from fastblocks.bench.words import counted

CHANNELS = (58, 116, 232, 464, 976)
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
PLACES = {"memory": (16, 64 << 20), "cache, 1 image": (1, 160 << 10), "cache, 4 images": (4, 160 << 10)}
"""Where: images, and about how many bytes of them."""

STAGES = {2: 200, 3: 240, 4: 272, 8: 384}
"""Of ShuffleNet: a number of groups, and the width of stage 2, at 28x28; each stage after it has twice the width."""


# --------------------------------------------------------------------------------------------------------------- splits


def torch_splits(x: Tensor, form: torch.memory_format) -> dict[str, Callable[[], Any]]:
    """Torch's two ways; what `channel_shuffle` makes before the split is a tensor of its own each time."""
    n, c, h, w = x.shape
    whole = torch.empty_like(x)
    targets = [torch.empty(n, c // 2, h, w).contiguous(memory_format=form) for _ in range(2)]

    def halves(y: Tensor) -> list[Tensor]:
        parts = y.chunk(2, 1)
        if all(part.is_contiguous(memory_format=form) for part in parts):
            return list(parts)
        return [target.copy_(part) for target, part in zip(targets, parts, strict=True)]

    def views() -> list[Tensor]:
        whole.view(n, c // 2, 2, h, w).copy_(x.view(n, 2, c // 2, h, w).transpose(1, 2))
        return halves(whole)

    return {"views": views, "channel_shuffle": lambda: halves(tF.channel_shuffle(x, 2))}


def many(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    """So many calls as one."""

    def all_of_them() -> None:
        for _ in range(calls):
            run()

    return all_of_them


def splits(rounds: int) -> list[dict[str, Any]]:
    """Time the splits; a row for each."""
    rows = []
    print(f"{'':40}     GB/s   of copy   x torch")
    for place, (images, size) in PLACES.items():
        for name, form in FORMATS.items():
            for channels in CHANNELS:
                side = round(math.sqrt(size / (4 * channels * images)))
                x = torch.randn(images, channels, side, side).contiguous(memory_format=form)
                target = torch.empty_like(x)
                runners = torch_splits(x, form)
                for way, run in runners.items():
                    for found, true in zip(functional.channel_shuffle_split(x, 2), run(), strict=True):
                        if not torch.equal(found, true):
                            raise SystemExit(f"{channels} channels, {name}: not what torch has by {way}")
                runners["copy"] = lambda target=target, x=x: target.copy_(x)
                runners["fastblocks"] = lambda x=x: functional.channel_shuffle_split(x, 2)
                calls = max(1, (1 << 22) // x.nbytes)
                seconds = interleaved({who: many(run, calls) for who, run in runners.items()}, rounds)
                torch_seconds = [min(pair) for pair in zip(seconds["views"], seconds["channel_shuffle"], strict=True)]
                ms = {who: statistics.median(times) * 1e3 / calls for who, times in seconds.items()}
                row = {
                    "place": place, "format": name, "size": list(x.shape), "ms": ms,
                    "gbps": 2 * x.nbytes / ms["fastblocks"] * 1e-6,
                    "of_copy": speed_up(seconds["copy"], seconds["fastblocks"]),
                    "faster": speed_up(torch_seconds, seconds["fastblocks"]),
                }  # fmt: skip
                rows.append(row)
                title = f"{place}, {name}, {'x'.join(map(str, x.shape))}"
                print(f"{title:40}{row['gbps']:9.1f}{row['of_copy']:9.0%}{row['faster']:9.2f}")
    return rows


# -------------------------------------------------------------------------------------------------------------- grouped


def convolutions(batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time the grouped convolutions; a row for each."""
    rows = []
    for groups, width in STAGES.items():
        sizes = [(width << stage, 28 >> stage) for stage in range(3)]
        shapes = [grouped(*ends, groups, side) for c, side in sizes for ends in ((c, c // 4), (c // 4, c))]
        rows += measure(f"batch {batch}, {groups} groups; ms of torch, fastblocks", shapes, batch, rounds)
    return [{**row, "batch": batch} for row in rows]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("split", "grouped"))
    parser.add_argument("--batch", type=int, action="append", help="of the convolutions; may be repeated; 1 and 8")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    setting = {"what": arguments.what, "threads": arguments.threads, "rounds": arguments.rounds, "facts": facts()}
    print(f"{counted(arguments.threads, 'thread')}, {setting['facts']['cpu']}, {setting['facts']['isa']}")
    with torch.no_grad():
        if arguments.what == "split":
            rows = splits(arguments.rounds)
        else:
            rows = [row for batch in arguments.batch or (1, 8) for row in convolutions(batch, arguments.rounds)]
            setting["mean"] = geometric_mean(rows)
            least = min(rows, key=lambda row: row["faster"])
            print(f"geometric mean of {len(rows)}: {setting['mean']:.2f} x")
            print(f"the least: {least['faster']:.2f} x, {least['name']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**setting, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
