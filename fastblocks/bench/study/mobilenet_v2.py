"""MobileNetV2's claims (Sandler et al. 2018): what ReLU does to a manifold, and the memory of an inverted residual."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks import models
from fastblocks.bench.charts import Picture
from fastblocks.bench.page import Table
from fastblocks.bench.process import Peer, environment
from fastblocks.bench.stock import stock_model
from fastblocks.bench.study.claim import Claim, Data, Summary, outcome
from fastblocks.bench.study.counting import operations
from fastblocks.bench.study.networks import seeded
from fastblocks.bench.study.pictures import bars, clouds
from fastblocks.bench.words import counted
from fastblocks.functional import ConvBN, pointwise_conv_bn_act

__all__ = ["CLAIMS", "embed"]

DIMS = (2, 3, 5, 15, 30)
MORE_DIMS = (100, 1000)  # beyond the figure: the error goes on falling
POINTS = 150
SEEDS = 500  # random matrices, of which the picture shows the first

# ----------------------------------------------------------------------------------------------------------- manifold


def spiral() -> Tensor:
    """Points of a spiral in the plane, (POINTS, 2), none of them further than 1 from the middle."""
    t = torch.linspace(0.5, 4 * torch.pi, POINTS, dtype=torch.float64)
    return torch.stack([t * t.cos(), t * t.sin()], 1) / t.max()


def embed(dims: int, seeds: int) -> dict[str, Tensor]:
    """A spiral through random matrices T (dims x 2) and ReLU, and back by the pseudo-inverse of T.

    ReLU halves what comes back (half of a random matrix's outputs are cut off), which is a scale and no collapse: so
    the result is scaled to fit before it is compared.

    Returns:
        ``points``: ``(seeds, POINTS, 2)``; ``error``: ``(seeds,)``, the norm of the difference to the spiral over the
        spiral's; ``lost``: ``(seeds, POINTS)``, the points of which fewer than two outputs are left, so that nothing
        can bring them back.
    """
    points = spiral()
    with seeded(), torch.no_grad():
        matrices = torch.randn(seeds, dims, 2)
        image = points.float().T.reshape(1, 2, 1, POINTS)
        out = pointwise_conv_bn_act(image, ConvBN(matrices.view(-1, 2, 1, 1)), activation="relu")
    values = out.view(seeds, dims, POINTS).double()
    back = (torch.linalg.pinv(matrices.double()) @ values).transpose(1, 2)
    scale = (back * points).sum((1, 2)) / back.square().sum((1, 2)).clamp_min(1e-30)
    back = scale[:, None, None] * back
    error = (back - points).flatten(1).norm(dim=1) / points.norm()
    return {"points": back, "error": error, "lost": (values > 0).sum(1) < 2}


def _measure_manifold(seconds: float) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    panels: dict[str, Any] = {"input": {"points": _rounded(spiral()), "lost": "0" * POINTS}}
    for dims in (*DIMS, *MORE_DIMS):
        found = embed(dims, SEEDS)
        rows[str(dims)] = {
            "error": float(found["error"].mean()),
            "lost": float(found["lost"].double().mean()),
            "expected_lost": (dims + 1) / 2**dims,
        }
        if dims in DIMS:
            lost = "".join("01"[bit] for bit in found["lost"][0].int().tolist())
            panels[str(dims)] = {"points": _rounded(found["points"][0]), "lost": lost}
    return {"rows": rows, "panels": panels, "matrices": SEEDS}


def _rounded(points: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in point] for point in points.tolist()]


def _summarise_manifold(data: Data) -> Summary:
    rows = {int(dims): row for dims, row in data["rows"].items()}
    errors = [row["error"] for row in rows.values()]
    falls = errors == sorted(errors, reverse=True)
    collapses = rows[2]["lost"] > 0.5 and rows[3]["lost"] > 0.25
    kept = rows[30]["lost"] < 1e-3
    shown = f"{100 * rows[2]['lost']:.0f} % and {100 * rows[3]['lost']:.0f} %"
    words = (
        f"{shown} of the points are lost for good in 2 and 3 dimensions, {100 * rows[30]['lost']:.2g} % in 30; the "
        f"relative error after the way back {'falls' if falls else 'does not fall'} from {rows[2]['error']:.2f} (2) to "
        f"{rows[30]['error']:.2f} (30) and {errors[-1]:.2f} ({max(rows)})"
    )
    return Summary(
        "collapse for n = 2, 3",
        f"lost: {shown}; n = 30: {100 * rows[30]['lost']:.2g} %",
        outcome(falls, collapses, kept),
        words,
    )


def _tables_manifold(data: Data) -> list[Table]:
    headings = ("dimensions n", "relative error, mean", "points lost, %", "(n + 1) / 2ⁿ, %")
    lines = [
        (dims, f"{row['error']:.3f}", f"{100 * row['lost']:.3g}", f"{100 * row['expected_lost']:.3g}")
        for dims, row in data["rows"].items()
    ]
    return [Table(headings, lines)]


def _picture_manifold(data: Data) -> Picture:
    panels = {}
    for name, panel in data["panels"].items():
        title = name if name == "input" else f"n = {name}"
        lost = panel["lost"].count("1") / len(panel["lost"])
        panels[title] = {**panel, "note": "" if name == "input" else f"{100 * lost:.0f} % lost"}
    return clouds(panels, "A spiral, and what comes back of it after ReLU in 2, 3, 5, 15 and 30 dimensions")


# ------------------------------------------------------------------------------------------------------------- memory

BLOCK = (16, 24, 2, 6)  # inputs, outputs, stride, expand ratio
SIZE = 112
PAPER_TABLE = {112: (16, 400), 56: (32, 200), 28: (64, 100), 14: (160, 62), 7: (320, 32)}
"""Pixels of a side: channels and KB of 16-bit activations (table 3)."""
PAPER_MOBILENET = 1600


def _measure_memory(seconds: float) -> dict[str, Any]:
    block = fastblocks.InvertedResidual(*BLOCK)
    parts = operations(block, 1, BLOCK[0], SIZE, SIZE)
    fused = 4 * (parts[0].read + parts[-1].written)
    result: dict[str, Any] = {
        "operators": {each.name: {"kind": each.kind, "bytes": 4 * (each.read + each.written)} for each in parts},
        "expanded": 4 * parts[0].written,
        "unfused": max(4 * (each.read + each.written) for each in parts),
        "fused": fused,
        "scratch": {str(threads): _scratch(threads) for threads in sorted({1, torch.get_num_threads()})},
    }
    return result | _between_blocks()


def _scratch(threads: int) -> dict[str, int] | None:
    """What the block's kernel takes, in a fresh process, whose peak is the block's alone."""
    command = [sys.executable, "-m", "fastblocks.bench.study.scratch", str(threads), str(SIZE), *map(str, BLOCK)]
    process = Peer("scratch", command, environment(threads))
    try:
        found: dict[str, int] | None = process.answer(120)["scratch"]
        return found
    finally:
        process.close()


def _between_blocks() -> dict[str, Any]:
    """The largest activations between blocks, 16 bits a number, by the pixels of a side."""
    begins: dict[int, int] = {}
    stands: dict[int, int] = {}
    largest: list[int] = []

    def inverted(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        for x in (args[0], out):
            stands[x.shape[2]] = max(stands.get(x.shape[2], 0), x.shape[1])
        begins[args[0].shape[2]] = max(begins.get(args[0].shape[2], 0), out.shape[1])

    def separable(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        largest.append(2 * out.numel())

    for name, hook in (("mobilenet_v2", inverted), ("mobilenet_v1", separable)):
        network = stock_model(models.create(name).state_dict()).to("meta")
        blocks: Any = network.get_submodule("features")
        for block in list(blocks)[2 if name == "mobilenet_v2" else 1 :]:
            if not isinstance(block, nn.Sequential) or hasattr(block, "pointwise"):
                block.register_forward_hook(hook)
        with torch.no_grad():
            network(torch.empty(1, 3, 224, 224, device="meta"))
    rows = {}
    for size in PAPER_TABLE:
        channels = stands[size] if size == max(PAPER_TABLE) else begins[size]
        rows[str(size)] = {"channels": channels, "bytes": 2 * channels * size**2}
    return {"between_blocks": rows, "mobilenet": max(largest)}


def _summarise_memory(data: Data) -> Summary:
    unfused, fused = data["unfused"] / 1e6, data["fused"] / 1e6
    table = all(
        row["channels"] == PAPER_TABLE[int(size)][0] and abs(row["bytes"] / 1e3 / PAPER_TABLE[int(size)][1] - 1) < 0.025
        for size, row in data["between_blocks"].items()
    )
    taken = [found["scratch"] for found in data["scratch"].values() if found]
    words = f"{unfused:.2f} MB operator by operator, {fused:.2f} MB as one: {unfused / fused:.1f} times less"
    if taken:
        words += f"; the kernel's scratch is {max(taken) / 1e6:.2f} MB, the expanded tensor would be "
        words += f"{data['expanded'] / 1e6:.2f} MB"
    else:
        words += "; this tier keeps no count of its scratch"
    words += f"; between blocks {'as in table 3' if table else 'not as in table 3'}"
    return Summary(
        "that of the bottleneck",
        f"{unfused:.2f} and {fused:.2f} MB, {unfused / fused:.1f} x",
        outcome(table, fused < unfused, not taken or max(taken) < data["expanded"] / 4),
        words,
    )


def _tables_memory(data: Data) -> list[Table]:
    lines = [(f"{name} ({each['kind']})", f"{each['bytes'] / 1e6:.2f}") for name, each in data["operators"].items()]
    lines.append(("as one operator", f"{data['fused'] / 1e6:.2f}"))
    for threads, found in data["scratch"].items():
        if found:
            lines.append((f"the kernel's scratch, {counted(int(threads), 'thread')}", f"{found['scratch'] / 1e6:.2f}"))
    lines.append(("the expanded tensor", f"{data['expanded'] / 1e6:.2f}"))
    first = Table(("16-96-24, stride 2, 112x112, float32", "MB"), lines, strong=[len(data["operators"])])
    rows = [
        (
            f"MobileNetV2 at {size}x{size}", str(row["channels"]), f"{row['bytes'] / 1e3:.0f}",
            str(PAPER_TABLE[int(size)][0]), str(PAPER_TABLE[int(size)][1]),
        )
        for size, row in data["between_blocks"].items()
    ]  # fmt: skip
    rows.append(("MobileNet, largest", "64", f"{data['mobilenet'] / 1e3:.0f}", "", str(PAPER_MOBILENET)))
    return [first, Table(("between blocks, 16 bits", "channels", "KB", "paper: channels", "paper: KB"), rows)]


def _picture_memory(data: Data) -> Picture:
    kinds = ("expansion, 1x1", "depthwise 3x3", "projection, 1x1")
    rows = {name: {"torch": each["bytes"] / 1e6} for name, each in zip(kinds, data["operators"].values(), strict=True)}
    rows["all three as one"] = {"fastblocks": data["fused"] / 1e6}
    for threads, found in data["scratch"].items():
        if found:
            rows[f"its scratch, {counted(int(threads), 'thread')}"] = {"fastblocks": found["scratch"] / 1e6}
    alt = "Bars: megabytes of input and output of each operator of a 16-96-24 block, and of the block as one operator"
    return bars({"": rows}, "MB", alt)


CLAIMS = (
    Claim(
        "manifold",
        "ReLU collapses a low-dimensional manifold, unless it lies in many dimensions",
        "Sandler et al. 2018 (MobileNetV2), section 3.2 and figure 1",
        "Through a random matrix into n dimensions and ReLU, a spiral collapses for n = 2, 3 and survives for 15, 30.",
        "A spiral through random matrices and fastblocks' 1x1 convolution with ReLU, back by the pseudo-inverse and "
        "scaled to fit. A point is lost for good where fewer than two outputs stay above zero: signs are fair coins, "
        "so (n + 1) of 2ⁿ points.",
        _measure_manifold,
        _summarise_manifold,
        _tables_manifold,
        _picture_manifold,
        "What comes back, for one matrix. Crosses: points that are lost for good.",
    ),
    Claim(
        "memory",
        "An inverted residual needs the memory of its bottlenecks",
        "Sandler et al. 2018 (MobileNetV2), section 5.1 and table 3",
        "As one operator, a block's memory is that of the narrow input and output; the expanded tensor is never whole.",
        "The largest input and output of any one operator, counted on real layers, BatchNorm and ReLU6 in place; "
        "beside it the scratch that fastblocks' kernel really takes (memory_stats, in a fresh process); and "
        "the activations between the blocks of whole networks, 224x224, as table 3 has them.",
        _measure_memory,
        _summarise_memory,
        _tables_memory,
        _picture_memory,
        "Memory of the 16-96-24 block at 112x112, stride 2: torch's operators one by one, and fastblocks' block.",
    ),
)
