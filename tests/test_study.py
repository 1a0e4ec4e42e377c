"""`fastblocks study`: what its claims count, held against the papers."""

from __future__ import annotations

import re

import counting
import pytest
import torch
from torch import nn

import fastblocks

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from studies import KEYS, Study

from fastblocks.bench.study import CLAIMS, mobilenet, mobilenet_v2, shufflenet
from fastblocks.bench.study import study as run_study
from fastblocks.bench.study.counting import by_kind, operations
from fastblocks.cli.study import study as command

pytestmark = pytest.mark.xdist_group("study")  # one process measures it for all of these

MOBILENET = [
    (32, 64, 112), (64, 128, 56), (128, 128, 56), (128, 256, 28), (256, 256, 28), (256, 512, 14),
    *[(512, 512, 14)] * 5, (512, 1024, 7), (1024, 1024, 7),
]  # fmt: skip
"""Inputs, outputs and pixels of a side of the output of each block (Howard et al. 2017, table 1)."""


@pytest.mark.parametrize("key", KEYS)
def test_every_claim_is_measured_and_judged(quick_study: Study, key: str) -> None:
    entry = quick_study[1]["claims"][key]
    assert "error" not in entry
    assert entry["outcome"] in ("holds", "holds in part", "not seen here")
    assert entry["paper_says"] and entry["found"] and entry["because"]
    assert key not in ("resnext", "groups", "manifold", "memory") or entry["outcome"] == "holds"
    assert key not in ("separable", "shares") or entry["outcome"] != "not seen here"  # the counts hold


def test_these_are_the_claims_and_the_help_has_their_names() -> None:
    assert [each.key for each in CLAIMS] == KEYS
    assert command.help is not None
    listed = re.search(r"short names: ([^.]*)\.", command.help)
    assert listed is not None and re.split(r",\s+", listed[1]) == KEYS


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv2d(8, 12, 3, 2, 1, groups=4), (2, 8, 9, 9)),
        (nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6 * 9, 5)), (1, 6, 5, 5)),
        (shufflenet.resnext_unit(64), (1, 64, 7, 7)),
    ],
)
def test_operations_are_the_layers_that_hooks_see(module: nn.Module, size: tuple[int, ...]) -> None:
    cost, weights = counting.by_kind(module, *size)
    found = operations(module, *size)
    assert by_kind(found) == cost
    assert {kind: sum(each.weights for each in found if each.kind == kind) for kind in cost} == weights
    assert next(module.parameters()).device.type == "cpu"  # a copy was counted


def test_accesses_of_an_operation_are_its_numbers() -> None:
    """Ma et al. 2018, section 2: what is read and written, and the weights; no bias, and no byte."""
    convolution, linear = operations(nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, groups=4), nn.Linear(5, 7)), 2, 8, 9, 9)
    assert (convolution.read, convolution.written, convolution.weights) == (2 * 8 * 81, 2 * 12 * 25, 12 * 2 * 9)
    assert (linear.read, linear.written, linear.weights) == (2 * 12 * 25, 2 * 12 * 5 * 7, 35)
    assert convolution.accesses == 2 * 8 * 81 + 2 * 12 * 25 + 12 * 2 * 9


def test_costs_of_the_separable_convolution(quick_study: Study) -> None:
    """Howard et al. 2017, section 3.1: k*k*M*N*D*D of a full convolution, k*k*M*D*D + M*N*D*D of a separable one."""
    measured = quick_study[1]["claims"]["separable"]["measured"]
    for (inputs, outputs, size), row in zip(mobilenet.LAYERS, measured["rows"].values(), strict=True):
        assert row["multiply_adds"] == {
            "full": 9 * inputs * outputs * size**2,
            "separable": (9 * inputs + inputs * outputs) * size**2,
        }
    others = 27 * 32 * 112**2 + 1024 * 1000  # the stem and the classifier
    assert measured["network"] == {
        "full": others + sum(9 * m * n * size**2 for m, n, size in MOBILENET),
        "separable": others + sum((9 * m + m * n) * size**2 for m, n, size in MOBILENET),
    }
    millions = {name: count / 1e6 for name, count in measured["network"].items()}
    assert abs(millions["full"] - 4866) < 1.5 and abs(millions["separable"] - 569) < 0.5  # table 4


def test_shares_of_mobilenet_are_the_papers(quick_study: Study) -> None:
    """Howard et al. 2017, table 2, but for the stem."""
    measured = quick_study[1]["claims"]["shares"]["measured"]
    for name, expected in (
        ("multiply_adds", {"1x1": 94.86, "depthwise": 3.06, "3x3": 1.91, "linear": 0.18}),
        ("weights", {"1x1": 74.59, "depthwise": 1.06, "3x3": 0.02, "linear": 24.33}),
    ):
        total = sum(measured[name].values())
        assert {kind: round(100 * n / total, 2) for kind, n in measured[name].items()} == expected
    for who in ("torch", "fastblocks"):
        assert set(expected) <= set(measured["seconds"][who])


