"""What all tests share: the tiers to run under, tensors in every layout, and how close is close."""

from __future__ import annotations

import contextlib
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as tF
from torch import Tensor, nn

import fastblocks
from fastblocks import ConvBNAct, InvertedResidual
from fastblocks.backends import reference, state
from fastblocks.functional import ConvBN, training


def pytest_collection_finish() -> None:
    """What is there before the first test stays; without this, a collection of the garbage looks through all of it."""
    gc.collect()
    gc.freeze()


def _tiers() -> list[Any]:
    """The reference, numba, and the native tier at every instruction set level that this CPU has."""
    tiers: list[Any] = [pytest.param("reference", id="reference")]
    try:
        with fastblocks.use_backend("numba"):
            tiers.append(pytest.param("numba", id="numba"))
    except RuntimeError as error:
        tiers.append(pytest.param("numba", id="numba", marks=pytest.mark.skip(reason=str(error))))
    try:
        with fastblocks.use_backend("native"):
            from fastblocks.backends import native
    except RuntimeError as error:
        return [*tiers, pytest.param("native", id="native", marks=pytest.mark.skip(reason=str(error)))]
    return [*tiers, *(pytest.param(f"native {level}", id=f"native-{level}") for level in native.isa_levels())]


@contextlib.contextmanager
def running(tier: str) -> Iterator[None]:
    """Run under a tier: "reference", "numba", "native", or "native" and a level."""
    name, _, level = tier.partition(" ")
    with fastblocks.use_backend(name), contextlib.ExitStack() as stack:
        if level:
            from fastblocks.backends import native

            stack.enter_context(native.use_isa(level))
        yield


def ways(tier: str) -> tuple[str | None, ...]:
    """Of taking the widest vectors, for `taking`: at the level of AVX-512 as Intel's cores do, Zen 5 and Zen 4."""
    return ("SHARED", "SEPARATE", "HALVES") if tier.endswith("x86_64_v4") else (None,)


@contextlib.contextmanager
def taking(way: str | None) -> Iterator[None]:
    """Kernels that take the widest vectors this way; None: as they are."""
    if way is None:
        yield
        return
    from fastblocks import _C

    former = _C.vector_pipes()
    _C.use_vector_pipes(getattr(_C.Pipes, way))
    try:
        yield
    finally:
        _C.use_vector_pipes(former)


@pytest.fixture(params=_tiers())
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each tier in turn, as the current one."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=[*_tiers()[:2], _tiers()[-1]])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, numba and the fastest native level alone: for what does not depend on the kernels."""
    with running(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # torch.jit.trace and friends are deprecated and still in use
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.fixture(scope="session")
def quick_study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of the shortest study there is, and its result."""
    from fastblocks.cli import main

    folder = tmp_path_factory.mktemp("study")
    threads = torch.get_num_threads()
    arguments = ["--out", str(folder), "--docs", str(folder / "docs"), "--threads", "1", "--seconds", "0.001"]
    assert main(["study", *arguments, "--machine", "a <machine>"]) == 0
    torch.set_num_threads(threads)
    (path,) = folder.glob("study-*.json")
    yield folder, json.loads(path.read_text("utf-8"))


# ------------------------------------------------------------------------------------------------------------- tensors


def record(out: int, fan: int, k: int | tuple[int, int] = 1, *, bias: bool = False, bn: bool = True) -> ConvBN:
    """A convolution with weights of a sensible size, and its BatchNorm."""
    kh, kw = (k, k) if isinstance(k, int) else k
    weight = torch.randn(out, fan, kh, kw) / (fan * kh * kw) ** 0.5
    b = torch.randn(out) if bias else None
    if not bn:
        return ConvBN(weight, b)
    return ConvBN(weight, b, torch.randn(out), torch.rand(out) + 0.5, torch.randn(out) + 1, torch.randn(out), 1e-3)


def integers(*size: int, low: int = -3, high: int = 4) -> Tensor:
    """Small whole numbers: sums of their products are exact in float32."""
    return torch.randint(low, high, size).float()


def integer_record(out: int, fan: int, k: int | tuple[int, int] = 1, *, bias: bool = False) -> ConvBN:
    """A convolution and BatchNorm that float32 computes without any rounding."""
    kh, kw = (k, k) if isinstance(k, int) else k
    var = torch.tensor([0.25, 1.0, 4.0])[torch.randint(0, 3, (out,))]
    b = integers(out) if bias else None
    return ConvBN(integers(out, fan, kh, kw), b, integers(out), var, integers(out), integers(out), 0.0)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in every layout that a user may bring."""
    cl = torch.channels_last
    yield "nchw", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=cl)
    for offset in (1, 2, 3):
        flat = torch.zeros(x.numel() + offset)[offset:]
        order = (0, 2, 3, 1) if offset % 2 else (0, 1, 2, 3)
        moved = flat.view([x.shape[i] for i in order]).permute([order.index(i) for i in range(4)])
        yield f"offset of {4 * offset} bytes", moved.copy_(x)
    yield "channel slice", torch.cat([x, x], 1).contiguous(memory_format=cl).chunk(2, 1)[1]
    yield "channel slice of nchw", torch.cat([x, x], 1).chunk(2, 1)[1]
    yield "every other channel", x.repeat_interleave(2, 1)[:, ::2]
    yield "every other row", x.repeat_interleave(2, 2)[:, :, ::2]
    yield "every other column", x.repeat_interleave(2, 3).contiguous(memory_format=cl)[..., ::2]
    yield "without the first column", torch.cat([x[..., :1], x], 3)[..., 1:]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "batch first last", x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if x.shape[0] == 1:
        odd = x.contiguous(memory_format=cl)
        yield "odd batch stride", odd.as_strided(odd.shape, (7, *odd.stride()[1:]))


