"""ShuffleNet's claims (Zhang et al. 2017): the cost of dense 1x1 convolutions, and what a shuffle lets outputs see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastblocks.bench.charts import Picture
from fastblocks.bench.page import Table
from fastblocks.bench.study.claim import Claim, Data, Summary, outcome
from fastblocks.bench.study.counting import by_kind, operations, portions
from fastblocks.bench.study.kinds import time_by_kind
from fastblocks.bench.study.networks import seeded
from fastblocks.bench.study.pictures import bits, shares
from fastblocks.functional import ConvBN, grouped_pointwise_conv_bn_act

__all__ = ["CLAIMS"]

CARDINALITY = 32
UNITS = {256: 56, 512: 28, 1024: 14, 2048: 7}
"""Channels of ResNeXt-50's (32x4d) units, and pixels of a side."""
PAPER_SHARE = 93.4
STAGES = {2: 50, 3: 60, 4: 68, 8: 96}
"""Groups, and the channels between the grouped 1x1 convolutions of ShuffleNet's stage 2."""
SHOWN = 3  # groups, in the picture

# ------------------------------------------------------------------------------------------------------ ResNeXt's unit


def resnext_unit(channels: int) -> nn.Module:
    """The branch of ResNeXt's unit: half of the channels inside, a 3x3 convolution of 32 groups."""
    inner = channels // 2

    def conv(inputs: int, outputs: int, size: int, groups: int = 1) -> tuple[nn.Module, ...]:
        layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
        return layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)

    layers = [*conv(channels, inner, 1), *conv(inner, inner, 3, CARDINALITY), *conv(inner, channels, 1)]
    return nn.Sequential(*layers)


def _measure_resnext(seconds: float) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for channels, size in UNITS.items():
        with seeded():
            unit, x = resnext_unit(channels), torch.randn(1, channels, size, size)
        cost = by_kind(operations(unit, *x.shape))
        rows[f"{channels} channels, {size}x{size}"] = {"multiply_adds": dict(cost)} | time_by_kind(
            unit, None, x, seconds / 2
        )
    return {"rows": rows}


def _summarise_resnext(data: Data) -> Summary:
    counted = [round(100 * portions(row["multiply_adds"])["1x1"], 1) for row in data["rows"].values()]
    in_time = [100 * portions(row["seconds"]["torch"])["1x1"] for row in data["rows"].values()]
    found = " and ".join(f"{percent}" for percent in sorted(set(counted)))
    words = (
        f"{found} % of the multiply-adds in all {len(counted)} sizes of unit; in torch they take "
        f"{min(in_time):.0f} to {max(in_time):.0f} % of the time"
    )
    return Summary(f"{PAPER_SHARE} %", f"{found} %", outcome(set(counted) == {PAPER_SHARE}), words)


def _tables_resnext(data: Data) -> list[Table]:
    headings = ("", "1x1, M multiply-adds", "3x3 in groups, M", "1x1, %", "paper, %", "1x1, % of torch's time")
    lines = [
        (
            name,
            *(f"{row['multiply_adds'][kind] / 1e6:.2f}" for kind in ("1x1", "3x3")),
            f"{100 * portions(row['multiply_adds'])['1x1']:.2f}",
            f"{PAPER_SHARE}",
            f"{100 * portions(row['seconds']['torch'])['1x1']:.1f}",
        )
        for name, row in data["rows"].items()
    ]
    return [Table(headings, lines)]


def _picture_resnext(data: Data) -> Picture:
    rows = {}
    for name, row in data["rows"].items():
        channels = name.split()[0]
        rows[f"{channels}: multiply-adds"] = portions(row["multiply_adds"])
        rows[f"{channels}: time in torch"] = portions(row["seconds"]["torch"])
    return shares(rows, "Bars: shares of 1x1 and 3x3 convolutions in a ResNeXt unit, multiply-adds and time")


# --------------------------------------------------------------------------------------------------------- visibility


