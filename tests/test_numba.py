"""The numba tier beside its numbers: the pool, forks, threads, memory, what is compiled when, and what is read."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import record, settled
from torch import Tensor

import fastblocks
from fastblocks import cli, functional
from fastblocks import functional as F

try:
    with fastblocks.use_backend("numba"):
        import numba

        from fastblocks.backends import numba_memory, numba_pool, numba_tier
        from fastblocks.backends.numba_vector import int64s_at
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True)
def _numba() -> Iterator[None]:
    threads = torch.get_num_threads()
    with fastblocks.use_backend("numba"):
        yield
    torch.set_num_threads(threads)


def run_alone(code: str, **variables: str) -> str:
    """Run a program in a process of its own, in this tier, which must end well; what it printed."""
    environment = {**os.environ, "FASTBLOCKS_BACKEND": "numba", **variables}
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------- the pool


def _mark(begin: int, end: int, context: Any) -> None:
    """Each slice writes its own number to its items."""
    words = int64s_at(context)
    marks = int64s_at(words[2])
    for slice_ in range(begin, end):
        for item in range(words[0] * slice_ // words[1], words[0] * (slice_ + 1) // words[1]):
            marks[item] += slice_ + 1


def test_every_item_runs_once_on_as_many_slices_as_threads() -> None:
    mark = numba_pool.Kernel(_mark)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert numba_pool.threads() == threads
        for items in (1, 2, 7, 100):
            marks = torch.zeros(items, dtype=torch.int64)
            numba_pool.run(mark, items, marks.data_ptr())
            assert marks.unique().tolist() == list(range(1, min(items, threads) + 1))
    numba_pool.run(mark, 0, 0)
    assert mark not in numba_tier.kernels()


def test_results_do_not_depend_on_threads() -> None:
    """What is no product: products are torch's."""
    x = torch.randn(3, 19, 30, 17).contiguous(memory_format=torch.channels_last)
    depthwise = record(19, 1, 3)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        y = F.depthwise_conv_bn_act(x, depthwise, padding=1, activation="relu6")
        found.append([y, F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 2), F.global_avg_pool(x), F.channel_shuffle(x, 19)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_without_torchs_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread computes the same, and the reason is said."""
    layer, x = settled(fastblocks.ShuffleUnitV2(16, 16, 1)), torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        want = layer(x)
        monkeypatch.setattr(numba_pool, "_enter", None)
        monkeypatch.setattr(numba_pool, "pool_reason", "no pool")
        torch.testing.assert_close(layer(x), want)
    info = fastblocks.backend_info()
    assert (info["threads"], info["thread_pool"]) == (1, "none")
    assert info["reason"].endswith("no pool")


def test_a_pool_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_pool, "_enter", lambda *_: 1)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="refused"):
        functional.max_pool2d(torch.ones(1, 4, 8, 8), 2)


_FORK = """
import os, signal, sys, torch, fastblocks
torch.set_num_threads(2)
model = fastblocks.models.mobilenet_v2().eval()
x = torch.randn(1, 3, 96, 96)
with torch.no_grad():
    before = model(x)
    model(x)
assert fastblocks.backend_info()["threads"] == 2
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    with torch.no_grad():
        after = model(x)
    info = fastblocks.backend_info()
    layer = fastblocks.ShuffleUnitV2(16, 16, 1)
    layer(torch.randn(2, 16, 8, 8)).sum().backward()
    same = torch.allclose(after, before, rtol=1e-4, atol=1e-5) and info["thread_pool"] == "none"
    os._exit(0 if same and info["threads"] == 1 else 3)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
"""


def test_child_forked_after_use_computes_the_same() -> None:
    run_alone(_FORK)


def test_eight_threads_at_once_give_equal_outputs() -> None:
    model = settled(fastblocks.models.create("shufflenet_v2_x0_5"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
    outputs: list[Tensor | None] = [None] * 8

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                outputs[i] = model(x)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for output in outputs:
        assert output is not None
        torch.testing.assert_close(output, want)


def test_no_second_openmp_runtime_and_no_threads_of_numbas() -> None:
    run_alone(
        "import re, torch\n"
        "read = lambda: {l.split()[-1] for l in open('/proc/self/maps') if re.search('/lib[gi]?omp', l)}\n"
        "torch.ones(500, 500) @ torch.ones(500, 500)\nbefore = read()\n"
        "import fastblocks\n"
        "fastblocks.InvertedResidual(8, 8)(torch.randn(1, 8, 16, 16)).sum().backward()\n"
        "assert fastblocks.backend_info(counts=True)['backend'] == 'numba'\n"
        "assert read() == before, read() - before\n"
        "assert not any('omppool' in line or 'tbbpool' in line for line in open('/proc/self/maps'))\n"
    )


def test_denormals_stay_as_the_caller_has_them() -> None:
    layer = settled(fastblocks.InvertedResidual(8, 8))
    with torch.no_grad():
        layer(torch.randn(1, 8, 16, 16))
    assert float(torch.tensor(1e-40) * 1.0) > 0


# ------------------------------------------------------------------------------------------------------------ memory


def test_large_maps_are_used_again() -> None:
    layer = settled(fastblocks.InvertedResidual(8, 8))
    x = torch.randn(1, 8, 256, 256)
    with torch.no_grad():
        layer(x), layer(x)
        gc.collect()
        before = numba_memory.stats()
        for _ in range(5):
            layer(x)
        after = numba_memory.stats()
    assert (after["misses"], after["active_bytes"]) == (before["misses"], before["active_bytes"])
    assert after["hits"] > before["hits"]
    assert fastblocks.memory_stats()["active_bytes"] >= after["active_bytes"]
    fastblocks.empty_cache()
    assert numba_memory.stats()["cached_bytes"] == 0


def test_outputs_own_their_memory() -> None:
    """None is written while somebody has it, nor a view of it; and pieces of all sizes join again."""
    kept: list[tuple[Tensor, float]] = []
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        size = int(torch.randint(100, 400, (1,), generator=generator))
        y = numba_memory.empty_image(1, 8, size, size).fill_(i)
        kept.append((y[:, 1:2, 3:, 5:], float(i)))
        if i % 3:
            del kept[int(torch.randint(len(kept), (1,), generator=generator))]
        if i % 20 == 0:
            assert all((view == value).all() for view, value in kept)
    held = numba_memory.stats()
    assert held["active_bytes"] + held["cached_bytes"] <= held["limit_bytes"]
    del y
    kept.clear()
    gc.collect()
    numba_memory.empty_cache()
    with numba_memory._arena.lock:
        assert numba_memory._arena.active == 0 and len(numba_memory._arena.holes) == 1


def test_where_address_space_is_limited() -> None:
    run_alone(
        "import resource, torch, fastblocks\n"
        "fastblocks.backend_info()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "x = torch.randn(1, 8, 512, 512)\n"
        "kept = [fastblocks.MaxPool2d(1)(x) for _ in range(6)]\n"
        "assert all(torch.equal(y, x) for y in kept)\n"
    )


class Guarded:
    """Tensors whose last value is the last one before memory that must not be touched."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[mmap.mmap] = []

    def __call__(self, x: Tensor) -> Tensor:
        """The same values and strides of a dense tensor, at the end of a page."""
        page = mmap.PAGESIZE
        size = 4 * x.numel()
        pages = -(-size // page) * page
        area = mmap.mmap(-1, pages + page)
        self.maps.append(area)
        at = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert self.libc.mprotect(ctypes.c_void_p(at + pages), ctypes.c_size_t(page), mmap.PROT_READ * 0) == 0
        flat = torch.frombuffer(area, dtype=torch.float32, count=x.numel(), offset=pages - size)
        return flat.as_strided(x.shape, x.stride()).copy_(x)

    def all(self, args: Any) -> Any:
        """Arguments with all tensors moved."""
        if isinstance(args, Tensor):
            return self(args)
        if isinstance(args, functional.ConvBN):
            return functional.ConvBN(*map(self.all, args))
        return tuple(map(self.all, args)) if isinstance(args, tuple) else args


def test_nothing_is_read_beyond_the_end() -> None:
    last = torch.channels_last
    for c in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 58, 67):
        for w in (1, 2, 5, 8, 13, 40):
            x = torch.randn(1, c, 3, w).contiguous(memory_format=last)
            other = torch.randn(1, 2 * c, 3, w).contiguous(memory_format=last)
            for function, args in (
                (lambda x, d: F.depthwise_conv_bn_act(x, d, padding=1, activation="relu"), (x, record(c, 1, 3))),
                (lambda x, p: F.pointwise_conv_bn_act(x, p, residual=x), (x, record(c, c))),
                (lambda x, p: F.grouped_pointwise_conv_bn_act(x, p, groups=2, shuffle=2), (other, record(2 * c, c))),
                (lambda x: F.channel_shuffle_split(x, 2)[1], (other,)),
                (lambda x, y: F.cat_shuffle_split(x, y, 3)[0], (x, other)) if c % 2 == 0 else (torch.relu, (x,)),
                (lambda x: F.max_pool2d(x, 3, 2, 1), (x,)),
                (lambda x: F.global_avg_pool(x), (x,)),
            ):
                moved = Guarded().all(args)
                with fastblocks.use_backend("reference"):
                    want = function(*args)
                torch.testing.assert_close(function(*moved), want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- compiling, and warm-up


def test_kernels_are_compiled_when_they_are_used() -> None:
    out = run_alone(
        "import fastblocks, torch\n"
        "fastblocks.functional.max_pool2d(torch.ones(1, 2, 4, 4), 2)\n"
        "from fastblocks.backends import numba_tier\n"
        "print(*sorted(k.name for k in numba_tier.kernels() if k._compiled is not None))\n"
    )
    assert out.split() == ["pool"]


def test_warmup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["warmup"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    code = "import sys, fastblocks.cli; sys.exit(fastblocks.cli.main(['warmup', '--json']))"
    found = [json.loads(run_alone(code, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2)]
    count = len(numba_tier.kernels())
    assert [(f["kernels"], f["compiled"]) for f in found] == [(count, count), (count, 0)]
    assert found[0]["cache"].startswith(str(tmp_path)) and found[1]["seconds"] < found[0]["seconds"]


def test_warmup_without_numba_is_one_line() -> None:
    code = "import sys; sys.modules['numba'] = None; import fastblocks.cli; sys.exit(fastblocks.cli.main(['warmup']))"
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "fastblocks: backend 'numba' is not available: numba is not installed: pip install numba\n"


def test_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process compiles for itself."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba_pool, "_Cache", refuse)
    mark = numba_pool.Kernel(_mark).compile()
    assert not mark.from_cache and mark.cache_directory is None


def test_the_cache_knows_all_files_that_kernels_are_made_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numba looks at a kernel's own file only."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    body = numba_tier.kernels()[0]._body
    assert [numba_pool.Kernel(body).compile().from_cache for _ in range(2)] == [False, True]
    monkeypatch.setattr(numba_pool, "_STAMP", "of an edited file")
    assert not numba_pool.Kernel(body).compile().from_cache
