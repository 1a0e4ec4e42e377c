"""Who computes: each tier is one table of the same function names, and one of the tiers is current.

``native`` are the compiled kernels, ``numba`` are kernels that Numba compiles here, ``reference`` is plain torch. The
choice holds for the whole process; it starts from the environment variable ``FASTBLOCKS_BACKEND``, and without it from
the fastest tier that works here. What a tier cannot take (another dtype, another device) goes to the reference, call by
call, and is counted (``backends/counts.py``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch

from fastblocks.backends import counts as _counts
from fastblocks.backends import reference

__all__ = ["backend_info", "current_backend", "refresh", "use_backend"]

NAMES = ("native", "numba", "reference")
"""The tiers, fastest first."""


class _State:
    """The current tier.

    `table` has its functions, and stays the same object when the tier changes: call sites hold it. `compiled` is that
    table, or None while the reference is current. `chains` are the tier's halves of a training step
    (``functional/training.py``), or None.
    """

    __slots__ = ("chains", "compiled", "name", "table")

    def __init__(self) -> None:
        self.name = "reference"
        self.compiled: dict[str, Callable[..., Any]] | None = None
        self.chains: Any = None
        self.table: dict[str, Callable[..., Any]] = dict(reference.TABLE)


state = _State()


def _load_native() -> tuple[ModuleType | None, str | None]:
    """The native tier if it works here, else the reason why it does not."""
    if importlib.util.find_spec("fastblocks._C") is None:
        return None, (
            "the native kernels were not built: install a C++17 compiler (g++ or clang++), then install fastblocks "
            "again; FASTBLOCKS_BUILD=require shows what fails"
        )
    try:
        from fastblocks.backends import native
    except Exception as error:  # a broken extension must not take the package down: the other tiers still work
        return None, f"the native kernels could not be loaded: {error}"
    if native.available():
        return native, native.info().get("reason") or None
    return None, native.info().get("reason") or "the native kernels are not available"


_native, _reason = _load_native()
_numba: ModuleType | None = None
_numba_reason: str | None = None

make_site: Callable[[Any], Any] | None = None if _native is None else _native.make_site
make_chain: Callable[[Any], Any] | None = None if _native is None else _native.make_chain
make_check: Callable[[Any], Callable[[], bool]] | None = None if _native is None else _native.make_check
make_recall: Callable[[Any], Any] | None = None if _native is None else _native.make_recall
"""Make a call site, a chain of sites (``functional/site.py``), a comparison of modules with what they were
(``layers/again.py``), or a memory of calls (``functional/recall.py``); None without the extension."""
spin: Callable[[int], tuple[float, str]] | None = None if _native is None else _native.spin
"""Multiply-adds and nothing else, to measure the machine's peak; None without the extension."""


def load_numba() -> ModuleType:
    """The numba tier's module. Importing it takes a second, so it is not done before somebody wants the tier.

    Raises:
        RuntimeError: the tier does not work here; the message says why.
    """
    global _numba, _numba_reason
    if _numba is None:
        if _numba_reason is None and importlib.util.find_spec("numba") is None:
            _numba_reason = "numba is not installed: pip install numba"
        if _numba_reason is None:
            try:
                tier = importlib.import_module("fastblocks.backends.numba_tier")
            except Exception as error:  # numba refuses versions of numpy that it does not know, for one
                _numba_reason = f"numba could not be loaded: {error}"
            else:
                _numba = tier
                return _numba
        raise RuntimeError(f"backend 'numba' is not available: {_numba_reason}")
    return _numba


def _numba_or_reference() -> ModuleType | None:
    """The numba tier at its first use. Where it does not work after all, say so and go on with the reference."""
    global _reason
    try:
        tier = load_numba()
    except RuntimeError as error:
        _reason = str(error)
        warnings.warn(f"fastblocks: {error}; plain torch computes", RuntimeWarning, stacklevel=4)
        _switch("reference")
        return None
    if state.name == "numba":
        _switch("numba")
    return tier


def _starter(name: str) -> Callable[..., Any]:
    """An op of the numba tier before the tier is loaded."""

    def start(*args: Any) -> Any:
        tier = _numba_or_reference()
        return (reference.TABLE if tier is None else tier.TABLE)[name](*args)

    return start


