"""The numba tier as ``fastblocks.backends`` sees it. Importing this imports Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm

from fastblocks.backends import counts, numba_pool
from fastblocks.backends.numba_ops import TABLE as OPS

__all__ = ["TABLE", "chain_functions", "info"]


def info() -> dict[str, Any]:
    """What `fastblocks.backend_info` says of this tier."""
    return {
        "isa": llvm.get_host_cpu_name(),
        "threads": numba_pool.threads(),
        "pool": "torch" if numba_pool.has_pool() else "none",
        "reason": numba_pool.pool_reason,
    }


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        counts.called(name, "numba")
        return function(*args)

    run.__name__ = run.__qualname__ = name
    return run


TABLE: dict[str, Callable[..., Any]] = {name: _counted(name, function) for name, function in OPS.items()}
"""The ops of this tier by name. Call sites find them here, so they count their calls themselves."""

chain_functions: Any = None
