"""The benchmarks: some groups of `pytest --benchmark-only`, the checks before the timing, and the scripts."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import by_kind

import fastblocks

ROOT = Path(__file__).parent.parent
PLAIN = ("eager", "channels_last")  # compiling costs half a minute
SELECTED = "not compile and (avg_pool2d_240 or (test_network and shufflenet_v2) or test_training_step)"
IDS = {
    "avg_pool2d 240 3x3 28x28 s2, batch 1, 1 thread": (
        "benchmarks/test_bench_ops.py::test_op[avg_pool2d_240_3x3_28x28_s2-batch-1-1-thread-{}]"
    ),
    "shufflenet_v2_x1_0 224x224, batch 1, 1 thread": (
        "benchmarks/test_bench_network.py::test_network[shufflenet_v2_x1_0_224x224-batch-1-1-thread-{}]"
    ),
    "training step mobilenet_v2 128x128, batch 8, 1 thread": (
        "benchmarks/test_bench_training.py::test_training_step[mobilenet_v2_128x128-batch-8-1-thread-{}]"
    ),
}
HEADING = "fastblocks beside the best row of torch"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Python in the root folder, on one thread, with benchmarks that take no time."""
    ours = ("FASTBLOCKS_BENCH", "PYTEST_", "COLUMNS")  # with PYTEST_XDIST_WORKER, nothing would be timed
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"OMP_NUM_THREADS": "1", "FASTBLOCKS_BENCH_SECONDS": "0.001"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def run_pytest(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run("-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *arguments)


one_session = pytest.mark.xdist_group("session")  # one process makes it for all of these


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Three groups, saved, and the folder where."""
    folder = tmp_path_factory.mktemp("benchmarks")
    done = run_pytest("--benchmark-only", f"--benchmark-storage={folder}", "--benchmark-save=first", "-k", SELECTED)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done, folder


@pytest.fixture
def saved(session: tuple[Any, Path]) -> list[dict[str, Any]]:
    (file,) = session[1].glob("*/0001_first.json")
    result: list[dict[str, Any]] = json.loads(file.read_text())["benchmarks"]
    return result


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder's modules can be imported."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield


@one_session
def test_each_group_has_its_rows(saved: list[dict[str, Any]]) -> None:
    found = {(row["group"], row["fullname"]) for row in saved}
    assert found == {(group, name.format(who)) for group, name in IDS.items() for who in (*PLAIN, "fastblocks")}
    for row in saved:
        facts = row["extra_info"]
        assert (facts["batch"], facts["threads"]) == (8 if "training" in row["group"] else 1, 1)
        assert facts["contender"] in row["name"]
        assert facts["tier"] == (fastblocks.current_backend() if facts["contender"] == "fastblocks" else None)
        assert facts["machine"]["torch"] == torch.__version__
        assert row["stats"]["rounds"] >= 7 and row["stats"]["median"] > 0


@one_session
def test_inference_carries_its_share_of_peak(saved: list[dict[str, Any]]) -> None:
    count = by_kind(fastblocks.models.shufflenet_v2_x1_0(), 1, 3, 224, 224)[0].total()
    facts = {row["group"].split()[0]: row["extra_info"] | row["stats"] for row in saved}
    network, pool = facts["shufflenet_v2_x1_0"], facts["avg_pool2d"]
    assert network["multiply_adds"] == count
    assert network["share_of_peak"] == pytest.approx(2 * count / network["median"] / network["peak_gflops"] / 1e9)
    assert pool["multiply_adds"] == 0 and pool["share_of_peak"] is None  # a sum has none
    peaks = {row["extra_info"]["peak_gflops"] for row in saved if "share_of_peak" in row["extra_info"]}
    assert len(peaks) == 1  # measured once


@one_session
def test_the_summary_is_last_and_has_each_group(session: tuple[Any, Path], saved: list[dict[str, Any]]) -> None:
    tables, _, summary = session[0].stdout.partition(HEADING)
    assert all(f"benchmark '{group}'" in tables for group in IDS)
    medians = {(row["group"], row["extra_info"]["contender"]): row["stats"]["median"] for row in saved}
    ratios = {group: medians[group, "fastblocks"] / min(medians[group, who] for who in PLAIN) for group in IDS}
    places = [summary.index(group) for group in sorted(ratios, key=lambda group: -ratios[group])]
    assert places == sorted(places)
    for group, ratio in ratios.items():
        line = next(line for line in summary.splitlines() if line.startswith(group))
        mark, number = re.match(r"\s+(slower )?([\d.]+) ", line.removeprefix(group)).groups()  # type: ignore[union-attr]
        assert number == f"{ratio:.2f}" and bool(mark) == (ratio > 1), line
    assert "Without a row of compile: 3 of 3." in summary


@one_session
def test_a_saved_run_can_be_compared_with(session: tuple[Any, Path]) -> None:
    where = f"--benchmark-storage={session[1]}"
    done = run_pytest("--benchmark-only", where, "--benchmark-compare=0001", "-k", "avg_pool2d_240 and not compile")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    for who in (*PLAIN, "fastblocks"):
        assert f"-1-thread-{who}] (NOW)" in done.stdout and f"-1-thread-{who}] (0001_first)" in done.stdout


@one_session
def test_other_groups_may_be_asked_for(session: tuple[Any, Path]) -> None:
    done = run_pytest("--benchmark-only", "--benchmark-group-by=param:threads", "-k", "pool2d and not compile")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    tables, _, summary = done.stdout.partition(HEADING)
    assert "benchmark 'threads=1': 6 tests" in tables
    assert summary.count("batch 1, 1 thread") == 2


def test_a_plain_run_times_nothing() -> None:
    done = run_pytest("-q")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert re.search(r"\d\d+ skipped", done.stdout) and "Median" not in done.stdout and HEADING not in done.stdout


def test_losses_come_first_and_are_marked(benchmarks: None) -> None:
    from bench_plugin import compare, headline, table
    from rich.console import Console
    from rows import Row

    rows = [Row("won", "eager", 4e-3), Row("won", "channels_last", 9e-3), Row("won", "fastblocks", 1e-3)]
    rows += [Row("lost", "fastblocks", 3e-3), Row("lost", "eager", 2.5e-3), Row("lost", "compile", 2e-3)]
    rows += [
        Row("alone", "fastblocks", 1.0),
        Row("lost narrowly", "eager", 1.0),
        Row("lost narrowly", "fastblocks", 1.01),
    ]
    groups = compare(rows)
    assert [(g.name, g.best, round(g.ratio, 4)) for g in groups] == [
        ("lost", "compile", 1.5),
        ("lost narrowly", "eager", 1.01),
        ("won", "eager", 0.25),
    ]
    assert [g.missing for g in groups] == [("channels_last",), ("channels_last", "compile"), ("compile",)]
    console = Console(width=80)
    with console.capture() as text:
        console.print(table(groups))
    lines = [line.split() for line in text.get().splitlines()[2:]]
    assert lines == [
        ["lost", "slower", "1.50", "3.00", "2.00", "compile"],
        ["lost", "narrowly", "slower", "1.01", "1,010", "1,000", "eager"],
        ["won", "0.25", "1.00", "4.00", "eager"],
    ]
    assert "in 2 of 3; the median ratio of times is 1.01." in headline(groups)


def test_every_op_is_in_the_quick_profile(benchmarks: None) -> None:
    from shapes import NETWORKS, OPS

    assert {shape.name.split()[0] for shape in OPS if shape.quick} == {*fastblocks.functional.__all__} - {"ConvBN"}
    assert all(shape.quick for shape in NETWORKS)
    assert len({shape.name for shape in OPS}) == len(OPS)


def test_wrong_numbers_are_found_before_anything_is_timed(benchmarks: None) -> None:
    from contenders import check
    from rows import check_gradients

    truth = torch.linspace(-1, 1, 100, dtype=torch.float64)
    check((truth + 5e-5).float(), (truth,))
    with pytest.raises(AssertionError, match=r"off by 0.0002 of the largest value"):
        check((truth + 2e-4 * (truth == 1)).float(), (truth,))
    with pytest.raises(AssertionError):
        check(truth.float()[:, None], (truth,))
    gradients = {"bn.weight": truth, "bn.bias": 1e-12 * truth}  # the second vanishes
    check_gradients({"bn.weight": truth * (1 + 1e-4), "bn.bias": 1e-5 * truth}, gradients)
    with pytest.raises(AssertionError, match=r"bn\.weight is off by 0\.01"):
        check_gradients({**gradients, "bn.weight": truth * 1.01}, gradients)
    with pytest.raises(AssertionError, match=r"bn\.bias is off by 0\.01"):
        check_gradients({**gradients, "bn.bias": 1e-2 * truth}, gradients)
    with pytest.raises(AssertionError, match=r"bn\.bias"):
        check_gradients({"bn.weight": truth}, gradients)


def test_the_scripts_of_training_run(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    sizes = ("--model", "shufflenet_v2_x1_0", "--batch", 2, "--resolution", 64, "--threads", 1)
    ours = "fastblocks" if fastblocks.current_backend() == "native" else "fastblocks_numba"
    turns = ("--rounds", 1, "--steps", 1, "--memory", "--modes", "channels_last", ours, "--json", file)
    done = run("benchmarks/train_step.py", *sizes, *turns)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["channels_last", ours], done.stdout
    assert all(row["ms"] > 0 and row["peak_mb"] > 0 for row in rows)

    file = tmp_path / "gradients.json"
    done = run("benchmarks/gradients.py", "--models", "shufflenet_v2_x1_0", "--seeds", 1, "--json", file)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # one seed may miss the bar
    (network,) = json.loads(file.read_text())["networks"]
    count = len([*fastblocks.models.shufflenet_v2_x1_0().parameters()])
    assert network["parameters"] == count and len(network["rows"]) == count + 1
    assert all(row["fastblocks"] < 1e-3 and row["torch"] < 1e-3 for row in network["rows"])


def test_the_script_of_the_digits_runs(tmp_path: Path) -> None:
    """Losses part by a few 1e-6 (with twice the rate they differ by 2e-4); and the trainings are drawn."""
    model, file = "mobilenet_v1_x0_25", tmp_path / "digits.json"
    sizes = ("--models", model, "--seeds", 1, "--steps", 3, "--rates", 1e-5, "--epochs", 1, "--threads", 1)
    done = run("benchmarks/digits.py", *sizes, "--out", tmp_path, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    (result,) = found["losses"]
    assert {len(losses) for losses in result["losses"][0].values()} == {3}
    assert len(result["apart"]) == 4 and max(map(max, result["apart"].values())) < 5e-5, result["apart"]
    (pair,) = found["trainings"][model]
    assert [len(pair[who]) for who in ("fastblocks", "torch")] == [1, 1]
    assert [*tmp_path.glob("digits-*.png")]


def test_the_script_of_the_shuffles_runs(benchmarks: None, tmp_path: Path) -> None:
    from shuffles import CHANNELS, FORMATS, PLACES, STAGES

    found = {}
    for what in ("split", "grouped"):
        file = tmp_path / f"{what}.json"
        done = run("benchmarks/shuffles.py", what, "--batch", 1, "--rounds", 1, "--threads", 1, "--json", file)
        assert done.returncode == 0, done.stdout + done.stderr
        found[what] = json.loads(file.read_text())
    rows = found["split"]["rows"]
    assert len(rows) == len(PLACES) * len(FORMATS) * len(CHANNELS)
    for row in rows:  # of one round
        best = min(row["ms"]["views"], row["ms"]["channel_shuffle"])
        assert row["faster"] == pytest.approx(best / row["ms"]["fastblocks"])
        assert row["of_copy"] == pytest.approx(row["ms"]["copy"] / row["ms"]["fastblocks"])
    rows = found["grouped"]["rows"]
    assert len({row["name"] for row in rows}) == len(rows) == 6 * len(STAGES)
    product = math.prod(row["faster"] for row in rows)
    assert found["grouped"]["mean"] == pytest.approx(product ** (1 / len(rows)))


def test_the_script_of_the_numba_tier_runs(benchmarks: None, tmp_path: Path) -> None:
    from shapes import OPS

    file = tmp_path / "ops.json"
    done = run("benchmarks/numba_tier.py", "ops", "--tier", "reference", "--rounds", 1, "--threads", 1, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert (result["tier"], result["what"], result["batch"], result["facts"]["torch"]) == (
        "reference", "ops", 1, torch.__version__,
    )  # fmt: skip
    assert [row["name"] for rows in result["rows"].values() for row in rows] == [
        line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  ") and "mean" not in line
    ]
    for kind, rows in result["rows"].items():
        for row in rows:
            assert row["faster"] == pytest.approx(row["ms"]["channels_last"] / row["ms"]["fastblocks"])  # of one round
        product = math.prod(row["faster"] for row in rows)
        assert result["means"][kind] == pytest.approx(product ** (1 / len(rows)))
    assert [
        line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  ") and "mean" not in line
    ] == [
        shape.name
        for kind in dict.fromkeys(s.name.split()[0] for s in OPS)
        for shape in OPS
        if shape.name.split()[0] == kind
    ]