def chain_functions() -> Any:
    """The current tier's halves of a training step, ready to be called, or None."""
    if state.name == "numba" and _numba is None:
        _numba_or_reference()
    return state.chains


def _switch(name: str, *, load: bool = True) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name == "native":
        if _native is None:
            raise RuntimeError(f"backend 'native' is not available: {_reason}")
        table, chains = _native.TABLE, _native.chain_functions
    elif name == "numba" and (load or _numba is not None):
        tier = load_numba()
        table, chains = tier.TABLE, tier.chain_functions
    elif name == "numba":
        table, chains = {op: _starter(op) for op in reference.TABLE}, None
    else:
        table, chains = reference.TABLE, None
    state.table.update(table)
    state.compiled = None if name == "reference" else state.table
    state.chains = chains
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
        _switch(self._former, load=False)


def use_backend(name: str) -> _Switched:
    """Choose who computes, from now on, or inside a ``with`` block only.

    The choice holds for every thread of the process.

    Args:
        name: ``"native"``, ``"numba"`` or ``"reference"``.

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
    """The name of the current tier: ``"native"``, ``"numba"`` or ``"reference"``."""
    return state.name


def _numba_found() -> bool:
    """Whether the numba tier works, as far as is known without importing it."""
    return _numba_reason is None and importlib.util.find_spec("numba") is not None


def _reasons() -> str | None:
    """Why the current tier is not the best one, or not at its best."""
    found = [_reason, None if _numba_found() else _numba_reason or "numba is not installed: pip install numba"]
    if state.name == "native":
        found = [_reason, None if _native is None else _native.info().get("reason")]
    elif state.name == "numba" and _numba is not None:
        found = [_reason, _numba.info()["reason"]]
    return "; ".join(dict.fromkeys(reason for reason in found if reason)) or None


def backend_info(*, counts: bool = False) -> dict[str, Any]:
    """Who computes, and how.

    Args:
        counts: also how often each op was called, and what went to plain torch instead.

    Returns:
        ``backend`` (the current tier), ``tiers`` (those that work here), ``isa`` (the instruction set level of the
        native kernels, or the processor that Numba compiles for; None for the reference), ``isa_levels`` (the levels
        that this build and CPU have), ``threads``, ``thread_pool`` (whose it is), and ``reason`` (why something fell
        back, or None). With `counts`, ``calls`` has for each op the calls of each tier, and ``fallbacks`` for each op
        or layer how often it was left to plain torch, by reason. A layer of the native tier is counted when it is
        checked, not when it is called again from its call site; all fallbacks are counted. Counts are of the whole
        process, from its start.

    Example:
        >>> import torch, fastblocks
        >>> fastblocks.backend_info()["backend"] in ("native", "numba", "reference")
        True
        >>> layer = fastblocks.ConvBNAct(3, 8).double().eval()
        >>> _ = layer(torch.ones(1, 3, 8, 8, dtype=torch.float64))
        >>> "the input's dtype is" in str(fastblocks.backend_info(counts=True)["fallbacks"]["ConvBNAct"])
        True
    """
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "pool": "torch"}
    levels: tuple[str, ...] = ()
    if _native is not None:
        native = _native.info()
        levels = tuple(native["levels"])
        found = native if state.name == "native" else found
    if state.name == "numba":
        tier = _numba_or_reference()
        found = found if tier is None else tier.info()
    info = {
        "backend": state.name,
        "tiers": tuple(name for name in NAMES if _works(name)),
        "isa": found.get("isa"),
        "isa_levels": levels,
        "threads": found["threads"],
        "thread_pool": found["pool"],
        "reason": _reasons(),
    }
    return {**info, **_counts.snapshot()} if counts else info


def _works(name: str) -> bool:
    return {"native": _native is not None, "numba": _numba_found(), "reference": True}[name]


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
            if wanted == "numba" and not _numba_found():
                load_numba()
            _switch(wanted, load=False)
            return
        except (ValueError, RuntimeError) as error:
            _reason = f"FASTBLOCKS_BACKEND={wanted}: {error}"
            warnings.warn(_reason, RuntimeWarning, stacklevel=2)
    _switch(next(name for name in NAMES if _works(name)), load=False)


_start()
