"""Pages in a headless Chromium: what its console says, what a page asks for, and how it looks."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # a container's root may have none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
_CONSOLE = re.compile(r'CONSOLE[:(]\d+\)?\] (".*)')
_OWN = '"initiator":"not an origin"'  # what the browser asks for by itself


def browser() -> str:
    """The browser's path; without one the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser: one of {', '.join(NAMES)}")
    return found


def _open(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser(), *OPTIONS, f"--user-data-dir={profile}", *options, path.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=True)


def console_errors(path: Path) -> list[str]:
    """What the console says when a page is opened; a page that is well makes it say nothing."""
    done = _open(path, "--dump-dom")
    assert "</html>" in done.stdout, done.stderr
    return _CONSOLE.findall(done.stderr)


def requests(path: Path) -> list[str]:
    """The addresses that a page asks for when it is opened, beside its own."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        _open(path, "--dump-dom", f"--log-net-log={log}")
        lines = log.read_text("utf-8", "replace").splitlines()
    assert any('"URL_REQUEST_START_JOB"' in line for line in lines), "the browser has logged nothing"
    asked = (re.search(r'"url":"([^"]*)"', line) for line in lines if '"initiator":' in line and _OWN not in line)
    return sorted({found[1] for found in asked if found and not found[1].startswith("data:")})


def screenshot(path: Path, picture: Path, size: tuple[int, int] = (1100, 1600), *, dark: bool = False) -> None:
    """The page as a PNG file, so many pixels wide and high."""
    theme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    _open(path, f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}", *theme)
