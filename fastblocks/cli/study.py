"""`fastblocks study`: the papers' claims, measured here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from fastblocks.cli import options

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["study"]

COLOURS = {"holds": "green", "holds in part": "yellow", "not seen here": "magenta"}


@click.command()
@click.option(
    "--only",
    multiple=True,
    metavar="CLAIM",
    help="One claim, by its short name; may be given several times.  [default: all of them]",
)
@click.option(
    "--out",
    default="benchmarks/results",
    show_default=True,
    type=click.Path(),
    metavar="DIR",
    help="For the JSON file, the page and the charts.",
)
@options.threads
@click.option(
    "--seconds",
    type=click.FloatRange(0, 600, min_open=True),
    default=1.0,
    show_default=True,
    metavar="X",
    help="To spend on each timed row.",
)
@click.option("--load", type=click.Path(), metavar="FILE", help="Show an earlier study's JSON file; measure nothing.")
@click.option("--docs", type=click.Path(), metavar="DIR", help="Write DIR/study.md, with its charts in DIR/study, too.")
@click.option("--machine", metavar="TEXT", help="How the pages name the machine.  [default: its processor's name]")
@options.as_json("a table")
@click.pass_context
def study(
    context: click.Context,
    only: tuple[str, ...],
    out: str,
    threads: int | None,
    seconds: float,
    load: str | None,
    docs: str | None,
    machine: str | None,
    as_json: bool,
) -> None:
    """Measure what the papers claim, torch beside fastblocks, on this machine.

    Ten claims of MobileNet, MobileNetV2, ShuffleNet and ShuffleNetV2, counted and timed; the result is a page with
    charts that opens anywhere. It takes one to three minutes. The claims' short names: separable, shares, resnext,
    groups, manifold, memory, g1, g2, g3, g4.
    """
    import torch

    from fastblocks.cli.errors import need

    need("bench", "the page", "matplotlib", "jinja2")
    from fastblocks.bench.files import folder
    from fastblocks.bench.study import output
    from fastblocks.bench.study.run import chosen
    from fastblocks.cli.report import print_json

    chosen(only)
    folders = [folder(path, name) for path, name in ((out, "--out"), (docs, "--docs")) if path is not None]
    if threads is not None:
        torch.set_num_threads(threads)
    result = output.read(load, only) if load else _measured(only, seconds)
    if machine is not None:
        result["facts"]["machine"] = machine
    pictures = output.draw(result)
    paths = output.write(result, pictures, folders[0])
    if docs is not None:
        paths += output.write_docs(result, pictures, folders[1])
    if as_json:
        print_json(result)
    else:
        _print(result, [str(path) for path in paths if path.suffix in (".html", ".md")])
    failed = {key: entry["error"] for key, entry in result["claims"].items() if "error" in entry}
    for key, error in failed.items():
        print(f"fastblocks: study: {key} could not be measured: {error}", file=sys.stderr)
    if failed:
        context.exit(1)


def _measured(only: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """The study, with its progress on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastblocks.bench.study.run import chosen
    from fastblocks.bench.study.run import study as run

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(chosen(only))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        result = run(only, seconds=seconds, tell=lambda claim: progress.update(task, advance=1, description=claim.key))
    return result


def _print(result: dict[str, Any], pages: list[str]) -> None:
    """Print the claims as a table, then why each has its verdict, and where the page is."""
    from rich.console import Console
    from rich.text import Text

    from fastblocks.bench.words import counted, torch_version

    console = Console(highlight=False)
    facts = result["facts"]
    console.print(_table(result["claims"]), "")
    console.print(_reasons(result["claims"]), "")
    threads = counted(facts["threads"], "thread")
    words = (facts.get("machine", facts["cpu"]), threads, f"torch {torch_version(facts)}", facts["date"])
    console.print(Text(", ".join(words), style="dim"))
    for page in pages:
        console.print(Text(page, "bold"), soft_wrap=True)


def _table(claims: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for heading in ("claim", "the papers", "here", "verdict"):
        table.add_column(heading, no_wrap=heading in ("claim", "verdict"))
    for key, entry in claims.items():
        if "error" in entry:
            table.add_row(Text(key), "", "", Text("no result", "bold red"))
            continue
        verdict = Text(entry["outcome"], f"bold {COLOURS[entry['outcome']]}")
        table.add_row(Text(key), Text(entry["paper_says"]), Text(entry["found"]), verdict)
    return table


def _reasons(claims: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for key, entry in claims.items():
        words = Text(entry["error"], "red") if "error" in entry else Text(entry["because"])
        grid.add_row(Text(key, "bold"), Text.assemble((entry["title"], "bold"), "\n", words))
    return grid
