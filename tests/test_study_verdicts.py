"""`fastblocks study`: the networks that it times, and what verdicts say of the numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from studies import Study, claim

from fastblocks.bench.errors import BenchError
from fastblocks.bench.study import guidelines, networks, timing

pytestmark = pytest.mark.xdist_group("study")  # one process measures it for all of these

# ------------------------------------------------------------------------------------------------------------- timing


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
def test_bottlenecks_are_resnets(relu: bool, shortcut: bool) -> None:
    plain, ours, x = networks.bottlenecks(32, relu=relu, shortcut=shortcut)
    y = x.double()
    for block in copy.deepcopy(plain).double():
        convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        z = y
        for index, conv in enumerate(convs):
            z = conv(z)
            if relu and index < 2:
                z = z.relu()
        y = z + y if shortcut else z
        y = y.relu() if relu else y
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x).double(), y, atol=float(1e-5 * y.abs().max()))


def test_fragments_in_parallel_are_summed() -> None:
    plain, ours, x = networks.fragments_in_parallel(16, 4)
    y = x.double()
    for block in copy.deepcopy(plain).double():
        y = sum(conv(y) for conv in block)
    with torch.no_grad():
        assert torch.allclose(ours(x).double(), y, atol=float(1e-5 * y.abs().max()))


def test_networks_that_differ_are_not_timed() -> None:
    pair = networks.stacked([8, 8, 8])
    with torch.no_grad():
        next(pair.ours.parameters()).add_(0.01)
    with pytest.raises(BenchError, match=r"^a row: fastblocks and torch differ by \d"):
        timing.timed({"a row": pair}, 0.001)


def test_slower_is_for_a_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {"a": networks.stacked([8, 8]), "b": networks.stacked([8, 8])}
    times = {name: {who: [1.0, 2.0, 3.0] for who in ("torch", "fastblocks")} for name in pairs}
    times["b"]["fastblocks"] = [3.0, 6.0, 9.0]
    monkeypatch.setattr(timing, "timed", lambda pairs, seconds: (times, dict.fromkeys(pairs, "contiguous")))
    rows = timing.compare(pairs, {"a": 10, "b": 20}, "a", 1)
    assert rows["b"]["fastblocks"]["slower"] == [1.5] * 3 and rows["b"]["torch"]["slower"] == [0.5] * 3
    assert rows["b"]["speed_up"] == pytest.approx(1 / 3, abs=1e-3) and rows["a"]["speed_up"] == 1


# ------------------------------------------------------------------------------------------------------------ verdicts


def told(key: str, slower: dict[str, list[float]]) -> str:
    """The outcome of a guideline if every row but the first is so much slower."""
    paper = {"g1": guidelines.G1_PAPER, "g2": guidelines.G2_PAPER}[key]
    row = {who: {"seconds": [1e-3] * 3, "slower": values} for who, values in slower.items()}
    rows = {name: {"paper_images_per_second": rate, **row} for name, rate in paper.items()}
    return claim(key).summarise({"groups": {"": rows}}).outcome


@pytest.mark.parametrize("key", ["g1", "g2"])
def test_verdicts_come_from_the_numbers(key: str) -> None:
    slow, same, unsure = [1.2, 1.3, 1.4], [0.9, 1.0, 1.1], [0.9, 1.2, 1.4]
    assert told(key, {"torch": slow, "fastblocks": slow}) == "holds"
    assert told(key, {"torch": slow, "fastblocks": same}) == "holds in part"
    assert told(key, {"torch": same, "fastblocks": unsure}) == "not seen here"


def test_a_busy_machine_is_told() -> None:
    assert timing.busy([0.1, 0.2]) == "" and timing.spread([0.5, 1.0, 2.0]) == 1.5
    assert timing.busy([0.1, 1.5]).endswith("the machine was busy: 1 of 2 rows scatter too much to be trusted")
    row = {who: {"seconds": [1e-3, 1e-3, 2e-3], "slower": [1.0] * 3} for who in ("torch", "fastblocks")}
    rows = {name: {"paper_images_per_second": 1.0, **row} for name in guidelines.G1_PAPER}
    assert "4 of 4 rows" in claim("g1").summarise({"groups": {"": rows}}).words


def test_what_fusion_gives_back() -> None:
    row = {"seconds": [1e-3] * 3, "slower": [1.0] * 3}
    rows = {name: {"paper_images_per_second": 1.0, "torch": row, "fastblocks": row} for name in guidelines.G2_PAPER}
    rows["g = 8"] = rows["g = 8"] | {
        "torch": {"seconds": [1e-3] * 3, "slower": [1.4, 1.5, 1.6]},
        "fastblocks": {"seconds": [1e-3] * 3, "slower": [1.0, 1.1, 1.2]},
    }
    words = claim("g2").summarise({"groups": {"": rows}}).words
    assert words.endswith("that costs torch 0.50 ms and fastblocks 0.10 ms: fusion gives back 80 %")


@pytest.mark.parametrize(
    ("key", "path", "value"),
    [
        ("resnext", ("rows", "256 channels, 56x56", "multiply_adds", "3x3"), 1),
        ("groups", ("rows", "4", "with"), [0.75]),
        ("groups", ("rows", "4", "without"), [0.5]),
        ("manifold", ("rows", "30", "lost"), 0.1),
        ("manifold", ("rows", "15", "error"), 0.9),
        ("memory", ("fused",), 10**8),
        ("memory", ("between_blocks", "14", "channels"), 96),
    ],
)
def test_another_count_is_another_verdict(quick_study: Study, key: str, path: tuple[str, ...], value: Any) -> None:
    measured = copy.deepcopy(quick_study[1]["claims"][key]["measured"])
    place = measured
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert claim(key).summarise(measured).outcome != "holds"
