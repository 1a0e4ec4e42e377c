"""`fastblocks bench`: the networks beside what a user would pick instead."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import click

from fastblocks.cli import options

__all__ = ["bench"]


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1, 1024),
    multiple=True,
    default=(1,),
    show_default=True,
    metavar="N",
    help="Images a call; may be given several times.",
)
@options.threads
@options.rounds(15)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 60),
    default=0.4,
    show_default=True,
    metavar="X",
    help="Length of one turn of one contender.",
)
@click.option(
    "--peers",
    metavar="NAME,...",
    help="Contenders, fastblocks among them or not.  [default: all that are installed]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results"),
    show_default=True,
    metavar="DIR",
    help="Where JSON, page and charts go.",
)
@click.option("--setup-peers", is_flag=True, help="First install the missing ones, in environments of their own.")
@options.as_json("tables")
def bench(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    threads: int | None,
    rounds: int,
    seconds: float,
    peers: str | None,
    out: Path,
    setup_peers: bool,
    as_json: bool,
) -> None:
    """Time networks beside torch's modes and the inference engines, in interleaved rounds.

    Without a MODEL it takes mobilenet_v2. Each contender runs in a process of its own and must compute what torch
    computes. A contender that is not installed or fails is left out by name. Leave the machine alone meanwhile.
    """
    import torch

    from fastblocks.cli.errors import need

    need("bench", "the page", "matplotlib", "jinja2")
    from fastblocks.bench import machine
    from fastblocks.bench.errors import BenchError
    from fastblocks.bench.files import folder
    from fastblocks.bench.peers import PEERS
    from fastblocks.bench.peers.contest import Contest, hold
    from fastblocks.bench.peers.show import write_files
    from fastblocks.cli.bench_report import print_bench, progress
    from fastblocks.cli.report import print_json

    names = tuple(PEERS) if peers is None else tuple(dict.fromkeys(name.strip() for name in peers.split(",")))
    for name in names:
        if name not in PEERS:
            raise click.UsageError(f"--peers: no contender {name!r}, expected some of {', '.join(PEERS)}")
    _check_models(models)
    folder(out, "--out")  # before minutes of measuring, not after
    contests, failures = [], []
    with progress() as tell:
        if setup_peers:
            _set_up(names, tell)
        count = threads or torch.get_num_threads()
        for model, batch in product(models or ("mobilenet_v2",), batches):
            try:
                contests.append(hold(Contest(model, batch, count, rounds, seconds, names), tell))
            except BenchError as error:  # the other contests are worth their minutes all the same
                failures.append(f"{model}, batch {batch}: {error}")
    if not contests:
        raise BenchError("; ".join(failures))
    which = " ".join((*(models or ("mobilenet_v2",)), *(f"--batch {batch}" for batch in batches)))
    command = f"fastblocks bench {which} --threads {count} --rounds {rounds} --seconds {seconds:g}"
    if peers is not None:
        command += f" --peers {','.join(names)}"
    result = {"facts": machine.facts(), "command": command, "contests": contests}
    files = write_files(result, out)
    if as_json:
        print_json(result)
    else:
        print_bench(result, files)
    if failures:
        raise BenchError("; ".join(failures))


def _check_models(models: tuple[str, ...]) -> None:
    from fastblocks.models import list as names

    for model in models:
        if model not in names():
            raise click.UsageError(f"no network {model!r}, expected some of {', '.join(names())}")


def _set_up(names: tuple[str, ...], tell: Any) -> None:
    from fastblocks.bench.peers.environments import set_up

    for failure in set_up(names, tell):
        print(f"fastblocks: could not install {failure}", file=sys.stderr)
