"""Contenders in processes of their own: they answer a request with one line of JSON, and wait blocked in between."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

_UNSET = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MALLOC_")  # beginnings of names


def environment(threads: int, **more: str) -> dict[str, str]:
    """A peer's environment: this process's, without what would change how threads wait or memory is kept, and `more`.

    Threads wait as their OpenMP sees fit: a passive policy costs plain torch a tenth of its training step. The few
    milliseconds for which they spin after a turn belong to that turn, where the peer rests before it answers.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_UNSET)}
    return {**kept, "OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "20", **more}


def reply(**facts: Any) -> None:
    """Answer, from inside a peer."""
    print(json.dumps(facts), flush=True)


class Peer:
    """A running process. What it writes to stderr goes to a file, of which a failure quotes the last line."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; what a library prints on the way is passed over.

        Raises:
            RuntimeError: the process ended instead.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                result: dict[str, Any] = json.loads(line)
                return result
        self._process.wait()
        self._log.seek(0)
        raise RuntimeError("".join(self._log.read().strip().splitlines()[-1:]) or "it ended without a word")

    def ask(self, request: object) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()
