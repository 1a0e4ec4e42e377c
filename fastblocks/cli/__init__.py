"""The `fastblocks` command.

What belongs here: reading arguments and photographs, and laying out results. What it computes with is the library's.
Only this file may be imported without the [demo] extra; it imports nothing of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["main"]

DEMO_MODULES = ("click", "rich", "PIL", "skimage")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code.

    0: done. 1: fastblocks and stock torch disagree. 2: something the user can mend, said in one line on stderr.
    """
    if any(find_spec(module) is None for module in DEMO_MODULES):
        print("fastblocks: the command needs a few more packages: pip install 'fastblocks[demo]'", file=sys.stderr)
        return 2
    from fastblocks.cli.app import run

    return run(arguments)
