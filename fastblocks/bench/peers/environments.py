"""Which Python runs a peer: this one, where the peer is installed beside fastblocks, or one made for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastblocks.bench.errors import BenchError
from fastblocks.bench.peers import PEERS, Peer

__all__ = ["cache_folder", "python_of", "set_up"]

_NEEDS_TORCH = ("litert", "executorch")  # homes whose peers convert a torch model by themselves


def cache_folder() -> Path:
    """Where the environments are: ``$FASTBLOCKS_PEERS``, or ``fastblocks/peers`` in the user's cache folder."""
    given = os.environ.get("FASTBLOCKS_PEERS")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastblocks" / "peers"


def python_of(peer: Peer) -> Path | None:
    """The interpreter that has what the peer needs; None where there is none."""
    if all(find_spec(module) is not None for module in peer.modules):
        return Path(sys.executable)
    own = _python(cache_folder() / peer.home)
    return own if peer.home and own.exists() and _has(own, peer.modules) else None


def set_up(names: Iterable[str], tell: Callable[[str], object]) -> list[str]:
    """Install the peers that are missing, each home into a virtual environment of its own.

    An environment that cannot be made leaves no half of itself behind, and the others are made all the same.

    Args:
        names: of peers.
        tell: is called with a line for each step.

    Returns:
        What failed, a line each.

    Raises:
        BenchError: the cache folder cannot be written to.
    """
    failures = []
    homes: dict[str, list[Peer]] = {}
    for peer in (PEERS[name] for name in names):
        if peer.home and python_of(peer) is None:
            homes.setdefault(peer.home, []).append(peer)
    for home, peers in homes.items():
        packages = [package for peer in peers for package in peer.packages]
        if home in _NEEDS_TORCH:
            packages.append("torch")
        tell(f"installing {', '.join(packages)} into {cache_folder() / home}")
        try:
            _make(cache_folder() / home, packages)
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines()
            failures.append(f"{home}: {lines[-1] if lines else error}")
    _has.cache_clear()
    return failures


def _python(home: Path) -> Path:
    return home / "bin" / "python"


def _make(home: Path, packages: list[str]) -> None:
    whole = _has_pip(home)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        if not whole:  # there is none, or what is left of one whose making was killed
            _run([sys.executable, "-m", "venv", "--clear", str(home)])
        _run([str(_python(home)), "-m", "pip", "install", "--quiet", *packages])
    except OSError as error:
        raise BenchError(f"cannot make {home} ({error.strerror or error}): set FASTBLOCKS_PEERS") from error
    except BaseException:
        if not whole:
            shutil.rmtree(home, ignore_errors=True)
        raise


def _has_pip(home: Path) -> bool:
    try:
        _run([str(_python(home)), "-m", "pip", "--version"])
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@cache
def _has(python: Path, modules: tuple[str, ...]) -> bool:
    found = f"import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, {modules!r})))"
    try:
        return subprocess.run([str(python), "-c", found], capture_output=True, check=False).returncode == 0
    except OSError:  # it cannot be run at all
        return False
