"""The choice of the tier: by call, by context, by environment; and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastblocks
from fastblocks.backends import NAMES, reference, state
from fastblocks.functional.registration import SCHEMAS


def test_tables_have_every_op(backend: str) -> None:
    assert set(state.table) == set(SCHEMAS) == set(reference.TABLE)


def test_use_backend_as_a_call_and_as_a_context(backend: str) -> None:
    name = backend.split()[0]
    assert fastblocks.current_backend() == fastblocks.backend_info()["backend"] == name
    with fastblocks.use_backend("reference"):
        assert fastblocks.current_backend() == "reference"
        fastblocks.use_backend(name)
        assert fastblocks.current_backend() == name
    assert fastblocks.current_backend() == name
    with pytest.raises(KeyError), fastblocks.use_backend("reference"):
        raise KeyError
    assert fastblocks.current_backend() == name
    fastblocks.use_backend("reference")
    assert fastblocks.current_backend() == "reference"


def test_unknown_names() -> None:
    before = fastblocks.current_backend()
    for name in ("", "Native", "cuda", None, 3):
        with pytest.raises(ValueError, match=r"^backend: expected one of 'native', 'reference', got "):
            fastblocks.use_backend(name)  # type: ignore[arg-type]
    assert fastblocks.current_backend() == before


def test_backend_info(backend: str) -> None:
    info = fastblocks.backend_info()
    assert list(info) == ["backend", "isa", "isa_levels", "threads", "thread_pool", "reason"]
    assert info["backend"] in NAMES and info["threads"] == torch.get_num_threads()
    if backend != "reference":
        assert info["isa"] in info["isa_levels"] and info["reason"] is None


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )


def test_environment() -> None:
    program = "import fastblocks; print(fastblocks.current_backend(), fastblocks.backend_info()['reason'])"
    done = python(program, FASTBLOCKS_BACKEND="reference")
    assert done.stdout.split()[0] == "reference" and not done.stderr
    done = python(program, FASTBLOCKS_BACKEND="cuda")
    assert "FASTBLOCKS_BACKEND=cuda: backend: expected one of 'native', 'reference'" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1 and "Traceback" not in done.stderr


def test_without_the_extension_the_reference_works() -> None:
    program = """
import sys
sys.modules["fastblocks._C"] = None
import torch, fastblocks
assert fastblocks.current_backend() == "reference"
print(fastblocks.backend_info()["reason"])
layer = fastblocks.InvertedResidual(8, 8).eval()
fastblocks.refresh(layer)
assert layer(torch.ones(1, 8, 4, 4)).shape == (1, 8, 4, 4)
try:
    fastblocks.use_backend("native")
except RuntimeError as error:
    print(error)
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    reason, error = done.stdout.splitlines()
    assert "were not built" in reason and error == f"backend 'native' is not available: {reason}"
