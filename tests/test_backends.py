"""The choice of the tier: by call, by context, by environment; and what is said about it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import fastblocks
from fastblocks import functional
from fastblocks.backends import NAMES, counts, reference, state
from fastblocks.functional.registration import SCHEMAS


def test_tables_have_every_op(backend: str) -> None:
    assert set(state.table) == set(SCHEMAS) == set(reference.TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_every_tier_has_its_own_table_of_the_same_ops(name: str) -> None:
    """An op that one tier lacks would be found nowhere else: tables are written over each other."""
    from fastblocks import backends

    modules = {"native": "native", "numba": "numba_tier", "reference": "reference"}
    try:
        with fastblocks.use_backend(name):
            table = importlib.import_module(f"{backends.__name__}.{modules[name]}").TABLE
            assert all(state.table[op] is table[op] for op in SCHEMAS)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert set(table) == set(SCHEMAS)


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
        with pytest.raises(ValueError, match=r"^backend: expected one of 'native', 'numba', 'reference', got "):
            fastblocks.use_backend(name)  # type: ignore[arg-type]
    assert fastblocks.current_backend() == before


def test_backend_info(backend: str) -> None:
    info = fastblocks.backend_info()
    assert list(info) == ["backend", "tiers", "isa", "isa_levels", "threads", "thread_pool", "reason"]
    assert info["backend"] in info["tiers"] and set(info["tiers"]) <= set(NAMES)
    assert info["threads"] == torch.get_num_threads()
    if backend.startswith("native"):
        assert info["isa"] in info["isa_levels"] and info["reason"] is None
    assert (info["isa"] is None) == (backend == "reference")


def python(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **variables})


def test_environment() -> None:
    program = "import fastblocks; print(fastblocks.current_backend(), fastblocks.backend_info()['reason'])"
    done = python(program, FASTBLOCKS_BACKEND="reference")
    assert done.stdout.split()[0] == "reference" and not done.stderr
    done = python(program, FASTBLOCKS_BACKEND="cuda")
    assert "FASTBLOCKS_BACKEND=cuda: backend: expected one of 'native', 'numba', 'reference'" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1 and "Traceback" not in done.stderr


_WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
import torch, fastblocks
print(fastblocks.current_backend())
print(fastblocks.backend_info()["reason"])
layer = fastblocks.InvertedResidual(8, 8).eval()
fastblocks.refresh(layer)
x = torch.randn(1, 8, 4, 4)
with torch.no_grad():
    y = layer(x)
    with fastblocks.use_backend("reference"):
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
layer.train()(x).sum().backward()
assert all(p.grad is not None for p in layer.parameters())
print(fastblocks.current_backend())
for name in fastblocks.backends.NAMES:
    try:
        with fastblocks.use_backend(name):
            print(name)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize(
    "missing, tier", [(["fastblocks._C"], "numba"), (["fastblocks._C", "numba"], "reference"), (["numba"], "native")]
)
def test_without_an_extension(missing: list[str], tier: str) -> None:
    """The best of what is left computes, and the reason is said."""
    if tier == "native" and "native" not in fastblocks.backend_info()["tiers"]:
        pytest.skip("needs the native tier")
    done = python(_WITHOUT.format(missing=missing))
    assert done.returncode == 0, done.stderr
    first, reason, later, native, numba, plain = done.stdout.splitlines()
    assert first == later == tier and plain == "reference"
    assert ("were not built" in reason) == ("fastblocks._C" in missing)
    assert native == "native" if tier == "native" else native.startswith("backend 'native' is not available: ")
    assert numba == "numba" if tier == "numba" else numba.endswith("numba is not installed: pip install numba")


def test_numba_that_cannot_be_loaded() -> None:
    """Asked for by name it is an error; as the best that there seemed to be, a warning and plain torch."""
    program = """
import sys
sys.modules["fastblocks._C"] = None
import fastblocks.backends as backends, torch, fastblocks
sys.modules["llvmlite"] = None
y = fastblocks.MaxPool2d(2)(torch.ones(1, 1, 2, 2))
print(fastblocks.current_backend(), y.item())
try:
    fastblocks.use_backend("numba")
