"""`fastblocks study`: what the papers' claims are measured with, their verdicts, and the page."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import counting
import pytest
import torch
from browser import console_errors, requests, screenshot
from torch import nn

import fastblocks

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fastblocks.bench.errors import BenchError
from fastblocks.bench.study import CLAIMS, guidelines, mobilenet, mobilenet_v2, networks, output, shufflenet, timing
from fastblocks.bench.study import study as run_study
from fastblocks.bench.study.claim import Claim
from fastblocks.bench.study.counting import by_kind, operations
from fastblocks.cli import main

KEYS = ["separable", "shares", "resnext", "groups", "manifold", "memory", "g1", "g2", "g3", "g4"]
TIMED = ["separable", "shares", "resnext", "g1", "g2", "g3", "g4"]
DOCS = Path(__file__).parent.parent / "docs"


def claim(key: str) -> Claim:
    return next(each for each in CLAIMS if each.key == key)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of the shortest study there is, and its result."""
    folder = tmp_path_factory.mktemp("study")
    threads = torch.get_num_threads()
    arguments = ["--out", str(folder), "--docs", str(folder / "docs"), "--threads", "1", "--seconds", "0.001"]
    assert main(["study", *arguments, "--machine", "a <machine>"]) == 0
    torch.set_num_threads(threads)
    (path,) = folder.glob("study-*.json")
    yield folder, json.loads(path.read_text("utf-8"))


# ----------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("key", KEYS)
def test_every_claim_is_measured_and_judged(quick: tuple[Path, dict[str, Any]], key: str) -> None:
    entry = quick[1]["claims"][key]
    assert "error" not in entry
    assert entry["outcome"] in ("holds", "holds in part", "not seen here")
    assert entry["paper_says"] and entry["found"] and entry["because"]
    assert key not in ("resnext", "groups", "manifold", "memory") or entry["outcome"] == "holds"
    assert key not in ("separable", "shares") or entry["outcome"] != "not seen here"  # the counts hold


def test_these_are_the_claims() -> None:
    assert [each.key for each in CLAIMS] == KEYS


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


def test_costs_of_the_separable_convolution(quick: tuple[Path, dict[str, Any]]) -> None:
    """Howard et al. 2017, section 3.1: 1/N + 1/9; table 4: 4866 and 569 million for the network."""
    measured = quick[1]["claims"]["separable"]["measured"]
    for (inputs, outputs, size), row in zip(mobilenet.LAYERS, measured["rows"].values(), strict=True):
        assert row["multiply_adds"] == {
            "full": 9 * inputs * outputs * size**2,
            "separable": (9 * inputs + inputs * outputs) * size**2,
        }
    assert measured["network"]["separable"] == 568_740_352
    assert measured["network"]["full"] == pytest.approx(4866e6, rel=3e-4)


def test_shares_of_mobilenet_are_the_papers(quick: tuple[Path, dict[str, Any]]) -> None:
    """Howard et al. 2017, table 2, but for the stem."""
    measured = quick[1]["claims"]["shares"]["measured"]
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


def test_memory_is_the_papers(quick: tuple[Path, dict[str, Any]]) -> None:
    """Sandler et al. 2018, section 5.1 and table 3."""
    measured = quick[1]["claims"]["memory"]["measured"]
    assert measured["unfused"] == 4 * 96 * (112**2 + 56**2) == 6_021_120
    assert measured["fused"] == 4 * (16 * 112**2 + 24 * 56**2) == 1_103_872
    rows = {int(size): row for size, row in measured["between_blocks"].items()}
    assert {size: row["channels"] for size, row in rows.items()} == {112: 16, 56: 32, 28: 64, 14: 160, 7: 320}
    assert {size: row["bytes"] for size, row in rows.items()} == {n: 2 * n**2 * rows[n]["channels"] for n in rows}
    assert measured["mobilenet"] == 2 * 64 * 112**2
    if fastblocks.current_backend() == "native":
        assert 0 < measured["scratch"]["1"]["scratch"] < 4 * 96 * 112**2 / 8


def test_groups_see_their_share(quick: tuple[Path, dict[str, Any]]) -> None:
    """Zhang et al. 2017, figure 1."""
    measured = quick[1]["claims"]["groups"]["measured"]
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
def test_costs_of_the_guidelines_networks(quick: tuple[Path, dict[str, Any]], key: str, expected: list[int]) -> None:
    rows = quick[1]["claims"][key]["measured"]["groups"][""]
    assert [row["multiply_adds"] for row in rows.values()] == [56 * 56 * each for each in expected]
    assert [row["memory_access_cost"] / row["multiply_adds"] for row in rows.values()] == sorted(
        row["memory_access_cost"] / row["multiply_adds"] for row in rows.values()
    )


