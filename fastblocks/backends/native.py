"""The native tier: float32 tensors on the CPU, through the compiled kernels.

Arguments were checked in ``fastblocks.functional``. The extension brings the tensors into the layout that the kernels
read (NHWC with a pixel stride; a channels_last tensor and its channel slices are that already), looks the packed
weights up, and gives the output the memory format that torch's own convolution would have given it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastblocks import _C
from fastblocks.backends import reference

# tensors are read and made in C where this torch lets us; else through their methods
_C.set_tensor_functions(getattr(Tensor, "__dlpack_c_exchange_api__", None), torch._C._from_dlpack, torch.channels_last)


def _borrow_thread_pool() -> str | None:
    """Hand torch's own pool to the extension; returns why not, where torch has not got the symbols (before 2.10)."""
    try:
        # Looked up among what the process has loaded, so that no second copy of a library is opened.
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        functions = (library.torch_parallel_for, library.torch_get_num_threads)
    except (OSError, AttributeError) as error:
        return f"native kernels run on one thread: torch {torch.__version__} has no thread pool to borrow ({error})"
    _C.set_thread_pool(*(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions))
    return None


_pool_reason = _borrow_thread_pool()
os.register_at_fork(after_in_child=_C.forget_thread_pool_after_fork)


def _choose_level() -> str | None:
    """FASTBLOCKS_ISA names the instruction set level; returns a complaint where this CPU cannot run it."""
    wanted = os.environ.get("FASTBLOCKS_ISA", "").strip()
    if not wanted or _C.use_level(wanted):
        return None
    return f"FASTBLOCKS_ISA={wanted}: expected one of {', '.join(_C.level_names())} on this CPU"


_level_reason = _choose_level()


def available() -> bool:
    """Whether the kernels can run here."""
    return True


def isa_levels() -> list[str]:
    """The instruction set levels that this build and this CPU have, least first."""
    return list(_C.level_names())


def current_isa() -> str:
    """The level in use."""
    return ("baseline", "x86_64_v3", "x86_64_v4")[_C.current_level()]


@contextlib.contextmanager
def use_isa(level: str) -> Iterator[None]:
    """Run another instruction set level inside a ``with`` block (the whole process; for tests and benchmarks)."""
    former = current_isa()
    if not _C.use_level(level):
        raise ValueError(f"level: expected one of {', '.join(isa_levels())}, got {level!r}")
    try:
        yield
    finally:
        _C.use_level(former)


def info() -> dict[str, Any]:
    """What `fastblocks.backend_info` says of this tier."""
    return {
        "isa": current_isa(),
        "levels": isa_levels(),
        "threads": _C.worker_count(),
        "pool": "torch" if _C.has_thread_pool() else "none",
        "reason": _level_reason or _pool_reason,
    }


def forget_packs(module: torch.nn.Module | None) -> None:
    """Drop the packed weights of a module's parameters, or all."""
    if module is None:
        _C.forget_packs()
        return
    for parameter in module.parameters():
        _C.forget_pack(parameter)


def pack_slots() -> int:
    """How many weights have packs."""
    return _C.pack_slots()


def spin(steps: int) -> tuple[float, str]:
    """Nothing but multiply-adds, on the pool's threads: how many floating point operations, and at which level."""
    return _C.spin_multiply_adds(steps), current_isa()


make_site = _C.make_site
make_chain = _C.make_chain
make_check = _C.make_check
make_recall = _C.make_recall


class _ChainFunctions(NamedTuple):
    make_program: Callable[..., Any]
    forward: Callable[..., list[Tensor]]
    backward: Callable[..., list[Tensor | None]]


chain_functions = _ChainFunctions(_C.make_program, _C.chain_forward, _C.chain_backward)

TABLE: dict[str, Callable[..., Any]] = {name: getattr(_C, name) for name in reference.TABLE}
