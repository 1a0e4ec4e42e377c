"""`fastblocks profile`: its options, and how its result looks in a terminal."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from fastblocks.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastblocks.bench.profile.columns import Column

__all__ = ["print_profile", "profile"]

BAR = 12  # characters of the longest time
GAP = 2  # between columns

Row = Mapping[str, Any]


class _Size(click.ParamType):
    """A number of pixels, or height x width."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", value)
        height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not (height and width):
            self.fail(
                f"{value!r}: expected pixels of a side, such as 224, or height x width, such as 192x256", param, ctx
            )
        return height, width


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--batch", type=click.IntRange(1, 4096), default=1, show_default=True, metavar="N", help="Images at once."
)
@click.option("--size", type=_Size(), metavar="N|HxW", help="Pixels of the images.  [default: 224, or what timm says]")
@options.threads
@options.rounds(30, "counts only")
@options.as_json("tables")
@click.option("--html", "html_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write a page, too.")
@click.option(
    "--plot", "plot_file", type=click.Path(dir_okay=False), metavar="FILE.png", help="Draw the roofline, too."
)
def profile(
    model: str,
    batch: int,
    size: tuple[int, int] | None,
    threads: int | None,
    rounds: int,
    as_json: bool,
    html_file: str | None,
    plot_file: str | None,
) -> None:
    """Show what each block of a network costs, and how to make it cheaper.

    MODEL is a network of fastblocks, torchvision or timm by its name, or module:callable, a function of your own that
    returns one. It gets random weights and random images. Each block is timed in plain torch and, where fastblocks has
    the network, in fastblocks.
    """
    from fastblocks.bench.profile import profile as run_profile
    from fastblocks.cli.report import print_json

    _check_files(html_file, plot_file, rounds)
    with _progress(quiet=as_json) as told:
        result = run_profile(model, batch=batch, size=size, threads=threads, rounds=rounds, on_step=told)
    (print_json if as_json else print_profile)(result)
    _write_files(result, html_file, plot_file)


def _check_files(html_file: str | None, plot_file: str | None, rounds: int) -> None:
    """Refuse what could not be written, before anything is measured."""
    from pathlib import Path

    from fastblocks.bench.files import folder
    from fastblocks.cli.errors import need

    if plot_file is not None and not rounds:
        raise click.UsageError("--plot: a roofline needs times, expected --rounds above 0")
    if plot_file is not None and not plot_file.lower().endswith(".png"):
        raise click.UsageError(f"--plot {plot_file!r}: expected a file name that ends in .png")
    for option, file in (("--html", html_file), ("--plot", plot_file)):
        if file is None:
            continue
        need("bench", option, "matplotlib", "jinja2")
        if not Path(file).name or (Path(file).exists() and not Path(file).is_file()):
            raise click.UsageError(f"{option} {file!r}: expected the name of a file")
        folder(Path(file).parent, option)


def _write_files(result: Row, html_file: str | None, plot_file: str | None) -> None:
    from pathlib import Path

    from fastblocks.bench.files import replace, replace_text, told_of

    if html_file is None and plot_file is None:
        return
    from fastblocks.bench.profile import page

    for option, file in (("--html", html_file), ("--plot", plot_file)):
        if file is None:
            continue
        with told_of(option, file):
            if option == "--html":
                replace_text(Path(file), page.html(result))
            else:
                picture = page.roofline(result).light
                replace(Path(file), lambda opened, picture=picture: opened.write(picture))  # type: ignore[misc]
        click.echo(f"written: {file}", err=True)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, str], object]]:
    """A bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, quiet=quiet)
    with Progress(
        BarColumn(), TextColumn("{task.description}"), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, steps, what: bar.update(task, completed=done, total=steps or None, description=what)


def print_profile(result: Row) -> None:
    """Print the whole network's times, the table of blocks, and the advice."""
    from rich.console import Console
    from rich.text import Text

    from fastblocks.bench.profile import columns as shown
    from fastblocks.bench.words import torch_version

    console = Console(highlight=False)
    console.print(Text.assemble((result["model"], "bold"), (f"  {shown.headline(result)}", "dim")))
    if result["network"] is not None:
        console.print("", _network_table(shown.network_times(result)))
    console.print("", _blocks_table(result, console), "")
    for note in shown.notes(result):
        console.print(Text(note, "dim"))
    console.print(
        "", _advice_table(result) if result["advice"] else Text("advice: the guidelines find nothing to better")
    )
    facts = result["machine"]
    console.print(Text(f"torch {torch_version(facts)}, {facts['cpu']}, {facts['date']}", "dim"))


