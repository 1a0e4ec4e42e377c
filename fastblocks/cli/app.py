"""The command line itself: options, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

import fastblocks
from fastblocks.bench.errors import BenchError
from fastblocks.cli import options
from fastblocks.cli.bench import bench
from fastblocks.cli.profile import profile
from fastblocks.cli.study import study

__all__ = ["cli", "run"]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors that the user can mend become one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a file name that the terminal cannot show is no reason to fail
    try:
        return cli.main(arguments, prog_name="fastblocks", standalone_mode=False) or 0
    except click.ClickException as error:
        print(f"fastblocks: {' '.join(error.format_message().split())}", file=sys.stderr)
        return error.exit_code
    except BenchError as error:
        print(f"fastblocks: {error}", file=sys.stderr)
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastblocks.__version__, prog_name="fastblocks")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fused CPU kernels for mobile networks, as PyTorch layers."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        context.exit(2)


@cli.command()
@click.argument("photos", metavar="[PHOTO]...", nargs=-1, type=click.Path())
@click.option("--model", default="mobilenet_v2", show_default=True, metavar="NAME", help="Which network.")
@click.option(
    "--weights", type=click.Path(), metavar="FILE", help="A .pth or .safetensors file.  [default: ImageNet's]"
)
@options.threads
@options.rounds(30, "no timing")
@click.option(
    "--top", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="K", help="How many labels a photo."
)
@options.as_json("tables")
def classify(
    photos: tuple[str, ...], model: str, weights: str | None, threads: int | None, rounds: int, top: int, as_json: bool
) -> None:
    """Classify photographs, and time fastblocks beside stock torch.

    Without a PHOTO it takes scikit-image's picture of the cat Chelsea. ImageNet's weights are fetched on first use;
    a network that has none gets random ones.
    """
    from fastblocks.cli.classify import classify as run_classify
    from fastblocks.cli.report import print_classification, print_json

    result = run_classify(photos, model=model, weights=weights, threads=threads, rounds=rounds, top=top)
    (print_json if as_json else print_classification)(result)


@cli.command()
@options.as_json("a table")
def info(as_json: bool) -> None:
    """Show which kernels run here, on what, and why."""
    from fastblocks.cli.info import collect
    from fastblocks.cli.report import print_info, print_json

    (print_json if as_json else print_info)(collect())


@cli.command()
@options.as_json("a line")
def warmup(as_json: bool) -> None:
    """Compile the numba tier's kernels ahead of their first use.

    They are kept on disk, for this processor and this version of fastblocks: later processes only read them.
    """
    from fastblocks.cli.report import print_json, print_warmup
    from fastblocks.cli.warmup import warmup as run_warmup

    (print_json if as_json else print_warmup)(run_warmup())


@cli.command()
@click.option("--model", default="mobilenet_v2", show_default=True, metavar="NAME", help="Which network.")
@click.option(
    "--data",
    default="digits",
    show_default=True,
    metavar="digits|DIR",
    help="scikit-learn's digits, or a folder with train/CLASS/PICTURE and val/CLASS/PICTURE.",
)
@click.option("--epochs", type=click.IntRange(1, 100_000), default=20, show_default=True, metavar="N")
@click.option(
    "--batch-size",
    type=click.IntRange(2, 65_536),
    default=64,
    show_default=True,
    metavar="N",
    help="Images a step, in each process.",
)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=0.05,
    show_default=True,
    metavar="X",
    help="The highest learning rate: it rises for a twentieth of the steps, then falls by half a cosine.",
)
@click.option("--momentum", type=click.FloatRange(0, 1, max_open=True), default=0.9, show_default=True, metavar="X")
@click.option("--weight-decay", type=click.FloatRange(0), default=1e-4, show_default=True, metavar="X")
@click.option(
    "--resolution",
    type=click.IntRange(8, 2048),
    metavar="N",
    help="Pixels of a side.  [default: 32 for digits, 224 for a folder]",
)
@click.option("--width-mult", type=float, metavar="X", help="Of networks that take it: multiplies the channels.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="N")
@options.threads
@click.option(
    "--out",
    type=click.Path(),
    metavar="DIR",
    help="Checkpoint, history and curves.  [default: runs/NAME of the network]",
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on from a checkpoint in DIR.")
@click.option("--stock", is_flag=True, help="Train the plain torch network instead, to compare.")
def train(out: str | None, resume: bool, threads: int | None, **settings: Any) -> None:
    """Train a network on scikit-learn's digits or on a folder of pictures.

    After each epoch DIR has checkpoint.pt, history.json and curves.png. The same command goes on where it was stopped,
    by whatever means, with the same losses as if it had not been. More --epochs go on further. Several processes:
    torchrun --nproc-per-node 2 -m fastblocks train.
    """
    from fastblocks.cli.train import Settings
    from fastblocks.cli.train import train as run_train

    run_train(Settings(**settings), out, resume=resume, threads=threads)


cli.add_command(bench)
cli.add_command(study)
cli.add_command(profile)
