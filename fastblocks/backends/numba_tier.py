"""The numba tier as ``fastblocks.backends`` sees it. Importing this imports Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from torch import Tensor

from fastblocks.backends import counts, numba_pool
from fastblocks.backends.numba_backward import backward
from fastblocks.backends.numba_forward import forward, make_program
from fastblocks.backends.numba_ops import TABLE as OPS
from fastblocks.backends.program import Program

__all__ = ["TABLE", "cache_directory", "chain_functions", "info", "kernels"]


def info() -> dict[str, Any]:
    """What `fastblocks.backend_info` says of this tier."""
    return {
        "isa": llvm.get_host_cpu_name(),
        "threads": numba_pool.threads(),
        "pool": "torch" if numba_pool.has_pool() else "none",
        "reason": numba_pool.pool_reason,
    }


def kernels() -> list[numba_pool.Kernel]:
    """All that are compiled, when they are used or before."""
    return list(numba_pool.kernels())


def cache_directory() -> str | None:
    """Where the machine code is kept; None where no directory can be written."""
    return next((kernel.cache_directory for kernel in numba_pool.kernels() if kernel.cache_directory), None)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        counts.called(name, "numba")
        return function(*args)

    run.__name__ = run.__qualname__ = name
    return run


TABLE: dict[str, Callable[..., Any]] = {name: _counted(name, function) for name, function in OPS.items()}
"""The ops of this tier by name. Call sites find them here, so they count their calls themselves."""


class _ChainFunctions(NamedTuple):
    make_program: Callable[..., Program]
    forward: Callable[..., list[Tensor]]
    backward: Callable[..., list[Tensor | None]]


chain_functions = _ChainFunctions(make_program, forward, backward)
