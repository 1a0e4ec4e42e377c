"""What the benchmarks time, in which sizes, and against whom.

    pytest --benchmark-only                         # quick: under five minutes on two cores
    FASTBLOCKS_BENCH=full pytest --benchmark-only   # torch.compile for every op, batch 8 for every op, longer timing
    FASTBLOCKS_BENCH_SECONDS=0.01 ...               # how long each row is timed

Without --benchmark-only or --benchmark-enable every benchmark skips itself before it builds anything.
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastblocks
from fastblocks import ConvBNAct, DepthwiseConvBNAct, InvertedResidual, PointwiseConvBNAct, functional
from fastblocks.bench.stock import stock_model
from fastblocks.models.common import channels_last

FULL = os.environ.get("FASTBLOCKS_BENCH", "") == "full"
SECONDS = float(os.environ.get("FASTBLOCKS_BENCH_SECONDS", "1.0" if FULL else "0.3"))
THREADS = sorted({1, torch.get_num_threads()})
CONTENDERS = ("eager", "channels_last", "compile", "fastblocks")
TOLERANCE = 1e-4  # of the largest value
WARM_UP = 3
LEAST_ROUND = 1e-3  # seconds: shorter calls are timed several to a round


class Shape(NamedTuple):
    """One row group: what is run, on an input of which size (without the batch)."""

    name: str
    size: tuple[int, int, int]
    ours: Callable[[], nn.Module]
    stock: Callable[[], nn.Module]
    compiled: bool = False
    """Whether torch.compile takes part in the quick profile."""
    image: bool = False
    """Whether fastblocks gets its input in NCHW, as a picture comes; else channels_last, as between its layers."""
    nchw_weights: bool = False
    """Whether fastblocks keeps NCHW weights, and so an NCHW output; else channels_last ones, as in its networks."""


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fastblocks.functional.global_avg_pool(x)


def _stock_conv(cin: int, out: int, kernel: int, stride: int, groups: int) -> nn.Module:
    from torchvision.ops import Conv2dNormActivation

    return Conv2dNormActivation(cin, out, kernel, stride, groups=groups, activation_layer=nn.ReLU6)


def _stock_block(cin: int, out: int, stride: int) -> nn.Module:
    from torchvision.models.mobilenetv2 import InvertedResidual as Stock

    return Stock(cin, out, stride, 6)


class GroupedPointwise(nn.Sequential):
    """Grouped 1x1 convolution, BatchNorm, ReLU, channel shuffle: plain torch, and as one op."""

    def __init__(self, cin: int, out: int, groups: int, fused: bool) -> None:
        conv = nn.Conv2d(cin, out, 1, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), nn.ReLU(), nn.ChannelShuffle(groups))
        self.groups, self.fused = groups, fused

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return super().forward(x)
        conv, bn = self[0], self[1]
        record = functional.ConvBN(conv.weight, None, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
        return functional.grouped_pointwise_conv_bn_act(
            x, record, groups=self.groups, shuffle=self.groups, activation="relu"
        )


class ShuffleSplit(nn.Module):
    """Channel shuffle in two groups and the split behind it; torch makes two copies."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return functional.channel_shuffle_split(x, 2)[1]
        n, c, h, w = x.shape
        y = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        last = x.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last else torch.contiguous_format
        return [half.contiguous(memory_format=form) for half in y.chunk(2, 1)][1]


def _network(name: str) -> Shape:
    return Shape(
        f"{name} 224x224",
        (3, 224, 224),
        lambda: fastblocks.models.create(name),
        lambda: stock_model(fastblocks.models.create(name).state_dict()),
        compiled=True,
        image=True,
    )


def _grouped(cin: int, out: int, groups: int, side: int) -> Shape:
    return Shape(
        f"grouped_pointwise_conv_bn_act {cin}-{out} g{groups} {side}x{side}",
        (cin, side, side),
        lambda: GroupedPointwise(cin, out, groups, True),
        lambda: GroupedPointwise(cin, out, groups, False),
    )


def _shuffle_split(channels: int, side: int) -> Shape:
    return Shape(
        f"channel_shuffle_split {channels} {side}x{side}",
        (channels, side, side),
        lambda: ShuffleSplit(True),
        lambda: ShuffleSplit(False),
    )


def _stem(cin: int, out: int, side: int, *, nchw: bool = False) -> Shape:
    return Shape(
        f"conv_bn_act {cin}-{out} 3x3 {side}x{side} s2" + " to nchw" * nchw,
        (cin, side, side),
        lambda: ConvBNAct(cin, out, stride=2),
        lambda: _stock_conv(cin, out, 3, 2, 1),
        image=True,
        nchw_weights=nchw,
    )


def _pointwise(cin: int, out: int, side: int) -> Shape:
    return Shape(
        f"pointwise_conv_bn_act {cin}-{out} {side}x{side}",
        (cin, side, side),
        lambda: PointwiseConvBNAct(cin, out),
        lambda: _stock_conv(cin, out, 1, 1, 1),
    )


def _depthwise(channels: int, side: int, stride: int) -> Shape:
    return Shape(
        f"depthwise_conv_bn_act {channels} 3x3 {side}x{side} s{stride}",
        (channels, side, side),
        lambda: DepthwiseConvBNAct(channels, stride=stride),
        lambda: _stock_conv(channels, channels, 3, stride, channels),
    )


def _block(cin: int, out: int, side: int, stride: int) -> Shape:
    return Shape(
        f"inverted_residual {cin}-{6 * cin}-{out} {side}x{side} s{stride}",
        (cin, side, side),
        lambda: InvertedResidual(cin, out, stride, 6),
        lambda: _stock_block(cin, out, stride),
        compiled=True,
    )


