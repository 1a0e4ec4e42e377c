"""A study as files: JSON, one self-contained page, charts, and a page for docs/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastblocks.bench.charts import Picture
from fastblocks.bench.errors import BenchError
from fastblocks.bench.files import folder, replace_text, told_of
from fastblocks.bench.page import Figure, Section, Table, Text, render_page
from fastblocks.bench.study.claim import Claim
from fastblocks.bench.study.run import CLAIMS, FORMAT, verdict
from fastblocks.bench.words import counted, stem, torch_version

__all__ = ["draw", "read", "write", "write_docs"]

TITLE = "The papers' claims, measured"
FACTS = {"cpu": str, "torch": str, "fastblocks": str, "date": str, "threads": int}
"""What a study must tell of its machine, beside what else it may."""
Result = dict[str, Any]


def read(path: str, keys: Sequence[str] = ()) -> Result:
    """A study from its JSON file, its verdicts made anew from what was measured.

    Args:
        path: of the file.
        keys: the claims to take of it; none is all of them.

    Raises:
        BenchError: the file is none of a study, or has no such claim.
    """
    expected = f"--load: expected the JSON file of an earlier study, got {path!r}"
    try:
        result = json.loads(Path(path).read_text("utf-8"))
        facts, claims = result["facts"], dict(result["claims"])
        if result["format"] != FORMAT or not claims or not set(claims) <= {claim.key for claim in CLAIMS}:
            raise ValueError(path)
        lacking = [name for name, kind in FACTS.items() if not isinstance(facts.get(name), kind)]
        for claim, entry in _entries(result):
            entry |= {"title": claim.title} | ({} if "error" in entry else verdict(claim, entry["measured"]))
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "it is no study's JSON"
        raise BenchError(f"{expected}: {reason}") from error
    if lacking:
        raise BenchError(f"{expected}: its facts do not tell {', '.join(lacking)}")
    for key in keys:
        if key not in claims:
            raise BenchError(f"--only: no claim {key!r} in {path!r}, expected some of {', '.join(claims)}")
    return {**result, "claims": {key: entry for key, entry in claims.items() if not keys or key in keys}}


def draw(result: Result) -> dict[str, Picture]:
    """A chart for each claim that was measured, by the claim's key."""
    return {claim.key: claim.picture(entry["measured"]) for claim, entry in _entries(result) if "error" not in entry}


def write(result: Result, pictures: Mapping[str, Picture], out: Path) -> list[Path]:
    """Write ``study-CPU-torchVERSION-DATE.json`` and ``.html``, and the charts that `draw` made beside them.

    Returns:
        The paths, JSON and page first. A study of a few claims has their names in its files' names.

    Raises:
        BenchError: a file cannot be written.
    """
    name = _stem(result)
    paths = [out / f"{name}.json", out / f"{name}.html"]
    with told_of("--out", out):
        replace_text(paths[0], _json(result))
        replace_text(paths[1], _page(result, pictures))
        for key, picture in pictures.items():
            paths += picture.save(out / f"{name}-{key}")
    return paths


def write_docs(result: Result, pictures: Mapping[str, Picture], docs: Path) -> list[Path]:
    """Write a page of documentation, ``study.md``, and into ``study/`` the JSON file and charts of stable names.

    Raises:
        BenchError: a file cannot be written.
    """
    below = folder(docs / "study", "--docs")
    paths = [docs / "study.md", below / "study.json"]
    with told_of("--docs", docs):
        replace_text(paths[1], _json(result))
        for key, picture in pictures.items():
            paths += picture.save(below / key)
        replace_text(paths[0], "\n".join(_markdown(result, {key: picture.alt for key, picture in pictures.items()})))
    return paths


def _json(result: Result) -> str:
    """Indented, but for lists of plain values, each of which has a line."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _entries(result: Mapping[str, Any]) -> Iterator[tuple[Claim, dict[str, Any]]]:
    for claim in CLAIMS:
        if claim.key in result["claims"]:
            yield claim, result["claims"][claim.key]


def _stem(result: Mapping[str, Any]) -> str:
    keys = [] if len(result["claims"]) == len(CLAIMS) else list(result["claims"])
    return stem(["study", *keys], result["facts"])


def _page(result: Mapping[str, Any], pictures: Mapping[str, Picture]) -> str:
    facts = result["facts"]
    sections = [Section("In short", [_overview(result)])]
    for claim, entry in _entries(result):
        blocks: list[Text | Table | Figure] = [Text(f"{claim.paper}. {claim.statement}")]
        if "error" in entry:
            blocks.append(Text(f"Could not be measured: {entry['error']}"))
        else:
            blocks += [Text(_sentence(entry), "verdict"), Figure(pictures[claim.key], claim.caption)]
            blocks += claim.tables(entry["measured"])
        blocks.append(Text(f"How: {claim.method}", "note"))
        sections.append(Section(claim.title, blocks))
    subtitle = f"{_machine(facts)}, torch {torch_version(facts)}, {facts['date']}; medians of interleaved rounds"
    return render_page(TITLE, subtitle, sections, facts)


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts.get('machine', facts['cpu'])}, {counted(facts['threads'], 'thread')}"


def _overview(result: Mapping[str, Any]) -> Table:
    rows = [
        (claim.title, "could not be measured", "", "")
        if "error" in entry
        else (claim.title, entry["outcome"], entry["paper_says"], entry["found"])
        for claim, entry in _entries(result)
    ]
    return Table(("claim", "verdict", "the papers", "here"), rows, words=True)


def _sentence(entry: Mapping[str, Any]) -> str:
    return f"{entry['outcome'].capitalize()}: {entry['because']}."


def _markdown(result: Mapping[str, Any], alts: Mapping[str, str]) -> Iterator[str]:
    facts = result["facts"]
    yield f"# {TITLE}\n"
    versions = f"torch {torch_version(facts)}, fastblocks {facts['fastblocks']}"
    yield f"Measured on {facts['date']}: {_machine(facts)}, {versions}."
    yield "Medians of interleaved rounds. `fastblocks study` measures the same on your machine; this page, its numbers"
    yield "and its charts were written by it.\n"
    yield from _markdown_table(_overview(result))
    for claim, entry in _entries(result):
        yield f"## {claim.title}\n"
        yield f"{claim.paper}. {claim.statement}\n"
        if "error" in entry:
            yield f"Could not be measured: {entry['error']}\n"
            continue
        yield f"**{entry['outcome'].capitalize()}:** {entry['because']}.\n"
        yield "<picture>"
        yield f'  <source media="(prefers-color-scheme: dark)" srcset="study/{claim.key}-dark.png">'
        yield f'  <img src="study/{claim.key}-light.png" alt="{alts[claim.key]}">'
        yield "</picture>\n"
        yield f"{claim.caption}\n"
        for table in claim.tables(entry["measured"]):
            yield from _markdown_table(table)
        yield f"How: {claim.method}\n"


def _markdown_table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.headings)} |"
    yield f"|---|{('---|' if table.words else '---:|') * (len(table.headings) - 1)}"
    for row in table.rows:
        yield f"| {' | '.join(row)} |"
    yield ""