def _network_table(times: Sequence[tuple[str, float, float | None]]) -> Table:
    from fastblocks.bench.profile.columns import milliseconds

    table = _table()
    table.add_column("whole network")
    table.add_column("time", justify="right")
    if any(ratio for *_, ratio in times):
        table.add_column("fastblocks' speed-up", justify="right")
    for name, seconds, ratio in times:
        style = "bold green" if name == "fastblocks" else ""
        table.add_row(name, milliseconds(seconds), *([f"{ratio:.2f} x"] if ratio else []), style=style)
    return table


def _blocks_table(result: Row, console: Console) -> Table:
    """The table, without the columns that the terminal has no room for, or with bars if it has much."""
    from rich.text import Text

    from fastblocks.bench.profile.columns import columns

    found = columns(result)
    while _width(found) > console.width and any(column.spare for column in found):
        found.remove(max(found, key=lambda column: column.spare))
    table = _table()
    for column in found:
        green = "green" if column.unit == "fastblocks" else ""
        heading = Text(f"{column.heading}\n{column.unit}")
        table.add_column(heading, justify="left" if column is found[0] else "right", style=green, no_wrap=True)
    bars = _bars(result, console) if _width(found) + BAR + GAP <= console.width else []
    if bars:
        table.add_column(Text("\ntime"), no_wrap=True)
    last = len(result["blocks"]) - 1
    for number in range(last + 1):
        cells = [column.cells[number] for column in found[1:]]
        table.add_row(_name(found[0].cells[number]), *cells, *bars[number : number + 1], end_section=number == last)
    table.add_row(*(column.total for column in found), *([""] if bars else []), style="bold")
    return table


def _width(found: Sequence[Column]) -> int:
    texts = ((column.heading, column.unit, column.total, *column.cells) for column in found)
    return sum(max(map(len, text)) + GAP for text in texts)


def _name(path: str) -> Text:
    """The container, which many rows share, faint; then the block."""
    from rich.text import Text

    before, dot, name = path.rpartition(".")
    return Text.assemble((before + dot, "dim"), name)


def _bars(result: Row, console: Console) -> list[Text]:
    """Each block's time in plain torch, of which the green part is fastblocks'."""
    if result["network"] is None:
        return []
    from rich.text import Text

    block = "#" if console.options.ascii_only else "━"
    best = result["network"]["best"]
    times = [row.get("seconds", {}) for row in result["blocks"]]
    longest = max((time.get(best, 0.0) for time in times), default=0.0) or 1.0
    bars = []
    for time in times:
        whole, ours = (round(BAR * time.get(name, 0.0) / longest) for name in (best, "fastblocks"))
        bars.append(Text.assemble((block * min(ours, whole), "green"), (block * max(whole - ours, 0), "dim")))
    return bars


def _advice_table(result: Row) -> Table:
    from rich.text import Text

    from fastblocks.bench.profile.columns import advice_blocks, milliseconds

    table = _table()
    for heading in ("", "advice (Ma et al. 2018), the most expensive first"):
        table.add_column(heading)
    measured = result["network"] is not None
    if measured:
        table.add_column("about", justify="right", no_wrap=True)
        table.add_column("of the net", justify="right", no_wrap=True)
    for advice in result["advice"]:
        text = Text.assemble((f"{advice['title']}: ", "bold"), f"{advice['remedy']}\n", f"{advice_blocks(advice)}\n")
        text.append(f"estimate: {advice['how']}" if measured else f"{advice['extra_bytes'] / 1e6:.2f} MB", "dim")
        cells = []
        if measured:
            whole = result["network"]["seconds"][result["network"]["best"]]
            cells = [milliseconds(advice["seconds"]), f"{100 * advice['seconds'] / whole:.1f} %"]
        table.add_row(Text(advice["guideline"], "bold"), text, *cells)
    return table


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, GAP - 1, 0, 0), header_style="dim")
