"""The README's measured tables say what the files of results say that they name."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
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
    assert kinds == ["inference", "training"]
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
