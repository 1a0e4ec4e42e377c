"""Contenders in processes of their own: they answer a request with one line of JSON, and wait blocked in between."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["Peer", "environment", "reply"]

_UNSET = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MALLOC_")  # beginnings of names
PATIENCE = 600.0  # seconds for an answer: some peers compile a network first


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
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            errors="replace",
            env=env,
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def answer(self, patience: float = PATIENCE) -> dict[str, Any]:
        """The next line of JSON; what a library prints on the way is passed over.

        Raises:
            RuntimeError: the process ended instead, or was ended after `patience` seconds of silence.
        """
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        clock = threading.Timer(patience, give_up)
        clock.daemon = True
        clock.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):
                    try:
                        result: dict[str, Any] = json.loads(line)
                    except json.JSONDecodeError:
                        continue
                    return result
        finally:
            clock.cancel()
        code = self._process.wait()
        if late.is_set():
            raise RuntimeError(f"it gave no answer for {patience:g} s and was ended")
        self._log.seek(0)
        last = "".join(self._log.read().strip().splitlines()[-1:])
        raise RuntimeError(last if last and code >= 0 else f"it ended with {_ending(code)}{last and ': '}{last}")

    def ask(self, request: object, patience: float = PATIENCE) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        return self.answer(patience)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # a request that was never read
                    stream.close()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
