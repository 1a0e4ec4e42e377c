"""MobileNet's claims (Howard et al. 2017): what a depthwise separable convolution costs, and where the cost is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks import models
from fastblocks.bench.charts import Picture
from fastblocks.bench.page import Table
from fastblocks.bench.stock import stock_model
from fastblocks.bench.study.claim import Claim, Data, Summary, outcome
from fastblocks.bench.study.counting import by_kind, operations, portions
from fastblocks.bench.study.kinds import time_by_kind
from fastblocks.bench.study.networks import seeded
from fastblocks.bench.study.pictures import bars, shares
from fastblocks.bench.study.timing import Pair, busy, spread, timed
from fastblocks.bench.timing import quartiles
from fastblocks.functional import ConvBN, depthwise_separable

__all__ = ["CLAIMS"]

LAYERS = ((32, 64, 112), (128, 128, 56), (256, 256, 28), (512, 512, 14), (1024, 1024, 7))
"""Inputs, outputs and pixels of a side: a block of MobileNet at each resolution (table 1), at stride 1."""
PAPER_SHARES = {"1x1": 94.86, "depthwise": 3.06, "3x3": 1.19, "linear": 0.18}
PAPER_MILLIONS = {"full": 4866, "separable": 569}

# ---------------------------------------------------------------------------------------------------------- separable


class _Separable(nn.Sequential):
    """A depthwise and a 1x1 convolution as one op."""

    def forward(self, x: Tensor) -> Tensor:
        convs: Any = self
        depthwise, pointwise = (ConvBN(conv.weight) for conv in convs)
        return depthwise_separable(x, depthwise, pointwise, activation=None)


def _pairs(inputs: int, outputs: int, size: int) -> dict[str, Pair]:
    with seeded():
        x = torch.randn(1, inputs, size, size)
        plain = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        ours = fastblocks.ConvBNAct(inputs, outputs, norm_layer=None, activation_layer=None, bias=False)
        ours.load_state_dict(plain.state_dict())
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        separable = nn.Sequential(depthwise, nn.Conv2d(inputs, outputs, 1, bias=False))
        return {"full": Pair(plain, ours, x), "separable": Pair(separable, _Separable(*separable), x)}


def _measure_separable(seconds: float) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for inputs, outputs, size in LAYERS:
        pairs = _pairs(inputs, outputs, size)
        cost = {
            name: sum(each.multiply_adds for each in operations(pair.plain, *pair.x.shape))
            for name, pair in pairs.items()
        }
        times, layouts = timed(pairs, seconds)
        row: dict[str, Any] = {"multiply_adds": cost, "formula": 1 / outputs + 1 / 9, "layouts": layouts}
        for who in ("torch", "fastblocks"):
            ratios = [a / b for a, b in zip(times["separable"][who], times["full"][who], strict=True)]
            row[who] = {
                "seconds": {name: quartiles(times[name][who]) for name in pairs},
                "ratio": quartiles(ratios),
            }
        rows[f"{inputs} to {outputs}, {size}x{size}"] = row
    return {"rows": rows, "network": _network_cost()}


def _network_cost() -> dict[str, int]:
    """Multiply-adds of MobileNet, and of the same network with full 3x3 convolutions in place of the separable ones."""
    separable = stock_model(models.create("mobilenet_v1").state_dict())
    full = stock_model(models.create("mobilenet_v1").state_dict())
    blocks: Any = full.get_submodule("features")
    for block in list(blocks)[1:]:
        depthwise, pointwise = block.depthwise[0], block.pointwise[0]
        full_conv = nn.Conv2d(depthwise.in_channels, pointwise.out_channels, 3, depthwise.stride, 1, bias=False)
        block.depthwise, block.pointwise = nn.Identity(), nn.Sequential(full_conv, *block.pointwise[1:])
    return {
        name: sum(each.multiply_adds for each in operations(network, 1, 3, 224, 224))
        for name, network in (("full", full), ("separable", separable))
    }


def _counted(row: Data) -> float:
    return float(row["multiply_adds"]["separable"] / row["multiply_adds"]["full"])


def _summarise_separable(data: Data) -> Summary:
    rows = list(data["rows"].values())
    counts = all(abs(_counted(row) - row["formula"]) < 1e-12 for row in rows)
    millions = {name: round(cost / 1e6) for name, cost in data["network"].items()}
    as_printed = all(abs(millions[name] - printed) <= 1 for name, printed in PAPER_MILLIONS.items())
    less = [1 / _counted(row) for row in rows]
    gains = {who: [1 / row[who]["ratio"][1] for row in rows] for who in ("torch", "fastblocks")}
    as_fast = {who: sum(gain >= 0.9 * times for gain, times in zip(gains[who], less, strict=True)) for who in gains}
    words = (
        f"{min(less):.1f} to {max(less):.1f} times fewer multiply-adds{', as the formula has it' if counts else ''}; "
        f"in time {_range(gains['torch'])} times less in torch and {_range(gains['fastblocks'])} in fastblocks"
        + busy([max(spread(row[who]["seconds"][kind]) for who in gains for kind in PAPER_MILLIONS) for row in rows])
    )
    return Summary(
        f"8 to 9 x fewer; {PAPER_MILLIONS['full']} and {PAPER_MILLIONS['separable']} M",
        f"{min(less):.1f} to {max(less):.1f} x fewer; {millions['full']} and {millions['separable']} M",
        outcome(counts and as_printed, all(count == len(rows) for count in as_fast.values())),
        words,
    )


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def _tables_separable(data: Data) -> list[Table]:
    headings = (
        "", "full, M multiply-adds", "separable, M", "ratio", "1/N + 1/9", "torch: full, ms", "separable, ms", "ratio",
        "fastblocks: full, ms", "separable, ms", "ratio",
    )  # fmt: skip
    lines = []
    for name, row in data["rows"].items():
        cells = [name, *(f"{row['multiply_adds'][kind] / 1e6:.1f}" for kind in ("full", "separable"))]
        cells += [f"{_counted(row):.3f}", f"{row['formula']:.3f}"]
        for who in ("torch", "fastblocks"):
            cells += [f"{1e3 * row[who]['seconds'][kind][1]:.3f}" for kind in ("full", "separable")]
            cells.append(f"{row[who]['ratio'][1]:.3f}")
        lines.append(cells)
    network = data["network"]
    whole = ["the whole network", *(f"{network[kind] / 1e6:.0f}" for kind in ("full", "separable"))]
    lines.append([*whole, f"{network['separable'] / network['full']:.3f}", *[""] * 7])
    return [Table(headings, lines)]


def _picture_separable(data: Data) -> Picture:
    rows = {
        name: {
            "counted": 1 / _counted(row),
            "torch": 1 / row["torch"]["ratio"][1],
            "fastblocks": 1 / row["fastblocks"]["ratio"][1],
        }
        for name, row in data["rows"].items()
    }
    alt = "Bars: how many times less a depthwise separable convolution costs than a full one, counted and in time"
    return bars({"": rows}, "times less than the full convolution", alt, form="{:.1f}")


# ------------------------------------------------------------------------------------------------------------- shares


def _measure_shares(seconds: float) -> dict[str, Any]:
    with seeded():
        network = models.create("mobilenet_v1").eval()
        x = torch.randn(1, 3, 224, 224)
    plain = stock_model(network.state_dict())
    found = operations(plain, *x.shape)
    weights: dict[str, int] = {}
    for each in found:
        weights[each.kind] = weights.get(each.kind, 0) + each.weights
    return {"multiply_adds": dict(by_kind(found)), "weights": weights} | time_by_kind(plain, network, x, seconds)


def _summarise_shares(data: Data) -> Summary:
    counted = {kind: round(100 * share, 2) for kind, share in portions(data["multiply_adds"]).items()}
    same = {kind for kind, percent in PAPER_SHARES.items() if counted[kind] == percent}
    timed_ = {who: 100 * portions(data["seconds"][who])["1x1"] for who in ("torch", "fastblocks")}
    odd = [
        f"{kind} {counted[kind]} % where the paper prints {PAPER_SHARES[kind]}" for kind in counted if kind not in same
    ]
    words = (
        f"1x1 convolutions have {counted['1x1']} % of the multiply-adds{_also(odd)}; of the time they take "
        f"{timed_['torch']:.0f} % in torch and {timed_['fastblocks']:.0f} % in fastblocks"
    )
    in_time = all(percent >= 90 for percent in timed_.values())
    return Summary("94.86 %; 95 % of the time", f"{counted['1x1']} %", outcome("1x1" in same, in_time), words)


def _also(odd: list[str]) -> str:
    return f" ({'; '.join(odd)})" if odd else ""


def _tables_shares(data: Data) -> list[Table]:
    kinds = list(data["seconds"]["torch"])
    cost, weights = portions(data["multiply_adds"]), portions(data["weights"])
    times = {who: portions(data["seconds"][who]) for who in ("torch", "fastblocks")}
    headings = (
        "", "multiply-adds, M", "%", "paper, %", "weights, %", "torch, ms", "%", "fastblocks, ms", "%",
    )  # fmt: skip
    lines = []
    for kind in kinds:
        cells = [kind]
        if kind in cost:
            cells += [f"{data['multiply_adds'][kind] / 1e6:.2f}", f"{100 * cost[kind]:.2f}"]
            cells += [f"{PAPER_SHARES[kind]:.2f}", f"{100 * weights[kind]:.2f}"]
        else:
            cells += [""] * 4
        for who, share in times.items():
            has = kind in share
            cells += [f"{1e3 * data['seconds'][who][kind]:.2f}" if has else "in the others"]
            cells += [f"{100 * share[kind]:.1f}" if has else ""]
        lines.append(cells)
    whole = ["the whole network", f"{sum(data['multiply_adds'].values()) / 1e6:.2f}", "100", "", "100"]
    for who in ("torch", "fastblocks"):
        whole += [f"{1e3 * data['whole'][who]:.2f}", ""]
    return [Table(headings, [*lines, whole])]


def _picture_shares(data: Data) -> Picture:
    rows = {
        "multiply-adds": portions(data["multiply_adds"]),
        "time in torch": portions(data["seconds"]["torch"]),
        "time in fastblocks": portions(data["seconds"]["fastblocks"]),
    }
    return shares(rows, "Bars: shares of each kind of layer in MobileNet's multiply-adds and in the time of each")


CLAIMS = (
    Claim(
        "separable",
        "A depthwise separable convolution costs 1/N + 1/k² of the full one",
        "Howard et al. 2017 (MobileNet), section 3.1 and table 4",
        "A depthwise 3x3 and a 1x1 convolution together need 8 to 9 times fewer multiply-adds than a full 3x3.",
        "Multiply-adds counted on real layers, and the time of both in torch (the faster of two layouts) and in "
        "fastblocks, where the separable one is a single op; no BatchNorm, no activation.",
        _measure_separable,
        _summarise_separable,
        _tables_separable,
        _picture_separable,
        "How many times less the separable convolution costs than the full one.",
    ),
    Claim(
        "shares",
        "1x1 convolutions are 94.86 % of MobileNet's cost",
        "Howard et al. 2017 (MobileNet), section 3.2 and table 2",
        "MobileNet spends 95 % of its multiply-adds, and of its time, in 1x1 convolutions.",
        "Multiply-adds counted on the real network, 224x224. Time: the layers of one kind one after the other, each "
        "on its input from a run of the network; in torch BatchNorm and ReLU6 are layers of their own, in fastblocks "
        "they are inside of the convolutions. The whole network is timed as it is, with fastblocks' blocks fused.",
        _measure_shares,
        _summarise_shares,
        _tables_shares,
        _picture_shares,
        "The same network by what is counted and by what is waited for.",
    ),
)