except RuntimeError as error:
    print(error)
print(fastblocks.backend_info()["reason"])
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    first, error, reason = done.stdout.splitlines()
    assert first == "reference 1.0" and error.startswith("backend 'numba' is not available: numba could not be loaded")
    assert done.stderr.count("RuntimeWarning") == 1 and "numba could not be loaded" in reason


def test_import_takes_little_and_leaves_numba_alone() -> None:
    """150 ms beyond torch, in the best of three processes, with each tier as the current one.

    Bytecode is kept, as by default and by ``pip install``: with PYTHONDONTWRITEBYTECODE set, as in many containers,
    compiling the sources would be most of what is timed.
    """
    program = """
import os, sys, time
import torch, torch._dynamo, numpy, torch.utils.flop_counter
sys.dont_write_bytecode = False
for tier in 3 * sys.argv[1:]:
    if os.fork() == 0:
        os.environ["FASTBLOCKS_BACKEND"] = tier
        start = time.perf_counter()
        import fastblocks
        print(tier, time.perf_counter() - start, "numba" in sys.modules, fastblocks.current_backend(), flush=True)
        os._exit(0)
    os.wait()
"""
    tiers = fastblocks.backend_info()["tiers"]
    seconds: dict[str, list[float]] = {tier: [] for tier in tiers}
    for line in python(program, *tiers).stdout.splitlines():
        wanted, took, loaded, tier = line.split()
        assert (loaded, tier) == ("False", wanted)
        seconds[wanted].append(float(took))
    assert all(len(each) == 3 and min(each) < 0.15 for each in seconds.values()), seconds


# ----------------------------------------------------------------------------------------------------------- counts


@pytest.fixture
def counted(backend: str) -> Iterator[str]:
    """The name of the tier, with all counts at nothing."""
    counts.reset()
    yield backend.split()[0]
    counts.reset()


def test_calls_are_counted(counted: str) -> None:
    x = torch.ones(1, 4, 6, 6)
    for _ in range(3):
        functional.channel_shuffle(x, 2)
    info = fastblocks.backend_info(counts=True)
    assert info["calls"] == {"channel_shuffle": {counted: 3}} and info["fallbacks"] == {}
    torch.ops.fastblocks.channel_shuffle(x, 2)
    assert fastblocks.backend_info(counts=True)["calls"]["channel_shuffle"] == {counted: 4}
    assert "calls" not in fastblocks.backend_info()


def test_a_layers_calls_are_counted(counted: str) -> None:
    """The numba tier's from call sites, too; the native tier's when they are checked."""
    layer, x = fastblocks.PointwiseConvBNAct(4, 4).eval(), torch.ones(1, 4, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    count = fastblocks.backend_info(counts=True)["calls"]["pointwise_conv_bn_act"][counted]
    assert count == 3 if counted == "numba" else 1 <= count <= 3


def test_fallbacks_are_counted(counted: str) -> None:
    """Every one of them, with its reason; the reference has none."""
    x = torch.ones(1, 4, 6, 6)
    for _ in range(3):
        functional.channel_shuffle(x.double(), 2)
        torch.func.vmap(lambda y: functional.channel_shuffle(y, 2))(x[None])
    torch.ops.fastblocks.channel_shuffle(x.double(), 2)
    found = fastblocks.backend_info(counts=True)
    assert sum(found["calls"]["channel_shuffle"].values()) == 7
    assert found["fallbacks"] == (
        {}
        if counted == "reference"
        else {
            "channel_shuffle": {
                "the input's dtype is torch.float64, not torch.float32": 4,
                "a torch.func transform is active": 3,
            }
        }
    )


def test_layers_that_run_their_children_are_counted(counted: str) -> None:
    layer = fastblocks.PointwiseConvBNAct(4, 4).double().eval()
    for _ in range(2):
        layer(torch.ones(1, 4, 6, 6).double())
    reason = "the input's dtype is torch.float64, not torch.float32"
    assert fastblocks.backend_info(counts=True)["fallbacks"] == {"PointwiseConvBNAct": {reason: 2}}
