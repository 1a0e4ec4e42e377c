"""`fastblocks warmup`: the numba tier's kernels, compiled before anybody waits for them."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastblocks import backends
from fastblocks.cli.errors import UserError

__all__ = ["warmup"]


def warmup(*, show: bool = True) -> dict[str, Any]:
    """Compile every kernel of the numba tier that the cache on disk has not got.

    Args:
        show: whether to show how far it is, where output is a terminal.

    Returns:
        ``kernels`` (how many there are), ``compiled`` (how many were not in the cache), ``seconds``, ``cpu`` (the
        processor they are for) and ``cache`` (the directory, or None where none can be written).

    Raises:
        UserError: the numba tier does not work here.
    """
    console = Console(highlight=False, stderr=True, quiet=not show)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )
    start = time.perf_counter()
    with bar:
        task = bar.add_task("loading numba", total=None)
        try:
            tier = backends.load_numba()
        except RuntimeError as error:
            raise UserError(str(error)) from None
        kernels = tier.kernels()
        bar.update(task, total=len(kernels))
        compiled = 0
        for kernel in kernels:
            bar.update(task, description=kernel.name)
            compiled += not kernel.compile().from_cache
            bar.advance(task)
    return {
        "kernels": len(kernels),
        "compiled": compiled,
        "seconds": time.perf_counter() - start,
        "cpu": tier.info()["isa"],
        "cache": tier.cache_directory(),
    }
