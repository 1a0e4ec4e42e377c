"""Compiled functions over items, on torch's own thread pool.

A kernel is a function ``(begin, end, context)`` that Numba compiles to an address, which ``torch_parallel_for`` calls:
no threading layer of Numba's, no second OpenMP runtime, and ``torch.set_num_threads`` holds. `context` is the address
of 64-bit words. The first two are the number of items and of slices; slice ``s`` of ``S`` has the items from
``items * s // S`` on, and may have scratch of its own. What a slice computes must not depend on how many there are:
sums belong to items.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

from fastblocks.backends.numba_vector import inlined

__all__ = ["Kernel", "bits", "first_of", "kernel", "kernels", "pool_reason", "run", "run_alone", "threads"]

Body = Callable[[int, int, Any], None]

_SIGNATURE = ((types.int64, types.int64, types.voidptr), types.void)
_PLAIN = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def _source_stamp() -> str:
    """Of all files that kernels are made of: Numba looks at the file of the kernel alone, not at what it calls."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("numba_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _source_stamp()


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk, with the stamp in its key."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _STAMP)


def _cache_of(body: Body) -> _Cache | None:
    """Where the code is kept; None where no directory can be written: then each process compiles for itself."""
    try:
        return _Cache(body)
    except RuntimeError:
        return None


_compiling = threading.RLock()


class Kernel:
    """A function that is compiled, or read from the cache, when it is first used."""

    def __init__(self, body: Body) -> None:
        self.name = body.__name__
        self.cache_directory: str | None = None
        self._body = body
        self._compiled: Any = None
        self._plain: Any = None

    def compile(self) -> Kernel:
        """Compile it now."""
        with _compiling:
            if self._compiled is None:
                compiled: Any = CFunc(self._body, _SIGNATURE, locals={}, options={"error_model": "numpy"})
                cache = _cache_of(self._body)
                if cache is not None:
                    compiled._cache = cache
                    self.cache_directory = cache.cache_path
                compiled.compile()
                self._compiled = compiled
        return self

    @property
    def from_cache(self) -> bool:
        """Whether the machine code was found on disk."""
        return self._compiled is not None and self._compiled.cache_hits > 0

    @property
    def address(self) -> int:
        """Where the machine code is."""
        if self._compiled is None:
            self.compile()
        return int(self._compiled.address)

    @property
    def plain(self) -> Any:
        """The function for a call from here."""
        if self._plain is None:
            self._plain = _PLAIN(self.address)
        return self._plain


_kernels: dict[str, Kernel] = {}


def kernel(body: Body) -> Kernel:
    """Make a function ``(begin, end, context)`` a kernel."""
    made = _kernels[body.__name__] = Kernel(body)
    return made


def kernels() -> Iterator[Kernel]:
    """All that there are."""
    return iter(_kernels.values())


@inlined
def first_of(context: Any, slice_: int) -> int:
    """The first item of a slice."""
    return context[0] * slice_ // context[1]


def bits(value: float) -> int:
    """The word that holds a double."""
    word: int = struct.unpack("q", struct.pack("d", value))[0]
    return word


def _parallel_for() -> tuple[Any, str | None]:
    """Torch's C function; or None and why, where this torch has not got it (before 2.10)."""
    try:
        # Looked up among what the process has loaded, so that no second copy of a library is opened.
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        function = library.torch_parallel_for
    except (OSError, AttributeError) as error:
        return (
            None,
            f"numba kernels run on one thread: torch {torch.__version__} has no thread pool to borrow ({error})",
        )
    function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    function.restype = ctypes.c_int32
    return function, None


_enter, pool_reason = _parallel_for()
_forked = False


def _after_fork() -> None:
    """A child's pool has no threads, and entering it hangs, for torch's own products too: it goes on with one."""
    global _forked
    _forked = True
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def has_pool() -> bool:
    """Whether kernels run on torch's pool."""
    return _enter is not None and not _forked


def threads() -> int:
    """How many threads kernels may use now."""
    return torch.get_num_threads() if has_pool() else 1


def run(function: Kernel, items: int, *words: int, slices: int = 0) -> None:
    """Run a kernel over items, on as many threads as torch has.

    Args:
        function: the kernel.
        items: how many.
        words: what follows the two numbers in the context: addresses, sizes, strides, `bits` of doubles.
        slices: how many, where scratch was made for so many; 0 for one a thread.
    """
    if items <= 0:
        return
    count = min(slices or threads(), items)
    context = array("q", (items, count, *words))
    address = context.buffer_info()[0]
    if count == 1 or not has_pool():
        function.plain(0, count, address)
    elif _enter(0, count, 1, function.address, address) != 0:
        raise RuntimeError("fastblocks: torch's thread pool refused the work")


def run_alone(function: Kernel, items: int, *words: int) -> None:
    """Run a kernel over few and small items, on the calling thread."""
    context = array("q", (items, 1, *words))
    function.plain(0, 1, context.buffer_info()[0])