OPS = (
    _stem(3, 32, 224),
    _stem(3, 32, 224, nchw=True),
    _pointwise(32, 192, 28),
    _pointwise(320, 1280, 7),
    _depthwise(192, 28, 1),
    _depthwise(144, 56, 2),
    _block(24, 32, 56, 2),
    _block(32, 32, 28, 1),
    _block(160, 160, 7, 1),
    Shape("global_avg_pool 1280 7x7", (1280, 7, 7), Pool, lambda: nn.AdaptiveAvgPool2d(1)),
    _grouped(200, 50, 2, 28),
    _grouped(240, 60, 3, 28),
    _grouped(544, 136, 4, 14),
    _grouped(1536, 384, 8, 7),
    _shuffle_split(116, 28),
    _shuffle_split(464, 7),
    Shape(
        "max_pool2d 24 3x3 112x112 s2",
        (24, 112, 112),
        lambda: fastblocks.layers.pool.MaxPool2d(3, 2, 1),
        lambda: nn.MaxPool2d(3, 2, 1),
    ),
)

NETWORKS = tuple(map(_network, ("mobilenet_v1", "mobilenet_v2", "shufflenet_v1_g3", "shufflenet_v2_x1_0")))


def ids(shape: Shape) -> str:
    """A shape's name, as part of a test id."""
    return shape.name.replace(" ", "_")


# ------------------------------------------------------------------------------------------------------------ fixtures
# In no conftest.py: tests/ imports its own by that name.


@pytest.fixture(autouse=True)
def only_when_asked(request: pytest.FixtureRequest) -> None:
    """A plain `pytest` times nothing."""
    option = request.config.getoption
    if not (option("benchmark_only", False) or option("benchmark_enable", False)):
        pytest.skip("benchmarks run with --benchmark-only")


@pytest.fixture(params=THREADS, ids=lambda n: f"{n}-thread{'s' * (n > 1)}")
def threads(request: pytest.FixtureRequest, only_when_asked: None) -> Iterator[int]:
    """That many torch threads, which fastblocks uses too."""
    former = torch.get_num_threads()
    torch.set_num_threads(request.param)
    try:
        yield request.param
    finally:
        torch.set_num_threads(former)


# ------------------------------------------------------------------------------------------------------------- running


@functools.lru_cache(maxsize=2)
def _problem(shape: Shape, batch: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Weights under the keys that both sides have, an input, and what float64 makes of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = shape.stock().eval()
        for module in stock.modules():  # statistics of a trained network: every channel alive, none at identity
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        x = torch.randn(batch, *shape.size)
    truth = copy.deepcopy(stock).double()(x.double())
    return stock.state_dict(), x, truth


def _runner(shape: Shape, contender: str, state: dict[str, Any], x: Tensor) -> Callable[[], Tensor]:
    model = (shape.ours if contender == "fastblocks" else shape.stock)().eval()
    model.load_state_dict(state)
    nchw = contender == "eager" or (contender == "fastblocks" and shape.image)
    x = x.contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last)
    if contender == "fastblocks":
        if not shape.nchw_weights:
            channels_last(model)
        if isinstance(model, (ConvBNAct, InvertedResidual)):
            reason = fastblocks.layers.why_not_fuse(model, x)
            assert reason is None, reason
    elif contender != "eager":
        model = model.to(memory_format=torch.channels_last)
    if contender == "compile":
        model = torch.compile(model, dynamic=False)
    return lambda: model(x)


def _check(found: Tensor, truth: Tensor) -> None:
    assert found.shape == truth.shape, (found.shape, truth.shape)
    error = ((found.double() - truth).abs().max() / truth.abs().max()).item()
    assert error <= TOLERANCE, f"the output is off by {error:.2g} of the largest value"


def _time(benchmark: Any, run: Callable[[], Tensor]) -> None:
    for _ in range(WARM_UP):
        run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    iterations = max(1, round(LEAST_ROUND / once))
    rounds = min(max(round(SECONDS / (once * iterations)), 5), 1000)
    benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=WARM_UP)


def run_benchmark(benchmark: Any, shape: Shape, contender: str, batch: int, threads: int) -> None:
    """Compare one contender's output, then time it, in the group of its shape, batch and number of threads."""
    pytest.importorskip("torchvision")
    if contender == "compile" and not (shape.compiled or FULL):
        pytest.skip("torch.compile takes its time: FASTBLOCKS_BENCH=full")
    benchmark.group = f"{shape.name}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    with torch.no_grad():
        state, x, truth = _problem(shape, batch)
        if contender == "compile":
            _run_compiled(benchmark, shape, state, x, truth)
        elif contender == "fastblocks":
            _run_native(benchmark, shape, state, x, truth)
        else:
            run = _runner(shape, contender, state, x)
            _check(run(), truth)
            _time(benchmark, run)


def _run_native(benchmark: Any, shape: Shape, state: dict[str, Any], x: Tensor, truth: Tensor) -> None:
    try:
        native = fastblocks.use_backend("native")
    except RuntimeError as error:
        pytest.skip(str(error))
    with native:
        run = _runner(shape, "fastblocks", state, x)
        _check(run(), truth)
        _time(benchmark, run)


def _run_compiled(benchmark: Any, shape: Shape, state: dict[str, Any], x: Tensor, truth: Tensor) -> None:
    import torch._inductor.config as config

    torch._dynamo.reset()
    # the number of threads is part of the generated code: no graph may come out of another run's cache
    with config.patch(freezing=True, fx_graph_cache=False):
        run = _runner(shape, "compile", state, x)
        _check(run(), truth)
        _time(benchmark, run)
    torch._dynamo.reset()
