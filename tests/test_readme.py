"""The README's measured tables say what the files of results say that they name."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "readme.py"


@pytest.fixture(scope="module")
def readme() -> Any:
    spec = importlib.util.spec_from_file_location("readme_tables", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_its_files(readme: Any) -> None:
    text = (ROOT / "README.md").read_text()
    kinds = [found["kind"] for found in readme.BLOCK.finditer(text)]
    assert kinds == ["inference", "training", "malloc", "numba"]
    assert readme.remade(text, {}) == text


def test_a_number_is_the_median_of_its_rounds() -> None:
    """By hand, from the rounds: a table that is made and checked by the same code proves little."""
    text = (ROOT / "README.md").read_text()
    file = re.search(r"<!-- inference: (\S+) -->", text)
    assert file is not None
    contest = json.loads((ROOT / file[1]).read_text())["contests"][0]
    rows = {row["name"]: row["rounds"] for row in contest["rows"]}
    table = text[text.index(f"| batch {contest['batch']} |") :]
    column = table.splitlines()[0].split(" | ").index(contest["model"])
    line = next(line for line in table.splitlines() if line.startswith("| LiteRT"))
    milliseconds, ratio = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", line.split(" | ")[column]).groups()  # type: ignore[union-attr]
    assert float(milliseconds) == pytest.approx(statistics.median(rows["litert"]), rel=5e-3)
    ratios = [a / b for a, b in zip(rows["fastblocks"], rows["litert"], strict=True)]
    assert float(ratio) == pytest.approx(statistics.median(ratios), abs=5e-3)


def test_pictures_are_there(readme: Any) -> None:
    text = (ROOT / "README.md").read_text()
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(pictures) == 2
    assert all((ROOT / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_an_edited_number_is_noticed(readme: Any) -> None:
    text = (ROOT / "README.md").read_text()
    start = text.index("| fastblocks |")
    edited = text[:start] + text[start:].replace("| fastblocks | ", "| fastblocks | 9", 1)
    assert edited != text and readme.remade(edited, {}) == text


# -------------------------------------------------------------------------------------------- results that are made up

FACTS = {"cpu": "a cpu", "cores": 2, "isa": "znver9", "torch": "2.14.1+cpu", "date": "2026-01-02"}
SETTING = {"facts": FACTS, "threads": 1}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Writes a file of results; its path."""

    def write(name: str, **result: Any) -> str:
        (tmp_path / name).write_text(json.dumps({**SETTING, **result}))
        return str(tmp_path / name)

    return write


def step(model: str, times: dict[str, list[float]], tuned: bool = False, **more: Any) -> dict[str, Any]:
    """What train_step.py writes."""
    rows = [{"mode": mode, "ms": statistics.median(ms), "times": ms, **more} for mode, ms in times.items()]
    setting = {"model": model, "batch": 16, "resolution": 224, "rounds": 3, "steps": 1, "malloc_tuned": tuned}
    return {**setting, "rows": rows}


def run_of_networks(batch: int, faster: dict[str, float]) -> dict[str, Any]:
    """What numba_tier.py writes."""
    rows = {"networks": [{"name": f"{name} 224x224", "faster": value} for name, value in faster.items()]}
    return {"tier": "numba", "what": "networks", "batch": batch, "means": {"networks": 1.0}, "rows": rows}


@pytest.fixture
def tier_files(written: Callable[..., str]) -> list[str]:
    return [
        written("8.json", **run_of_networks(8, {"b": 3.04})),
        written("1.json", **run_of_networks(1, {"a": 1.52, "b": 2.0})),
        written("ops.json", tier="numba", what="ops", batch=1, means={"pool": 1.26, "linear": 1.0}, rows={"pool": []}),
        written("step.json", **step("a", {"channels_last": [4.0, 6.0, 9.0], "fastblocks_numba": [2.0, 3.0, 3.0]})),
    ]


