"""The most memory that a process has in use while something goes on: `rss.py PID`, a `fastblocks.bench.process.Peer`.

It is a process of its own, as a thread of the one that is looked at would wait for the GIL. The kernel's own maximum
(VmHWM) would not do, for it also remembers what was before, compilation for instance.
"""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

from fastblocks.bench.process import Peer, reply

INTERVAL = 1e-3  # seconds between two looks
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """The bytes of a process that are in memory now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def sampler(pid: int) -> Peer:
    """A process that looks from now on; asked anything, it answers the `peak` in bytes and the number of `looks`."""
    peer = Peer("sampler", [sys.executable, __file__, str(pid)])
    peer.answer()
    return peer


def main() -> None:
    pid = int(sys.argv[1])
    peak, looks = resident(pid), 1
    reply(ready=True)
    while not select.select([sys.stdin], [], [], INTERVAL)[0]:
        peak, looks = max(peak, resident(pid)), looks + 1
    reply(peak=peak, looks=looks)


if __name__ == "__main__":
    main()
