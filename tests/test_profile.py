"""`fastblocks profile`: what it counts and times, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import console_errors, requests
from PIL import Image
from profiles import own_module
from torch import nn

import fastblocks
from fastblocks import cli
from fastblocks.analysis import count
from fastblocks.bench.errors import BenchError
from fastblocks.bench.profile import REST, blocks, loading, profile, timing


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from own_module(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "100")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def timed() -> dict[str, Any]:
    """A small network, counted and timed."""
    return profile("shufflenet_v2_x0_5", size=(64, 96), rounds=3)


def names(model: str, **options: Any) -> list[str]:
    return [row["name"] for row in profile(model, rounds=0, **options)["blocks"]]


# ------------------------------------------------------------------------------------------------------------- blocks

EXPECTED = {
    "torchvision/mobilenet_v2": [*(f"features.{i}" for i in range(19)), "classifier", REST],
    "mobilenet_v2": [*(f"features.{i}" for i in range(19)), "classifier", REST],
    "mobilenet_v1": [*(f"features.{i}" for i in range(14)), "classifier", REST],
    "torchvision/shufflenet_v2_x0_5": [
        "conv1", "maxpool", *(f"stage{s}.{i}" for s, n in ((2, 4), (3, 8), (4, 4)) for i in range(n)),
        "conv5", "fc", REST,
    ],
    "shufflenet_v1_g3": [
        "conv1", "maxpool", *(f"stage{s}.{i}" for s, n in ((2, 4), (3, 8), (4, 4)) for i in range(n)), "fc", REST,
    ],
    "mnasnet1_0": [
        "layers.0-2", "layers.3-5", "layers.6-7", *(f"layers.{8 + s}.{i}" for s, n in enumerate((3, 3, 3, 2, 4, 1))
        for i in range(n)), "layers.14-16", "classifier", REST,
    ],
    "resnet18": [
        "conv1+bn1+relu", "maxpool", *(f"layer{s}.{i}" for s in range(1, 5) for i in range(2)), "avgpool", "fc",
    ],
    "timm/vit_tiny_patch16_224": ["patch_embed", *(f"blocks.{i}" for i in range(12)), "norm", "head", REST],
    "ghostnet_100": [
        "conv_stem+bn1+act1", *(f"blocks.{s}.{i}" for s, n in enumerate((1, 1, 1, 1, 1, 1, 5, 1, 4, 1))
        for i in range(n)), "global_pool", "conv_head+act2", "classifier",
    ],
    "efficientnet_lite0": [
        "conv_stem+bn1", *(f"blocks.{s}.{i}" for s, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n)),
        "conv_head+bn2", "global_pool", "classifier",
    ],
}  # fmt: skip


@pytest.mark.parametrize("model", EXPECTED)
def test_blocks_are_what_one_would_call_them(model: str) -> None:
    if model not in fastblocks.models.list():
        pytest.importorskip("torchvision")
        pytest.importorskip("timm")
    size = None if "vit" in model else (64, 64)
    assert names(model, size=size) == EXPECTED[model]


@pytest.mark.parametrize("model", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "googlenet"])
def test_rows_sum_to_the_total(model: str) -> None:
    pytest.importorskip("torchvision")
    result = profile(model, size=(64, 64), rounds=0)
    rows, total = result["blocks"], result["total"]
    for key in ("multiply_adds", "parameters", "moved", "least", "operators"):
        assert sum(row[key] for row in rows) == total[key] > 0, key
    assert max(row["peak"] for row in rows) == total["peak"]
    assert all(0 <= row["least"] <= row["moved"] for row in rows)


def test_least_bytes_are_those_of_a_block_as_one_operator() -> None:
    row = profile("mobilenet_v2", rounds=0)["blocks"][2]
    weights = 16 * 96 + 96 * 9 + 96 * 24 + 4 * (96 + 96 + 24)
    assert row["name"] == "features.2"
    assert row["least"] == 4 * (16 * 112 * 112 + 24 * 56 * 56 + weights)
    assert row["fused_intensity"] == 2 * row["multiply_adds"] / row["least"]


def test_a_module_that_only_wraps_the_network_is_looked_into(own: str) -> None:
    rows = profile(f"{own}:Wrapped", size=(16, 16), rounds=0)["blocks"]
    assert [row["name"] for row in rows] == ["net.0.0", "net.0.1", "net.1.0", "net.1.1", REST]


def test_shared_modules_and_parameters_count_once(own: str) -> None:
    result = profile(f"{own}:Tied", size=(8, 8), rounds=1)
    rows = {row["name"]: row for row in result["blocks"]}
    assert {name: row["parameters"] for name, row in rows.items()} == {"conv": 12, "more.1": 12, REST: 1 + 30}
    assert rows["conv"]["multiply_adds"] == 2 * rows["more.1"]["multiply_adds"] == 2 * 9 * 64
    assert result["total"]["parameters"] == sum(row["parameters"] for row in rows.values())


def test_fused_layers_stay_whole_and_stand_beside_plain_torch(own: str) -> None:
    result = profile(f"{own}:fused", size=(16, 16), rounds=2)
    assert result["fastblocks"] == "own layers"
    assert [row["name"] for row in result["blocks"]] == ["0.0", "0.1", "1-3", "6"]
    expected = 16 * 27 * 64 + (16 * 96 * 2 + 96 * 9) * 64 + 8 * 16 * 64 + 5 * 512
    assert result["total"]["multiply_adds"] == expected
    assert all(set(row["seconds"]) == set(SIDES) for row in result["blocks"])
    assert fastblocks.current_backend() == result["backend"]["backend"]


# -------------------------------------------------------------------------------------------------------------- times

SIDES = (timing.STOCK, timing.CHANNELS_LAST, timing.FUSED)


def test_every_block_is_timed_in_each_way(timed: dict[str, Any]) -> None:
    assert timed["fastblocks"] == "counterpart"
    assert timed["network"]["best"] in SIDES[:2]
    for row in [row for row in timed["blocks"] if row["name"] != REST] + [timed["total"]]:
        assert set(row["seconds"]) == set(SIDES)
        least = max(
            2 * row["multiply_adds"] / (1e9 * timed["limits"]["gflops"]), row["least"] / (1e9 * timed["limits"]["gbps"])
        )
        assert row["roofline_seconds"] == pytest.approx(least)
        assert all(0 < seconds < 1 for seconds in row["seconds"].values())
    assert {found["guideline"] for found in timed["advice"]} == {"G1", "G3", "G4"}
    seconds = [found["seconds"] for found in timed["advice"]]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] >= 0


def test_torchvisions_networks_have_a_counterpart_with_the_same_weights() -> None:
    pytest.importorskip("torchvision")
    subject = loading.load("torchvision/mobilenet_v2")
    assert subject.fused is not None
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = subject.fused(x), subject.stock(x)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert loading.load("resnet18").fused is None


def test_a_block_that_computes_something_else_is_our_fault() -> None:
    subject = loading.load("shufflenet_v2_x0_5")
    assert subject.fused is not None
    with torch.no_grad():
        subject.fused.get_submodule("stage3.2.branch2.0").weight *= 1.01  # type: ignore[operator]
    ways, x = timing.sides(subject), torch.randn(1, 3, 64, 64)
    operators = count(subject.stock, x)
    found = {block.name: block for block in blocks.find(subject.stock, lambda: subject.stock(x), operators)}

    def race(name: str) -> timing.Times | str:
        return timing.race(name, ways, found[name].runs, [call[:2] for call in found[name].calls], 1)

    assert not isinstance(race("stage3.1"), str)
    with pytest.raises(BenchError, match=r"stage3\.2: \S+ of the largest value .* fault of fastblocks"):
        race("stage3.2")


def test_random_layers_are_no_disagreement(own: str) -> None:
    assert profile(f"{own}:dropping", size=(16, 16), rounds=1)["network"] is not None


def test_a_block_that_writes_into_its_input_is_timed_on_the_same_one(own: str) -> None:
    subject = loading.load(f"{own}:Wrapped")
    given = torch.randn(1, 3, 8, 8)
    kept = given.clone()
    times = timing.race("net.0.0", timing.sides(subject), ["net.0.0"], [((given,), {})], 3)
    assert set(times) == set(SIDES[:2])
    assert torch.equal(given, kept)


def test_a_block_that_cannot_run_alone_says_so() -> None:
    class Needs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise LookupError("alone")

    subject = loading.Subject("x", "module:callable", nn.Sequential(Needs()), None, (8, 8))
    assert timing.race("0", timing.sides(subject), ["0"], [((torch.ones(1),), {})], 1) == "LookupError: alone"


def test_no_rounds_no_times() -> None:
    result = profile("shufflenet_v2_x0_5", size=(64, 64), rounds=0)
    assert result["network"] is result["limits"] is None
    assert {found["seconds"] for found in result["advice"]} == {None}
    assert not any("seconds" in row for row in result["blocks"])


def test_profiling_leaves_torchs_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    profile("shufflenet_v2_x0_5", size=(32, 32), rounds=1)
    assert torch.equal(torch.rand(1), expected)


# ------------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_the_tables_fit_the_terminal(
    columns: int, timed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastblocks.cli.profile import print_profile

    monkeypatch.setenv("COLUMNS", str(columns))
    print_profile(timed)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    for part in ("shufflenet_v2_x0_5", "1 x 3 x 64 x 96", "adds M", "fastblocks", "roof %", "stage4.3", "total", "G4"):
        assert part in out
    assert ("peak" in out.split("moved:")[0]) == (columns >= 100)


def test_json_has_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--size", "32x64", "--batch", "2", "--threads", "1", "--rounds", "1", "--json")
    assert cli.main(["profile", "shufflenet_v2_x0_5", *options]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert (result["input"], result["threads"]) == ([2, 3, 32, 64], 1)
    assert result["total"]["parameters"] == 1366792
    assert set(result["network"]["seconds"]) == set(SIDES)


def test_page_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, plot = tmp_path / "profile.html", tmp_path / "roofline.png"
    arguments = ["shufflenet_v2_x0_5", "--size", "32", "--rounds", "1", "--html", str(page), "--plot", str(plot)]
    assert cli.main(["profile", *arguments]) == 0
    assert capsys.readouterr().err == f"written: {page}\nwritten: {plot}\n"
    html = page.read_text()
    for part in ("Profile of shufflenet_v2_x0_5", "Roofline", "stage4.3", "G4: element-wise", "prefers-color-scheme"):
        assert part in html
    assert html.count("data:image/png;base64,") == 4  # two pictures in two palettes
    with Image.open(plot) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.html", "roofline.png"]
    assert console_errors(page) == requests(page) == []


def test_a_page_of_counts_alone(tmp_path: Path) -> None:
    page = tmp_path / "counts.html"
    assert cli.main(["profile", "shufflenet_v2_x0_5", "--size", "32", "--rounds", "0", "--html", str(page)]) == 0
    assert "stage4.3" in page.read_text() and "data:image/png" not in page.read_text()


def test_no_counterpart_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert cli.main(["profile", "squeezenet1_1", "--size", "64", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "There is no fastblocks counterpart for this model yet." in out
    assert "fastblocks" not in out.split("moved:")[0]
