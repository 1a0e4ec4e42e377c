"""`fastblocks study`: its files and pages, and that every mistake is one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import console_errors, requests, screenshot

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from studies import KEYS, Study

from fastblocks.bench.study import CLAIMS, output
from fastblocks.cli import main

pytestmark = pytest.mark.xdist_group("study")  # one process measures it for all of these

DOCS = Path(__file__).parent.parent / "docs"

# --------------------------------------------------------------------------------------------------- files and the page


def test_the_page_opens_without_a_complaint(quick_study: Study, tmp_path: Path) -> None:
    (page,) = quick_study[0].glob("study-*.html")
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


def test_the_files_of_a_study(quick_study: Study) -> None:
    folder, result = quick_study
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
    quick_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = quick_study[0].glob("study-*.json")
    arguments = ["--load", str(path), "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert main(["study", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == quick_study[1]
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "docs" / "study.md").read_text() == (quick_study[0] / "docs" / "study.md").read_text()


def test_some_claims_of_a_file_may_be_chosen(
    quick_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = quick_study[0].glob("study-*.json")
    some = ["--only", "g1", "--only", "groups", "--out", str(tmp_path)]
    assert main(["study", "--load", str(path), *some, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    claims = quick_study[1]["claims"]
    assert found == {**quick_study[1], "claims": {key: claims[key] for key in ("groups", "g1")}}
    (path,) = tmp_path.glob("study-groups-g1-*.json")
    assert main(["study", "--load", str(path), "--only", "g2", "--out", str(tmp_path)]) == 2
    expected = f"fastblocks: --only: no claim 'g2' in {str(path)!r}, expected some of groups, g1\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu": None, "threads": "2"}, "its facts do not tell cpu, threads"),
        ({"date": 20261124, "torch": None, "fastblocks": []}, "its facts do not tell torch, fastblocks, date"),
    ],
)
def test_a_file_must_tell_of_its_machine(
    quick_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({**quick_study[1], "facts": {**quick_study[1]["facts"], **change}}))
    assert main(["study", "--load", str(file), "--out", str(tmp_path)]) == 2
    line = f"fastblocks: --load: expected the JSON file of an earlier study, got {str(file)!r}: {reason}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("change", [{"format": 0}, {"claims": []}, {"claims": {"g5": {}}}, {"facts": 3}])
def test_a_file_that_is_none_of_a_study_is_one_line(
    quick_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({**quick_study[1], **change}))
    assert main(["study", "--load", str(file), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith(f"got {str(file)!r}: it is no study's JSON\n")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("option", "name"), [("--out", "out"), ("--docs", "docs")])
def test_a_disk_that_is_full_is_one_line(
    option: str,
    name: str,
    quick_study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write(path: Path, text: str) -> None:
        if tmp_path / name in path.parents:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "replace_text", write)
    (path,) = quick_study[0].glob("study-*.json")
    folders = ["--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    assert main(["study", "--load", str(path), "--only", "groups", *folders]) == 2
    expected = f"fastblocks: {option}: cannot write to {str(tmp_path / name)!r}: No space left on device\n"
    assert capsys.readouterr().err == expected


def test_the_page_in_docs_is_what_its_file_says(tmp_path: Path) -> None:
    """docs/study.md is written by the command, of docs/study/study.json."""
    result = output.read(str(DOCS / "study" / "study.json"))
    output.write_docs(result, output.draw(result), tmp_path)
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
