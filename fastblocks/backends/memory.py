"""The memory that the native and the numba tier recycle: scratch, packed weights and outputs."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["empty_cache", "memory_stats"]


def memory_stats() -> dict[str, int]:
    """Bytes of recycled memory in use and kept for the next call; empty where no tier that recycles was used.

    Returns:
        ``active_bytes``, ``peak_active_bytes``, ``cached_bytes``, ``limit_bytes`` (of what is kept unused), and how
        often memory was found in the pool (``hits``) or had to be asked of the system (``misses``).

    Example:
        >>> import fastblocks
        >>> sorted(fastblocks.memory_stats())[:1] in ([], ["active_bytes"])
        True
    """
    found: dict[str, int] = {}
    for pool in _pools():
        for name, value in pool.items():
            found[name] = found.get(name, 0) + value
    return found


def _numba() -> Any:
    """The numba tier's memory, if that tier was used."""
    return sys.modules.get("fastblocks.backends.numba_memory")


def _pools() -> list[dict[str, int]]:
    numba = _numba()
    pools = [] if numba is None else [numba.stats()]
    try:
        from fastblocks import _C
    except ImportError:
        return pools
    return [_C.memory_stats(), *pools]


def empty_cache() -> None:
    """Give the recycled memory that nothing uses back to the system.

    Example:
        >>> import fastblocks
        >>> fastblocks.empty_cache()
    """
    numba = _numba()
    if numba is not None:
        numba.empty_cache()
    try:
        from fastblocks import _C
    except ImportError:
        return
    _C.empty_cache()
