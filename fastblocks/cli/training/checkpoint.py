"""A training's checkpoint, and the folder that one run at a time writes to."""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fastblocks.bench.files import replace
from fastblocks.cli.errors import UserError

__all__ = ["KEYS", "check_same", "load", "owned", "save"]

KEYS = ("arguments", "epoch", "history", "model", "optimizer", "random_states", "scheduler")
"""The entries of a checkpoint."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it for the time of a `with` block; a UserError says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror or error})") from error
    try:
        with suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing to {folder}: choose another --out") from None
        yield
    finally:
        os.close(handle)  # gives the lock back, as the end of the process does


def save(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint, which has the entries `KEYS`; the one before stays until this one is whole."""
    whole = io.BytesIO()  # torch.save does not pass on why a file cannot be written
    torch.save(dict(checkpoint), whole)
    replace(path, lambda file: file.write(whole.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        ValueError: the file is damaged, or no checkpoint of a training.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (ValueError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint: delete it, or give --no-resume") from error
    if not isinstance(found, dict) or set(found) != set(KEYS):
        raise ValueError(f"{path} is no checkpoint of a training: delete it, or give --no-resume")
    return found


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other arguments than a checkpoint's.

    Raises:
        ValueError: names the first argument that differs, and both values.
    """
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} {before.get(name)!r}, now it is {value!r}: "
                "give the same, another --out, or --no-resume to begin anew"
            )
