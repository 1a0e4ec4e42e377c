"""Files that are whole at any moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastblocks.bench.errors import BenchError

__all__ = ["folder", "replace", "replace_text", "told_of"]


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` puts into another one beside it.

    Whoever reads `path`, or stops the machine, finds the old file or the new one. A killed process may leave the other
    file, whose name ends in ``.part``; the next call takes it over.

    Raises:
        OSError: `path` is there and no regular file (a device, say), the disk is full, or the folder cannot be written
            to; the old file stays.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is no regular file", str(path))
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, is on the disk
    finally:
        os.close(folder)


def replace_text(path: Path, text: str) -> None:
    """The same for a text, in UTF-8."""
    replace(path, lambda file: file.write(text.encode()))


def folder(path: str | Path, option: str) -> Path:
    """A folder that files can be written to, made if there is none.

    Raises:
        BenchError: it cannot be made or written to; the message begins with the `option` that named it.
    """
    made = Path(path)
    try:
        made.mkdir(parents=True, exist_ok=True)
        probe = made / ".writable.part"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise BenchError(
            f"{option}: expected a folder that can be written to, got {str(path)!r}: {error.strerror or error}"
        ) from error
    return made


@contextmanager
def told_of(option: str, path: str | Path) -> Iterator[None]:
    """A file that cannot be written after all (a full disk, a device in its place) as a BenchError."""
    try:
        yield
    except OSError as error:
        raise BenchError(f"{option}: cannot write to {str(path)!r}: {error.strerror or error}") from error
