"""Forked children, several Python threads at once, and what the extension brings into a process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastblocks
from fastblocks import InvertedResidual

pytestmark = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="needs the native tier")


def run_alone(code: str) -> None:
    """Run a program in a process of its own, which must end well."""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_FORK = """
import os, signal, sys, torch, fastblocks
torch.set_num_threads(2)
model = fastblocks.models.mobilenet_v2().eval()
x = torch.randn(1, 3, 224, 224)
# Only ops of fastblocks: torch's own hang in a child forked after their pool was used.
layers = [m for m in model.features]
def run():
    with torch.no_grad():
        y = x
        for layer in layers:
            y = layer(y)
        return y
before = run()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    same = run().numpy().tobytes() == before.numpy().tobytes()
    os._exit(0 if same else 3)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
"""


def test_child_forked_after_use_computes_the_same():
    done = subprocess.run([sys.executable, "-c", _FORK], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_eight_threads_at_once_give_equal_outputs():
    model = fastblocks.models.mobilenet_v2().eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
    outputs: list[torch.Tensor | None] = [None] * 8

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                outputs[i] = model(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(output is not None and torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("threads", [2, 3])
def test_result_is_the_same_at_any_thread_count(threads: int):
    layer = InvertedResidual(16, 16, stride=1, expand_ratio=6).eval()
    x = torch.randn(2, 16, 33, 30).to(memory_format=torch.channels_last)
    former = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            expected = layer(x)
            torch.set_num_threads(threads)
            assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(former)


def test_no_second_openmp_runtime():
    code = (
        "import torch\n"
        "read = lambda: {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split()[-1].rpartition('/')[2]}\n"
        "torch.ones(100, 100) @ torch.ones(100, 100)\nbefore = read()\n"
        "import fastblocks\n"
        "with torch.no_grad(): fastblocks.InvertedResidual(8, 8).eval()(torch.randn(1, 8, 16, 16))\n"
        "assert read() == before, read() - before\n"
    )
    run_alone(code)


def test_denormals_stay_as_the_caller_has_them():
    layer = InvertedResidual(8, 8).eval()
    with torch.no_grad():
        layer(torch.randn(1, 8, 16, 16))
    assert float(torch.tensor(1e-40) * 1.0) > 0
    assert float.fromhex("0x1p-1074") > 0


def test_memory_is_recycled():
    layer = InvertedResidual(8, 8).eval()
    x = torch.randn(1, 8, 64, 64)
    with torch.no_grad():
        layer(x)
        before = fastblocks.memory_stats()
        for _ in range(5):
            layer(x)
        after = fastblocks.memory_stats()
    assert after["misses"] == before["misses"]
    assert after["active_bytes"] == before["active_bytes"]


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 8, height, width).contiguous(memory_format=torch.channels_last)


def test_large_slabs_join():
    """What two outputs leave is enough for one of their size together."""
    pool = fastblocks.MaxPool2d(1)
    with torch.no_grad():
        fastblocks.empty_cache()
        pair = [pool(image(768, 512)) for _ in range(2)]  # 12 MiB each
        del pair
        before = fastblocks.memory_stats()
        kept = pool(image(1460, 512))  # 22.8 MiB
        after = fastblocks.memory_stats()
    assert after["misses"] == before["misses"]
    assert after["cached_bytes"] < before["cached_bytes"] - kept.numel() * 4 + (1 << 20)


def test_memory_is_held_within_its_limit():
    from fastblocks import _C  # its own pool: the numba tier's has a limit of its own

    pool = fastblocks.MaxPool2d(1)
    with torch.no_grad():
        kept = [pool(image(512, 512 + 64 * i)) for i in range(20)]
        for i in range(20):
            kept[i] = pool(image(700 - 13 * i, 512))
        held = _C.memory_stats()
    assert held["active_bytes"] + held["cached_bytes"] <= held["limit_bytes"]
    assert held["limit_bytes"] <= max(128 << 20, 2 * held["peak_active_bytes"])


def test_what_comes_again_finds_its_memory():
    """Large images do not fit into the holes between small ones: memory given back for them is soon kept instead."""
    code = (
        "import torch, fastblocks\n"
        "pool = fastblocks.MaxPool2d(1)\n"
        "image = lambda mib: torch.randn(1, 8, 512, 64 * mib).contiguous(memory_format=torch.channels_last)\n"
        "misses = []\n"
        "with torch.no_grad():\n"
        "    small, large = image(12), image(30)\n"
        "    for _ in range(12):\n"
        "        before = fastblocks.memory_stats()['misses']\n"
        "        kept = [pool(small) for _ in range(12)]\n"
        "        del kept[::2]\n"
        "        more = [pool(large) for _ in range(2)]\n"
        "        del kept, more\n"
        "        misses.append(fastblocks.memory_stats()['misses'] - before)\n"
        "stats = fastblocks.memory_stats()\n"
        "assert misses[0] > 10 and misses[-3:] == [0, 0, 0], misses\n"
        "assert stats['limit_bytes'] <= 2 * stats['peak_active_bytes'], stats\n"
        "fastblocks.empty_cache()\n"
        "with torch.no_grad(): kept = [pool(small) for _ in range(12)]\n"
        "assert fastblocks.memory_stats()['limit_bytes'] == stats['limit_bytes']\n"
    )
    run_alone(code)


def test_memory_where_address_space_is_limited():
    code = (
        "import resource, torch, fastblocks\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "pool = fastblocks.MaxPool2d(1)\n"
        "x = torch.randn(1, 8, 1024, 1024)\n"
        "with torch.no_grad(): kept = [pool(x) for _ in range(6)]\n"
        "assert all(torch.equal(y, x) for y in kept)\n"
        "del kept\nfastblocks.empty_cache()\n"
        "assert fastblocks.memory_stats()['cached_bytes'] < 32 << 20\n"
    )
    run_alone(code)


def test_empty_cache_gives_large_slabs_back():
    x = torch.randn(1, 8, 512, 512)  # an output of 8 MiB
    with torch.no_grad():
        InvertedResidual(8, 8).eval()(x)
    before = fastblocks.memory_stats()["cached_bytes"]
    assert before >= 8 << 20
    fastblocks.empty_cache()
    assert fastblocks.memory_stats()["cached_bytes"] <= before - (8 << 20)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_weak_symbol_outside_its_level():
    # the core is compiled for any CPU: a copy of its functions may serve everybody
    found = Path(__file__).parents[1].glob("build/temp*/libfastblocks_*.a")
    any_cpu = {"libfastblocks_core", "libfastblocks_module"}
    libraries = sorted(library for library in found if library.stem not in any_cpu)
    if not libraries:
        pytest.skip("no static libraries: an editable install removes them, `python setup.py build_clib` leaves them")
    for library in libraries:
        level = re.sub(r"^libfastblocks_|(_train)?\.a$", "", library.name)
        listed = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listed.splitlines() if re.search(r" [VWu] ", line)]
        assert [line for line in weak if f"fastblocks::{level}::" not in line] == []


def test_isa_of_the_environment_is_taken():
    from fastblocks.backends import native

    for level in native.isa_levels():
        code = "import fastblocks; print(fastblocks.backend_info()['isa'])"
        environment = {**os.environ, "FASTBLOCKS_ISA": level}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.stdout.strip() == level
