"""The memory that the native kernels recycle: scratch, packed weights and outputs."""

from __future__ import annotations

__all__ = ["empty_cache", "memory_stats"]


def memory_stats() -> dict[str, int]:
    """Bytes of recycled memory in use and kept for the next call; empty without the native kernels.

    Returns:
        ``active_bytes``, ``peak_active_bytes``, ``cached_bytes``, ``limit_bytes`` (of what is kept unused), and how
        often memory was found in the pool (``hits``) or had to be asked of the system (``misses``).

    Example:
        >>> import fastblocks
        >>> sorted(fastblocks.memory_stats())[:1] in ([], ["active_bytes"])
        True
    """
    try:
        from fastblocks import _C
    except ImportError:
        return {}
    return _C.memory_stats()


def empty_cache() -> None:
    """Give the recycled memory that nothing uses back to the system.

    Example:
        >>> import fastblocks
        >>> fastblocks.empty_cache()
    """
    try:
        from fastblocks import _C
    except ImportError:
        return
    _C.empty_cache()