@pytest.mark.parametrize("channels", shufflenet.UNITS)
def test_share_of_resnexts_1x1(channels: int) -> None:
    """Zhang et al. 2017, section 3.1."""
    cost = by_kind(operations(shufflenet.resnext_unit(channels), 1, channels, 7, 7))
    assert round(100 * cost["1x1"] / cost.total(), 1) == 93.4


def test_memory_is_the_papers(quick_study: Study) -> None:
    """Sandler et al. 2018, section 5.1 and table 3."""
    measured = quick_study[1]["claims"]["memory"]["measured"]
    assert measured["unfused"] == 4 * 96 * (112**2 + 56**2) == 6_021_120
    assert measured["fused"] == 4 * (16 * 112**2 + 24 * 56**2) == 1_103_872
    rows = {int(size): row for size, row in measured["between_blocks"].items()}
    assert {size: row["channels"] for size, row in rows.items()} == {112: 16, 56: 32, 28: 64, 14: 160, 7: 320}
    assert {size: row["bytes"] for size, row in rows.items()} == {n: 2 * n**2 * rows[n]["channels"] for n in rows}
    assert measured["mobilenet"] == 2 * 64 * 112**2
    if fastblocks.current_backend() == "native":
        assert 0 < measured["scratch"]["1"]["scratch"] < 4 * 96 * 112**2 / 8


def test_groups_see_their_share(quick_study: Study) -> None:
    """Zhang et al. 2017, figure 1."""
    measured = quick_study[1]["claims"]["groups"]["measured"]
    for g, row in measured["rows"].items():
        assert row["without"] == [pytest.approx(1 / int(g), abs=1e-7)] and row["with"] == [1.0]
    lines, n = measured["shown"]["without"], 60 // 3
    assert lines == ["0" * n * (i // n) + "1" * n + "0" * n * (2 - i // n) for i in range(60)]
    assert not shufflenet.support(shufflenet.stacked(48, 8, 8), 48).all()  # 6 channels a group reach 6 of 8 groups


def test_what_relu_leaves_of_a_spiral() -> None:
    """Sandler et al. 2018, figure 1: the error falls with the dimensions, and with enough of them to nothing."""
    found = {dims: mobilenet_v2.embed(dims, 400) for dims in (2, 3, 5, 15, 30, 300, 3000)}
    errors = [float(each["error"].mean()) for each in found.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.7 and errors[-1] < 0.04
    assert errors[-2] / errors[-1] == pytest.approx(10**0.5, rel=0.1)  # as a mean over outputs does
    for dims, each in found.items():
        # signs are fair coins; points of one matrix fall together, so it is matrices that count
        lost = each["lost"].double().mean(1)
        assert float(lost.mean()) == pytest.approx((dims + 1) / 2**dims, abs=4 * float(lost.std()) / 400**0.5 + 1e-4)


def test_a_point_is_lost_where_nothing_brings_it_back() -> None:
    found = mobilenet_v2.embed(2, 50)
    assert 0 < found["lost"].sum() < found["lost"].numel()
    # with both outputs left, the way back is exact but for the scale
    for points, lost in zip(found["points"], found["lost"], strict=True):
        if (~lost).any():
            expected = mobilenet_v2.spiral()[~lost]
            scale = (points[~lost] * expected).sum() / expected.square().sum()
            assert torch.allclose(points[~lost], scale * expected, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("g1", [20 * 32 * 32, 20 * 22 * 44, 20 * 13 * 78, 20 * 9 * 108]),
        ("g2", [10 * c * c // g for g, c in ((1, 64), (2, 90), (4, 128), (8, 184))]),
    ],
)
def test_costs_of_the_guidelines_networks(quick_study: Study, key: str, expected: list[int]) -> None:
    rows = quick_study[1]["claims"][key]["measured"]["groups"][""]
    assert [row["multiply_adds"] for row in rows.values()] == [56 * 56 * each for each in expected]
    assert [row["memory_access_cost"] / row["multiply_adds"] for row in rows.values()] == sorted(
        row["memory_access_cost"] / row["multiply_adds"] for row in rows.values()
    )


def test_rows_of_the_guidelines_have_equal_costs(quick_study: Study) -> None:
    for key in ("g1", "g2", "g3", "g4"):
        for rows in quick_study[1]["claims"][key]["measured"]["groups"].values():
            cost = [row["multiply_adds"] for row in rows.values()]
            assert max(cost) / min(cost) < 1.06, (key, cost)
    first = quick_study[1]["claims"]["g4"]["measured"]["groups"]["c = 32"]["neither"]
    assert first["multiply_adds"] == 10 * 56 * 56 * (2 * 32 * 8 + 9 * 8 * 8)


def test_the_caller_keeps_his_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert run_study(["groups", "manifold"])["claims"]["manifold"]["outcome"] == "holds"
    assert torch.equal(torch.rand(2), expected)
