"""The four guidelines of ShuffleNetV2 (Ma et al. 2018, section 2), torch beside fastblocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fastblocks.bench.charts import Picture
from fastblocks.bench.page import Table
from fastblocks.bench.study import networks
from fastblocks.bench.study.claim import Claim, Data, Summary, outcome
from fastblocks.bench.study.counting import operations
from fastblocks.bench.study.pictures import bars
from fastblocks.bench.study.timing import Pair, busy, compare, spread

__all__ = ["CLAIMS"]

WHO = ("torch", "fastblocks")
LEAST = 1.03  # times as long: less is not called slower

G1_WIDTHS = {"1:1": (32, 32), "1:2": (22, 44), "1:6": (13, 78), "1:12": (9, 108)}
G2_CHANNELS = {1: 64, 2: 90, 4: 128, 8: 184}  # the paper prints 180, which 8 does not divide: 184 is nearest
G3_CHANNELS = {64: {2: 45, 4: 32}, 128: {2: 91, 4: 64}, 256: {2: 181, 4: 128}}  # c/√n for n fragments

# images a second on the paper's phone, a Snapdragon 810, at x1; the first row is what the others are compared with
G1_PAPER = {"1:1": 76.2, "1:2": 72.9, "1:6": 69.1, "1:12": 57.6}
G2_PAPER = {"g = 1": 40.0, "g = 2": 35.0, "g = 4": 32.9, "g = 8": 27.8}
G3_PAPER = {
    "1 fragment": {64: 40.2, 128: 10.1, 256: 2.3},
    "2 in series": {64: 38.6, 128: 10.1, 256: 2.2},
    "4 in series": {64: 38.4, 128: 10.1, 256: 2.3},
    "2 in parallel": {64: 33.4, 128: 9.1, 256: 2.2},
    "4 in parallel": {64: 35.0, 128: 8.4, 256: 2.1},
}
G4_PAPER = {
    "neither": {32: 66.3, 64: 20.2, 128: 5.4},
    "shortcut": {32: 57.3, 64: 18.2, 128: 5.1},
    "ReLU": {32: 61.9, 64: 18.8, 128: 5.2},
    "ReLU and shortcut": {32: 56.7, 64: 16.9, 128: 5.0},
}

Rows = dict[str, dict[str, Any]]

# ---------------------------------------------------------------------------------------------------------- measuring


def _rows(pairs: Mapping[str, Pair], paper: Mapping[str, float], seconds: float) -> Rows:
    found = {name: operations(pair.plain, *pair.x.shape) for name, pair in pairs.items()}
    cost = {name: sum(each.multiply_adds for each in convs) for name, convs in found.items()}
    rows = compare(pairs, cost, next(iter(pairs)), seconds)
    for name, row in rows.items():
        row["memory_access_cost"] = sum(each.accesses for each in found[name])
        row["paper_images_per_second"] = paper[name]
    return rows


def _measure_g1(seconds: float) -> dict[str, Any]:
    pairs = {name: networks.stacked([*pair * networks.REPEATS, pair[0]]) for name, pair in G1_WIDTHS.items()}
    return {"groups": {"": _rows(pairs, G1_PAPER, seconds)}}


def _measure_g2(seconds: float) -> dict[str, Any]:
    pairs = {f"g = {g}": networks.stacked([c] * (networks.REPEATS + 1), g) for g, c in G2_CHANNELS.items()}
    return {"groups": {"": _rows(pairs, G2_PAPER, seconds)}}


def _measure_g3(seconds: float) -> dict[str, Any]:
    groups = {}
    for channels, fragments in G3_CHANNELS.items():
        pairs = {"1 fragment": networks.stacked([channels] * (networks.REPEATS + 1))}
        for n, c in fragments.items():
            pairs[f"{n} in series"] = networks.stacked([c] * (n * networks.REPEATS + 1))
        for n, c in fragments.items():
            pairs[f"{n} in parallel"] = networks.fragments_in_parallel(c, n)
        groups[f"c = {channels}"] = _rows(pairs, _column(G3_PAPER, channels), seconds)
    return {"groups": groups, "threads": torch.get_num_threads()}


def _measure_g4(seconds: float) -> dict[str, Any]:
    groups = {}
    for channels in G4_PAPER["neither"]:
        pairs = {
            name: networks.bottlenecks(channels, relu="ReLU" in name, shortcut="shortcut" in name) for name in G4_PAPER
        }
        groups[f"c = {channels}"] = _rows(pairs, _column(G4_PAPER, channels), seconds)
    return {"groups": groups}


def _column(table: Mapping[str, Mapping[int, float]], channels: int) -> dict[str, float]:
    return {name: row[channels] for name, row in table.items()}


# -------------------------------------------------------------------------------------------------------------- words


def _base(rows: Data) -> Any:
    return next(iter(rows.values()))


def _papers(rows: Data, row: Data) -> float:
    """How many times longer a row took than the first one in the paper."""
    return float(_base(rows)["paper_images_per_second"] / row["paper_images_per_second"])


def _slower(row: Data, who: str) -> bool:
    """Whether a row is slower than the first one in more than three rounds of four, and by more than a little."""
    low, median, _ = row[who]["slower"]
    return bool(low > 1 and median >= LEAST)


def _lost(rows: Data, worst: str, who: str) -> float:
    """Milliseconds that a row takes beyond the first one, at the first one's multiply-adds."""
    return max(0.0, float(1e3 * _base(rows)[who]["seconds"][1] * (rows[worst][who]["slower"][1] - 1)))