def test_rows_of_the_guidelines_have_equal_costs(quick: tuple[Path, dict[str, Any]]) -> None:
    for key in ("g1", "g2", "g3", "g4"):
        for rows in quick[1]["claims"][key]["measured"]["groups"].values():
            cost = [row["multiply_adds"] for row in rows.values()]
            assert max(cost) / min(cost) < 1.06, (key, cost)
    first = quick[1]["claims"]["g4"]["measured"]["groups"]["c = 32"]["neither"]
    assert first["multiply_adds"] == 10 * 56 * 56 * (2 * 32 * 8 + 9 * 8 * 8)


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
def test_another_count_is_another_verdict(
    quick: tuple[Path, dict[str, Any]], key: str, path: tuple[str, ...], value: Any
) -> None:
    measured = copy.deepcopy(quick[1]["claims"][key]["measured"])
    place = measured
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert claim(key).summarise(measured).outcome != "holds"


# --------------------------------------------------------------------------------------------------- files and the page


def test_the_page_opens_without_a_complaint(quick: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (page,) = quick[0].glob("study-*.html")
    assert console_errors(page) == []
    assert requests(page) == []
    screenshot(page, tmp_path / "page.png", (800, 600))
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_that_is_not_well_is_found_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!DOCTYPE html><title>x</title><p>x<img src="http://127.0.0.1:9/x.png"><script>nothing()</script>')
    assert any("nothing is not defined" in line for line in console_errors(page))
    assert requests(page) == ["http://127.0.0.1:9/x.png"]
    page.write_text('<!DOCTYPE html><title>x</title><link rel="icon" href="data:,"><p>x')
    assert console_errors(page) == [] and requests(page) == []


def test_the_files_of_a_study(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, result = quick
    (page,) = folder.glob("study-*.html")
    text = page.read_text("utf-8")
    assert "a &lt;machine&gt;, 1 thread, torch" in text
    for each in CLAIMS:
        assert f"<h2>{each.title.replace(chr(39), '&#39;')}</h2>" in text
        for theme in ("light", "dark"):
            assert (folder / f"{page.stem}-{each.key}-{theme}.png").read_bytes().startswith(b"\x89PNG")
            assert (folder / "docs" / "study" / f"{each.key}-{theme}.png").is_file()
    assert page.stem.endswith(f"-torch{torch.__version__.partition('+')[0]}-{result['facts']['date']}")
    assert not list(folder.rglob("*.part"))


def test_a_study_is_shown_again_from_its_file(
    quick: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = quick[0].glob("study-*.json")
    arguments = ["--load", str(path), "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert main(["study", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == quick[1]
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "docs" / "study.md").read_text() == (quick[0] / "docs" / "study.md").read_text()


def test_the_page_in_docs_is_what_its_file_says(tmp_path: Path) -> None:
    """docs/study.md is written by the command, of docs/study/study.json."""
    output.write_docs(output.read(str(DOCS / "study" / "study.json")), tmp_path)
    text = (DOCS / "study.md").read_text("utf-8")
    assert text == (tmp_path / "study.md").read_text("utf-8")
    shown = set(re.findall(r"study/[\w-]+\.png", text))
    assert shown == {f"study/{key}-{theme}.png" for key in KEYS for theme in ("light", "dark")}
    assert all((DOCS / name).is_file() for name in shown)
    assert sum((DOCS / name).stat().st_size for name in shown) < 700_000


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_a_claim_that_fails_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(seconds: float) -> dict[str, Any]:
        raise RuntimeError("a reason\nof two lines")

    from fastblocks.bench.study import run as module

    claims = tuple(each._replace(measure=fails) if each.key == "groups" else each for each in CLAIMS)
    monkeypatch.setattr(module, "CLAIMS", claims)
    monkeypatch.setattr(output, "CLAIMS", claims)
    assert main(["study", "--only", "groups", "--only", "manifold", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == (
        "fastblocks: study: groups could not be measured: RuntimeError: a reason of two lines"
    )
    assert "holds" in printed.out
    (path,) = tmp_path.glob("study-groups-manifold-*.json")
    found = json.loads(path.read_text("utf-8"))["claims"]
    assert found["manifold"]["outcome"] == "holds" and "measured" not in found["groups"]
    (page,) = tmp_path.glob("study-groups-manifold-*.html")
    assert "Could not be measured: RuntimeError: a reason of two lines" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "g5"], "--only: no claim 'g5', expected some of separable, shares, "),
        (
            ["--load", "{file}"],
            "--load: expected the JSON file of an earlier study, got '{file}': it is no study's JSON",
        ),
        (
            ["--load", "{file}.no"],
            "--load: expected the JSON file of an earlier study, got '{file}.no': No such file",
        ),
        (
            ["--out", "{file}/in"],
            "--out: expected a folder that can be written to, got '{file}/in': Not a directory",
        ),
        (["--docs", "{file}"], "--docs: expected a folder that can be written to, got '{file}': File exists"),
        (["--seconds", "0"], "Invalid value for '--seconds'"),
        (["--threads", str(1 + (os.cpu_count() or 1))], "Invalid value for '--threads'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text('{"format": 1, "claims": {"g1": {}}}')
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(["study", *out, *(word.format(file=file) for word in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"fastblocks: {words.format(file=file)}")


def test_the_caller_keeps_his_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert run_study(["groups", "manifold"])["claims"]["manifold"]["outcome"] == "holds"
    assert torch.equal(torch.rand(2), expected)