def test_the_numba_tiers_table(readme: Any, tier_files: list[str]) -> None:
    text = readme.numba(tier_files)
    assert text.startswith("The numba tier, 2-core a cpu, znver9, torch 2.14.1, 1 thread, 2026-01-02: how many times")
    assert text.splitlines()[4:] == [
        "| numba tier | a | b |",
        "|---|---|---|",
        "| batch 1 | 1.5 | 2.0 |",
        "| batch 8 | - | 3.0 |",
        "| a training step, batch 16 | 2.0 | - |",
        "",
        "Ops alone, batch 1, geometric means of the benchmarks' shapes: pool 1.3, linear 1.0.",
    ]


def test_what_a_tuned_malloc_gives_torch(readme: Any, written: Callable[..., str]) -> None:
    rows = [
        {"mode": "eager", "ms": 300.0, "of_best_torch": 1.5, "best_torch": False},
        {"mode": "channels_last", "ms": 200.4, "of_best_torch": 1.0, "best_torch": True},
        {"mode": "fastblocks", "ms": 120.0, "of_best_torch": 0.597, "best_torch": False},
    ]
    file = written("tuned.json", model="net", batch=16, malloc_tuned=True, rows=rows)
    assert "its best mode takes 200 ms for net, and fastblocks 0.60 of that." in readme.malloc([file])
    file = written("alone.json", model="net", batch=16, malloc_tuned=True, rows=rows[2:])
    with pytest.raises(ValueError, match="expected a mode of torch"):
        readme.malloc([file])


def test_files_make_their_block_and_no_other(readme: Any, tier_files: list[str]) -> None:
    text = (ROOT / "README.md").read_text()
    made = readme.remade(text, {"numba": tier_files})
    begin = text.index("<!-- numba:")
    end = text.index("<!-- end -->", begin)
    assert made.startswith(text[:begin]) and made.endswith(text[end:])
    assert f"<!-- numba: {' '.join(tier_files)} -->\nThe numba tier, 2-core a cpu" in made
    assert readme.remade(made, {}) == made


def test_what_is_not_known_is_a_dash(readme: Any, written: Callable[..., str]) -> None:
    file = written("step.json", **step("net", {"eager": [4.0]}))
    table = readme.training([file]).splitlines()
    assert "| fastblocks | - |" in table and "| torch eager | 4.00 |" in table
    assert "| peak memory, of channels_last's | - |" in table
    assert table[1].endswith(", 3 rounds of 1 step.")
    row = {"name": "eager", "title": "torch eager", "milliseconds": 4.0, "fastblocks_takes": None, "share_of_peak": 0.5}
    contest = {"model": "net", "batch": 1, "threads": 1, "rounds": 3, "fastblocks_takes_of_best_engine": None}
    text = readme.inference([written("bench.json", command="x", contests=[{**contest, "rows": [row]}])])
    assert "1 thread, 2026-01-02, median of 3 interleaved rounds:" in text
    assert text.splitlines()[-3:] == [
        "| torch eager | 4.00 |",
        "| ratio to the best engine, round by round | - |",
        "| fastblocks' share of the FMA peak | - |",
    ]


def test_results_of_two_machines_make_no_table(readme: Any, written: Callable[..., str]) -> None:
    files = [written(f"{cpu}.json", **step("net", {"eager": [4.0]}), facts={**FACTS, "cpu": cpu}) for cpu in "ab"]
    with pytest.raises(ValueError, match=r"^cpu: expected the same in .*a\.json, .*b\.json, got a, b$"):
        readme.training(files)


def test_a_file_finds_its_block(readme: Any) -> None:
    both = {"channels_last": [1.0], "fastblocks_numba": [1.0]}
    results = {
        "inference": {"contests": []},
        "training": step("net", {"fastblocks": [1.0], **both}),
        "malloc": step("net", {"fastblocks": [1.0], "fastblocks_tuned": [1.0]}, tuned=True),
        "numba": step("net", both),
    }
    assert {kind: readme.kind_of(result) for kind, result in results.items()} == {kind: kind for kind in results}
    assert readme.kind_of(run_of_networks(1, {})) == "numba"
    for other in (run_of_networks(1, {}) | {"tier": "reference"}, step("net", {"eager": [1.0]})):
        with pytest.raises(ValueError, match=r"^expected results of "):
            readme.kind_of(other)