def _given_back(worst: str, groups: Data) -> str:
    """How much of what it costs torch to be the row and not the first one is no cost in fastblocks."""
    lost = {who: [_lost(rows, worst, who) for rows in groups.values()] for who in WHO}
    costs = " and ".join(f"{who} {_list(lost[who], '.2f')} ms" for who in WHO)
    if not all(_slower(rows[worst], "torch") for rows in groups.values()):
        return f"that costs {costs}"
    back = [100 * max(0.0, 1 - ours / torchs) for torchs, ours in zip(lost["torch"], lost["fastblocks"], strict=True)]
    given = f"back {_list(back, '.0f')} %" if any(back) else "nothing back"
    return f"that costs {costs}: fusion gives {given}"


def _spread(row: Data) -> float:
    return max(spread(row[who]["seconds"]) for who in WHO)


def _busy(groups: Data) -> str:
    return busy([_spread(row) for rows in groups.values() for row in rows.values()])


def _list(values: list[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def _summary(worst: str, fuses: bool, data: Data) -> Summary:
    """Words for one row against the first one, in each group; with `fuses`, for what fusion gives back, too."""
    groups = data["groups"]
    slower = {who: [rows[worst][who]["slower"][1] for rows in groups.values()] for who in WHO}
    words = f"with {worst} a multiply-add takes {_list(slower['torch'], '.2f')} times as long as with "
    words += f"{next(iter(_base(groups)))} in torch, {_list(slower['fastblocks'], '.2f')} in fastblocks"
    if len(groups) > 1:
        words += f" ({', '.join(groups)})"
    if fuses:
        words += f"; {_given_back(worst, groups)}"
    words += _busy(groups)
    paper = [_papers(rows, rows[worst]) for rows in groups.values()]
    return Summary(
        f"{_list(paper, '.2f')} x",
        ", ".join(f"{who} {_list(slower[who], '.2f')} x" for who in WHO),
        outcome(*(_slower(rows[worst], who) for rows in groups.values() for who in WHO)),
        words,
    )


def _summarise_g3(data: Data) -> Summary:
    """The claim is for four fragments, in series and in parallel, at all widths."""
    fours = [(rows, rows[name]) for rows in data["groups"].values() for name in ("4 in series", "4 in parallel")]
    slow = {who: sum(_slower(row, who) for _, row in fours) for who in WHO}
    words = [f"in {count} of {len(fours)} cases in {who}" for who, count in slow.items()]
    found = [f"{who} {_range([row[who]['slower'][1] for _, row in fours])} x" for who in WHO]
    return Summary(
        f"{_range([_papers(rows, row) for rows, row in fours])} x",
        ", ".join(found),
        outcome(*(_slower(row, who) for _, row in fours for who in WHO)),
        f"four fragments are slower than one {' and '.join(words)}; threads: {data['threads']}" + _busy(data["groups"]),
    )


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


# ---------------------------------------------------------------------------------------------------- tables, pictures

HEADINGS = (
    "", "multiply-adds, M", "accesses, M", "torch, images/s", "fastblocks, images/s", "speed-up",
    "paper, images/s", "torch, x as long", "fastblocks, x as long", "paper, x as long",
    "spread, %",
)  # fmt: skip


def _tables(data: Data) -> list[Table]:
    lines = []
    for group, rows in data["groups"].items():
        for name, row in rows.items():
            rates = (f"{1 / row[who]['seconds'][1]:,.0f}" for who in WHO)
            slower = (f"{row[who]['slower'][1]:.2f}" for who in WHO)
            lines.append(
                (
                    f"{group}, {name}" if group else name,
                    f"{row['multiply_adds'] / 1e6:.1f}",
                    f"{row['memory_access_cost'] / 1e6:.2f}",
                    *rates,
                    f"{row['speed_up']:.2f}",
                    f"{row['paper_images_per_second']:.1f}",
                    *slower,
                    f"{_papers(rows, row):.2f}",
                    f"{100 * _spread(row):.0f}",
                )
            )
    return [Table(HEADINGS, lines)]


def _picture(alt: str, data: Data) -> Picture:
    values = {
        group: {
            name: {"paper": _papers(rows, row)} | {who: row[who]["slower"][1] for who in WHO}
            for name, row in rows.items()
        }
        for group, rows in data["groups"].items()
    }
    first = next(iter(_base(data["groups"])))
    return bars(values, f"times as long as {first}", alt, line=1.0)


HOW = (
    "Each row has the same multiply-adds but for rounding; times are compared for a multiply-add. Torch runs eagerly, "
    "in channels_last or contiguous tensors, whichever is faster; 56x56 pixels, batch 1, no BatchNorm. "
)
CAPTION = (
    "How many times longer than the first row a multiply-add takes: the paper's phone, torch and fastblocks. "
    "Each is compared with itself, so a longer bar says nothing of whose time is longer: see images/s in the table."
)


def _claim(key: str, title: str, place: str, statement: str, method: str, alt: str, measure: Any, say: Any) -> Claim:
    paper = f"Ma et al. 2018 (ShuffleNetV2), section 2, {place}"
    return Claim(key, title, paper, statement, HOW + method, measure, say, _tables, partial(_picture, alt), CAPTION)


CLAIMS = (
    _claim(
        "g1",
        "G1: equal channel widths cost the fewest memory accesses",
        "table 1",
        "At equal multiply-adds, a 1x1 convolution is fastest where it has as many outputs as inputs.",
        "Ten pairs of 1x1 convolutions, from c1 to c2 channels and back, with c1:c2 from 1:1 to 1:12.",
        "Bars: time for a multiply-add at c1:c2 = 1:1, 1:2, 1:6 and 1:12, relative to 1:1",
        _measure_g1,
        partial(_summary, "1:12", False),
    ),
    _claim(
        "g2",
        "G2: many groups cost memory accesses",
        "table 2",
        "At equal multiply-adds, more groups of a 1x1 convolution make it slower.",
        "Ten grouped 1x1 convolutions. 8 groups do not divide the paper's 180 channels; 184 are the nearest they do.",
        "Bars: time for a multiply-add with 1, 2, 4 and 8 groups, relative to 1",
        _measure_g2,
        partial(_summary, "g = 8", True),
    ),
    _claim(
        "g3",
        "G3: fragments reduce parallelism",
        "table 3",
        "At equal multiply-adds, one 1x1 convolution is faster than several smaller ones, in series or in parallel.",
        "Ten blocks of one, two or four 1x1 convolutions of c, c/√2 and c/2 channels, in a row or summed up.",
        "Bars: time for a multiply-add with 1, 2 and 4 fragments in series and in parallel, relative to 1",
        _measure_g3,
        _summarise_g3,
    ),
    _claim(
        "g4",
        "G4: element-wise operations are not negligible",
        "table 4",
        "ReLU and shortcut take time that no count of multiply-adds shows.",
        "Ten of ResNet's bottlenecks (1x1, 3x3, 1x1; c/4 channels inside), with and without ReLU and shortcut.",
        "Bars: time of bottlenecks with ReLU, shortcut, both and neither, relative to neither",
        _measure_g4,
        partial(_summary, "ReLU and shortcut", True),
    ),
)