def stacked(channels: int, groups: int, shuffle: int) -> Callable[[Tensor], Tensor]:
    """Two grouped 1x1 convolutions, with a shuffle of so many groups between them; 1 is none."""
    with seeded():
        first, second = (ConvBN(torch.randn(channels, channels // groups, 1, 1)) for _ in range(2))

    def run(x: Tensor) -> Tensor:
        y = grouped_pointwise_conv_bn_act(x, first, groups=groups, shuffle=shuffle)
        return grouped_pointwise_conv_bn_act(y, second, groups=groups)

    return run


def support(run: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """Where the Jacobian is not zero: (outputs, inputs), bool."""
    with seeded():
        x = torch.randn(1, channels, 1, 1)
    jacobian: Any = torch.autograd.functional.jacobian(run, x)
    return torch.Tensor(jacobian).view(channels, channels) != 0


def _measure_groups(seconds: float) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    shown: dict[str, list[str]] = {}
    for groups, channels in STAGES.items():
        row: dict[str, Any] = {"channels": channels}
        for how, shuffle in (("without", 1), ("with", groups)):
            sees = support(stacked(channels, groups, shuffle), channels)
            row[how] = sees.float().mean(1).unique().tolist()
            if groups == SHOWN:
                shown[how] = ["".join("01"[bit] for bit in line) for line in sees.int().tolist()]
        rows[str(groups)] = row
    return {"rows": rows, "shown": shown}


def _summarise_groups(data: Data) -> Summary:
    rows = data["rows"]
    thirds = all(abs(share * int(g) - 1) < 1e-6 for g, row in rows.items() for share in row["without"])
    whole = all(share == 1 for row in rows.values() for share in row["with"])
    ours = ", ".join(f"{row['without'][0]:.3g}" for row in rows.values())
    words = (
        f"for g = {', '.join(rows)} an output depends on {ours} of the inputs without a shuffle, "
        f"and on {'all' if whole else 'not all'} of them with one"
    )
    exact = all(len(row[how]) == 1 for row in rows.values() for how in ("without", "with"))
    return Summary("1/g, and all", f"{ours}; {'all' if whole else 'not all'}", outcome(thirds and exact, whole), words)


def _tables_groups(data: Data) -> list[Table]:
    headings = ("groups", "channels", "1/g", "seen without shuffle", "seen with one shuffle")
    lines = [
        (g, str(row["channels"]), f"{1 / int(g):.4f}", f"{row['without'][0]:.4f}", f"{row['with'][0]:.4f}")
        for g, row in data["rows"].items()
    ]
    return [Table(headings, lines)]


def _picture_groups(data: Data) -> Picture:
    titles = {"without": "without a shuffle", "with": "one shuffle between them"}
    alt = f"Two matrices: which inputs an output of two stacked convolutions of {SHOWN} groups depends on"
    return bits({titles[how]: lines for how, lines in data["shown"].items()}, alt)


CLAIMS = (
    Claim(
        "resnext",
        "1x1 convolutions are 93.4 % of a ResNeXt unit's cost",
        "Zhang et al. 2017 (ShuffleNet), section 3.1",
        "In a ResNeXt unit only the 3x3 convolution is grouped: dense 1x1 convolutions have 93.4 % of multiply-adds.",
        "The branch of each of ResNeXt-50's units (cardinality 32, 4 channels a group in the first), counted on real "
        "layers; and the time of each kind of layer in torch, the layers of a kind one after the other.",
        _measure_resnext,
        _summarise_resnext,
        _tables_resnext,
        _picture_resnext,
        "What is grouped is cheap in multiply-adds, and less so in time.",
    ),
    Claim(
        "groups",
        "Stacked group convolutions see 1/g of the input, with a shuffle all of it",
        "Zhang et al. 2017 (ShuffleNet), section 3.1 and figure 1",
        "Outputs of stacked group convolutions derive from 1/g of the channels; one shuffle between relates them all.",
        "Where the Jacobian of two stacked grouped 1x1 convolutions is not zero, computed with fastblocks' op, which "
        "does the shuffle as it stores. The channels are those of ShuffleNet's stage 2.",
        _measure_groups,
        _summarise_groups,
        _tables_groups,
        _picture_groups,
        f"Filled: the output depends on the input. {SHOWN} groups, {STAGES[SHOWN]} channels.",
    ),
)