def expanded(x: Tensor) -> Tensor:
    """A batch of two with a batch stride of 0."""
    return x[:1].expand(2, -1, -1, -1)


def stock(x: Tensor, conv: ConvBN, groups: int = 1, activation: str | None = None, **kwargs: Any) -> Tensor:
    """Convolution, BatchNorm and activation by torch's own functions, written without this package."""
    y = tF.conv2d(x, conv.weight, conv.bias, groups=groups, **kwargs)
    if conv.running_mean is not None:
        y = tF.batch_norm(y, conv.running_mean, conv.running_var, conv.bn_weight, conv.bn_bias, False, 0.0, conv.eps)
    return {None: lambda y: y, "relu": torch.relu, "relu6": tF.relu6}[activation](y)


# ----------------------------------------------------------------------------------------------------------- closeness


def doubled(value: Any) -> Any:
    """The same arguments in float64."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, ConvBN):
        return ConvBN(*(doubled(v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(doubled(v) for v in value)
    return value


def check_close(found: Tensor, function: Callable[..., Tensor], *args: Any, note: Any = "", **kwargs: Any) -> None:
    """`found` is as near to the float64 result of a function under the reference as torch's own float32 result.

    As near: within four times torch's error, plus four roundings of the largest value.
    """
    with fastblocks.use_backend("reference"), torch.no_grad():
        truth = function(*doubled(args), **{k: doubled(v) for k, v in kwargs.items()})
        torchs = function(*args, **kwargs)
    assert found.shape == truth.shape, (note, found.shape, truth.shape)
    if not found.numel():
        return
    error = (found.double() - truth).abs().max().item()
    allowed = 4 * (torchs.double() - truth).abs().max().item() + 4 * 2**-23 * truth.abs().max().item()
    assert error <= allowed, f"{note}: error {error:.3g}, allowed {allowed:.3g}"


def significant_strides(x: Tensor) -> list[int]:
    """The strides that say something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


# -------------------------------------------------------------------------------------------------------------- layers


def settled(layer: nn.Module) -> nn.Module:
    """In eval mode, with running statistics of their own."""
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return layer.eval()


def image() -> Tensor:
    return torch.randn(2, 8, 6, 6)


def block(**kwargs: Any) -> Any:
    return settled(InvertedResidual(8, 8, **kwargs))


def children(layer: Any, x: Tensor) -> Tensor:
    """The layer's output by its children alone."""
    if isinstance(layer, InvertedResidual):
        y = x
        for module in layer.conv:
            y = children(module, y) if isinstance(module, ConvBNAct) else module(y)
        return x + y if layer.use_res_connect else y
    for module in layer:
        x = module(x)
    return x


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that layers run, as they run; "chain" is one in training or with gradients."""
    names: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def run(*args: Any) -> Tensor:
            names.append(name)
            result: Tensor = function(*args)
            return result

        return run

    for table in (state.table, reference.TABLE):
        for name, function in list(table.items()):
            monkeypatch.setitem(table, name, recorded(name, function))
    monkeypatch.setattr(training, "_forward", recorded("chain", training._forward))
    return names
