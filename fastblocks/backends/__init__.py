"""Who computes: each tier is one table of the same function names, and one of the tiers is current.

``native`` are the compiled kernels, ``reference`` is plain torch. The choice holds for the whole process; it starts
from the environment variable ``FASTBLOCKS_BACKEND``, and without it from the fastest tier that works here. What the
native tier cannot take (another dtype, another device) goes to the reference, call by call.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch

from fastblocks.backends import reference

__all__ = ["backend_info", "current_backend", "refresh", "use_backend"]

NAMES = ("native", "reference")


class _State:
    """The current tier.

    `table` has its functions, and stays the same object when the tier changes: call sites hold it. `native` is that
    table, or None while the reference is current.
    """

    __slots__ = ("name", "native", "table")

    def __init__(self) -> None:
        self.name = "reference"
        self.native: dict[str, Callable[..., Any]] | None = None
        self.table: dict[str, Callable[..., Any]] = dict(reference.TABLE)


state = _State()


def _load_native() -> tuple[ModuleType | None, str | None]:
    """The native tier if it works here, else the reason why it does not."""
    if importlib.util.find_spec("fastblocks._C") is None:
        return None, "the native kernels were not built: install a C++17 compiler, then install fastblocks again"
    try:
        from fastblocks.backends import native
    except Exception as error:  # a broken extension must not take the package down: the reference still works
        return None, f"the native kernels could not be loaded: {error}"
    if native.available():
        return native, native.info().get("reason") or None
    return None, native.info().get("reason") or "the native kernels are not available"


_native, _reason = _load_native()

make_site: Callable[[Any], Any] | None = None if _native is None else _native.make_site
make_chain: Callable[[Any], Any] | None = None if _native is None else _native.make_chain
"""Make a call site, or a chain of layers that have one (``functional/site.py``); None without the extension."""


chain_functions: Any = None if _native is None else _native.chain_functions
"""Chains of layers in training (``functional/training.py``): the extension's halves."""


def _switch(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name == "native":
        if _native is None:
            raise RuntimeError(f"backend 'native' is not available: {_reason}")
        state.table.update(_native.TABLE)
        state.native = state.table
    else:
        state.table.update(reference.TABLE)
        state.native = None
    state.name = name


class _Switched:
    """What `use_backend` returns: leaving it as a context manager brings the former tier back."""

    def __init__(self, former: str) -> None:
        self._former = former

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._former)


def use_backend(name: str) -> _Switched:
    """Choose who computes, from now on, or inside a ``with`` block only.

    The choice holds for every thread of the process.

    Args:
        name: ``"native"`` or ``"reference"``.

    Raises:
        ValueError: no tier has this name.
        RuntimeError: the tier does not work here; the message says why.

    Example:
        >>> import fastblocks
        >>> with fastblocks.use_backend("reference"):
        ...     fastblocks.current_backend()
        'reference'
    """
    former = state.name
    _switch(name)
    return _Switched(former)


def current_backend() -> str:
    """The name of the current tier: ``"native"`` or ``"reference"``."""
    return state.name


def backend_info() -> dict[str, Any]:
    """Who computes, and how.

    Returns:
        ``backend`` (the current tier), ``isa`` (the instruction set level in use, None without native kernels),
        ``isa_levels`` (the levels that this CPU can run), ``threads``, ``thread_pool`` (whose it is), and ``reason``
        (why something fell back, or None).

    Example:
        >>> import fastblocks
        >>> fastblocks.backend_info()["backend"] in ("native", "reference")
        True
    """
    found: dict[str, Any] = _native.info() if _native is not None else {}
    return {
        "backend": state.name,
        "isa": found.get("isa"),
        "isa_levels": tuple(found.get("levels", ())),
        "threads": found.get("threads", torch.get_num_threads()),
        "thread_pool": found.get("pool", "torch"),
        "reason": found.get("reason") or _reason,
    }


def refresh(module: torch.nn.Module | None = None) -> None:
    """Forget what the tiers keep of a module's weights, or of all weights.

    Needed only after a weight was edited in a way that torch does not count as a change: in place through ``.data`` or
    through a numpy view. Optimizers, ``load_state_dict``, ``copy_`` and the like are noticed without it.

    Args:
        module: whose parameters to forget; None for all.

    Example:
        >>> import torch, fastblocks
        >>> layer = fastblocks.PointwiseConvBNAct(8, 8).eval()
        >>> _ = layer[0].weight.data.mul_(2)
        >>> fastblocks.refresh(layer)
    """
    if _native is not None:
        _native.forget_packs(module)


def _start() -> None:
    """Take the tier that the environment asks for. A wish that cannot be met warns: import must not fail for it."""
    global _reason
    wanted = os.environ.get("FASTBLOCKS_BACKEND", "").strip()
    if wanted:
        try:
            _switch(wanted)
            return
        except (ValueError, RuntimeError) as error:
            _reason = f"FASTBLOCKS_BACKEND={wanted}: {error}"
            warnings.warn(_reason, RuntimeWarning, stacklevel=2)
    _switch("native" if _native is not None else "reference")


_start()
