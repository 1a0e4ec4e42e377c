"""Environments that `fastblocks bench --setup-peers` makes for the inference engines."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastblocks.bench.peers import PEERS, environments


def test_an_environment_that_cannot_be_filled_leaves_nothing(tmp_path, monkeypatch):
    """pip that may look nowhere fails; the others are tried all the same. Half of an earlier one goes, too."""
    monkeypatch.setenv("FASTBLOCKS_PEERS", str(tmp_path / "peers"))
    (tmp_path / "peers" / "engines").mkdir(parents=True)
    monkeypatch.setattr(environments, "python_of", lambda peer: None)
    monkeypatch.setattr(environments, "_run", failing := _Failing())
    told: list[str] = []
    failures = environments.set_up(("eager", "onnxruntime", "mnn", "litert"), told.append)
    assert [failure.partition(":")[0] for failure in failures] == ["engines", "litert"]
    assert [command[-2:] for command in failing.commands if "install" in command] == [
        ["onnxruntime", "MNN"],
        ["litert-torch", "torch"],
    ]
    assert len(told) == 2
    assert list((tmp_path / "peers").iterdir()) == []


class _Failing:
    """Makes the environment's folder, as venv does, and fails to install."""

    def __init__(self):
        self.commands: list[list[str]] = []

    def __call__(self, command):
        self.commands.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(exist_ok=True)
        else:
            raise subprocess.CalledProcessError(1, command, stderr=textwrap.dedent("much\nERROR: no such package\n"))


@pytest.mark.parametrize("pip_works", [True, False])
def test_an_environment_without_a_working_pip_is_made_anew(pip_works, tmp_path, monkeypatch):
    """A set-up that is killed between the interpreter and pip leaves one behind."""
    monkeypatch.setenv("FASTBLOCKS_PEERS", str(tmp_path))
    monkeypatch.setattr(environments, "python_of", lambda peer: None)
    python = tmp_path / "engines" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    commands = []

    def run(command):
        commands.append(command)
        if "--version" in command and not pip_works:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environments, "_run", run)
    assert environments.set_up(["onnxruntime"], lambda line: None) == []
    anew = [] if pip_works else [[sys.executable, "-m", "venv", "--clear", str(tmp_path / "engines")]]
    pip = [str(python), "-m", "pip"]
    assert commands == [[*pip, "--version"], *anew, [*pip, "install", "--quiet", "onnxruntime"]]


def test_environments_are_made_where_they_are_looked_for(tmp_path, monkeypatch):
    """A home that has the modules is found; one that lacks them is not."""
    monkeypatch.setenv("FASTBLOCKS_PEERS", str(tmp_path))
    peer = PEERS["litert"]._replace(modules=("no_such_module_here",))
    assert environments.python_of(peer) is None
    python = tmp_path / "litert" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    environments._has.cache_clear()
    assert environments.python_of(peer) is None
    environments._has.cache_clear()
    assert environments.python_of(peer._replace(modules=("no_such_module_here",), home="elsewhere")) is None
    monkeypatch.setattr(environments, "find_spec", lambda name: None)
    assert environments.python_of(peer._replace(modules=("json",))) == python
