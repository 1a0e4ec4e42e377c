"""fastblocks.Sequential: its layers in one go give what they give one by one; hooks and the like are served."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import settled, taking, ways
from torch import Tensor, nn

import fastblocks
from fastblocks import ConvBNAct, InvertedResidual, PointwiseConvBNAct, Sequential

native = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="chains belong to the native tier")


def network() -> Sequential:
    layers = [
        ConvBNAct(3, 12, stride=2),
        InvertedResidual(12, 8, expand_ratio=1),
        InvertedResidual(8, 8),
        InvertedResidual(8, 20, 2),
        InvertedResidual(20, 20),
        PointwiseConvBNAct(20, 58),
    ]
    return settled(Sequential(*layers))


def one_by_one(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def chained(layers: Sequential) -> bool:
    """Whether the last call left a chain, and the next one will take it."""
    return layers.__dict__.get("_chain") is not None


@native
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_to_one_by_one(tier: str, threads: int) -> None:
    layers = network()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for size in ((1, 3, 33, 30), (3, 3, 16, 16), (2, 3, 57, 8), (0, 3, 16, 16)):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    x = torch.randn(size).contiguous(memory_format=memory_format)
                    want = one_by_one(layers, x)
                    for _ in range(3):
                        got = layers(x)
                        assert torch.equal(got, want)
                        assert got.stride() == want.stride()
    finally:
        torch.set_num_threads(before)
    assert chained(layers) == tier.startswith("native")


@native
@pytest.mark.parametrize(
    "block",
    [
        lambda: fastblocks.ShuffleUnitV2(24, 48, 2),  # both of its branches read the convolution's output
        lambda: fastblocks.ShuffleUnit(24, 240, groups=3, stride=2),
        lambda: InvertedResidual(24, 24, 1, 1),  # so does the addition
        lambda: InvertedResidual(24, 16, 1, 1),
        lambda: fastblocks.DepthwiseSeparableConv(24, 40, 2),
        lambda: fastblocks.DepthwiseSeparableConv(24, 24),
        lambda: fastblocks.DepthwiseConvBNAct(24),
    ],
)
def test_a_convolution_in_front_of_any_block(tier: str, block: Callable[[], nn.Module]) -> None:
    layers = settled(Sequential(ConvBNAct(3, 24, stride=2), block()))
    with torch.no_grad():
        for size in ((1, 3, 33, 30), (1, 3, 128, 128), (4, 3, 64, 62), (0, 3, 16, 16)):
            x = torch.randn(size)
            want = one_by_one(layers, x)
            for _ in range(3):
                one_by_one(layers, torch.randn(size))  # other numbers in the memory that is used again
                assert torch.equal(layers(x), want)
    assert chained(layers) == tier.startswith("native")


@native
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolution_between_blocks(tier: str, threads: int) -> None:
    """Blocks write over what is no longer read: a convolution in the middle must have read its input by then."""
    chains = (
        [
            ConvBNAct(3, 8, stride=2),
            ConvBNAct(8, 32),
            fastblocks.DepthwiseSeparableConv(32, 64),
            InvertedResidual(64, 32, 2),
        ],
        [PointwiseConvBNAct(3, 8), ConvBNAct(8, 32), InvertedResidual(32, 64, 1, 1), PointwiseConvBNAct(64, 32)],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for parts in chains:
            layers = settled(Sequential(*parts))
            with torch.no_grad():
                for size in ((1, 3, 96, 96), (4, 3, 32, 32), (5, 3, 5, 5)):
                    for _ in range(4):
                        x = torch.randn(size).contiguous(memory_format=torch.channels_last)  # as between the layers
                        want = one_by_one(layers, x)
                        one_by_one(layers, torch.randn_like(x))
                        assert torch.equal(layers(x), want)
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_images_do_not_wait_for_each_other(tier: str, threads: int) -> None:
    """Outputs that grow and shrink: none is written while images that came before are read in the same memory."""
    layers = settled(
        Sequential(
            ConvBNAct(3, 8),
            InvertedResidual(8, 8),
            ConvBNAct(8, 48),
            InvertedResidual(48, 8),
            ConvBNAct(8, 64),
            fastblocks.DepthwiseSeparableConv(64, 96),
            fastblocks.ShuffleUnitV2(96, 16, 2),
            fastblocks.ShuffleUnit(16, 64, groups=4, stride=2),
            fastblocks.ShuffleUnit(64, 64, 1, groups=4),
            InvertedResidual(64, 128),
            PointwiseConvBNAct(128, 8),
            InvertedResidual(8, 8),
        )
    )
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            for images in (threads, threads + 1, 4 * threads, 4 * threads + 1):
                x = torch.randn(images, 3, 20, 24).contiguous(memory_format=torch.channels_last)
                torch.set_num_threads(threads)  # more than there are cores run at very different times
                want = one_by_one(layers, x)
                for _ in range(8):
                    assert torch.equal(layers(x), want)
    finally:
        torch.set_num_threads(before)


@native
def test_inputs_that_do_not_fit_are_refused_as_by_the_layers() -> None:
    layers = network()
    with torch.no_grad():
        for _ in range(3):
            layers(torch.randn(1, 3, 16, 16))
        for wrong in (torch.randn(1, 4, 16, 16), torch.randn(3, 16), torch.ones(1, 3, 16, 16, dtype=torch.int32)):
            with pytest.raises((ValueError, TypeError), match="input"):
                layers(wrong)
        y = layers(torch.randn(1, 3, 16, 16, dtype=torch.float64).float())
        assert y.shape == (1, 58, 4, 4)


def _hook(layers: Sequential, seen: list[str]) -> None:
    layers[2].register_forward_hook(lambda *_: seen.append("seen"))


def _hook_on_child(layers: Sequential, seen: list[str]) -> None:
    layers[3].conv[1].register_forward_pre_hook(lambda *_: seen.append("seen"))


def _patched(layers: Sequential, seen: list[str]) -> None:
    forward = layers[4].forward
    layers[4].forward = lambda x: (seen.append("seen"), forward(x))[1]


def _exchanged(layers: Sequential, seen: list[str]) -> None:
    class Watched(InvertedResidual):
        def forward(self, input: Tensor) -> Tensor:
            seen.append("seen")
            return super().forward(input)

    layers[4] = settled(Watched(20, 20))


@native
@pytest.mark.parametrize("change", [_hook, _hook_on_child, _patched, _exchanged])
def test_whatever_looks_in_is_served(change: Callable[[Sequential, list[str]], None]) -> None:
    layers, x, seen = network(), torch.randn(1, 3, 16, 16), []
    with torch.no_grad():
        for _ in range(3):
            layers(x)
        assert chained(layers)
        change(layers, seen)
        for calls in (1, 2, 3):
            got = layers(x)
            assert len(seen) == calls
            assert not chained(layers)
        torch.testing.assert_close(got, one_by_one(layers, x))


def _weight(layers: Any) -> None:
    layers[2].conv[0][0].weight.mul_(2)


def _statistics(layers: Any) -> None:
    layers[3].conv[-1].running_mean.add_(1)


def _no_residual(layers: Any) -> None:
    layers[2].use_res_connect = False


def _stride(layers: Any) -> None:
    layers[3].conv[1][0].stride = (1, 1)


def _training(layers: Any) -> None:
    layers[2].conv[1][1].train()


def _shorter(layers: Any) -> None:
    del layers[5]


@native
@pytest.mark.parametrize("change", [_weight, _statistics, _no_residual, _stride, _training, _shorter])
def test_changes_are_followed(change: Callable[[Any], None]) -> None:
    layers, x = network(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            before = layers(x)
        change(layers)
        want = one_by_one(copy.deepcopy(layers), x)
        got = [layers(x) for _ in range(2)]
    assert got[0].shape != before.shape or not torch.allclose(got[0], before)
    torch.testing.assert_close(got[0], want)
    if change is not _training:  # its statistics move on
        torch.testing.assert_close(got[1], want)


@native
def test_gradients_take_the_layers_one_by_one() -> None:
    layers, x = network(), torch.randn(1, 3, 16, 16, requires_grad=True)
    with torch.no_grad():
        for _ in range(3):
            layers(x)
    chain = layers.__dict__["_chain"]
    layers(x).sum().backward()
    assert layers.__dict__["_chain"] is chain  # good for the next call without gradients
    got = x.grad
    assert got is not None
    x.grad = None
    one_by_one(copy.deepcopy(layers), x).sum().backward()
    torch.testing.assert_close(got, x.grad)


@native
def test_a_profiler_sees_each_op() -> None:
    layers, x = network(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            layers(x)
        with torch.profiler.profile() as profile:
            layers(x)
    names = [event.name for event in profile.events()]
    assert sum(name == "fastblocks::inverted_residual" for name in names) == 4


@native
def test_the_chain_is_not_copied_and_keeps_nothing_alive() -> None:
    layers, x = network(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            want = layers(x)
        for copied in (copy.deepcopy(layers), copy.copy(layers), pickle.loads(pickle.dumps(layers)), layers[:]):
            assert not chained(copied)
            assert torch.equal(copied(x), want)
    gone = weakref.ref(layers[1].conv[0][0].weight)
    del layers, copied
    gc.collect()
    assert gone() is None


def test_the_other_backend_is_taken_up() -> None:
    layers, x = network(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            want = layers(x)
        with fastblocks.use_backend("reference"):
            torch.testing.assert_close(layers(x), want, rtol=1e-4, atol=1e-4)
            assert not chained(layers)
        assert torch.equal(layers(x), want)


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [(3, 2, 1), (3, 2, 0), (2, 2, 0), (3, 1, 1), (2, 3, 0), (4, 2, 2), (1, 1, 0)])
def test_a_pool_makes_its_stem_row_by_row(tier: str, threads: int, window: tuple[int, int, int]) -> None:
    """Windows overlap, touch or leave rows out; rows are made in one go or in many. A NaN stays where it was."""
    layers = settled(Sequential(ConvBNAct(3, 24, stride=2), fastblocks.MaxPool2d(*window), PointwiseConvBNAct(24, 8)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for size in ((1, 3, 46, 16), (3, 3, 39, 34), (2, 3, 51, 2500), (1, 3, 226, 226)):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    x = torch.randn(size).contiguous(memory_format=memory_format)
                    x[0, 1, :5, 0] = torch.nan
                    want = one_by_one(layers, x)
                    assert want.isnan().any()
                    for way in 2 * ways(tier):
                        with taking(way):
                            torch.testing.assert_close(layers(x), want, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(before)
    assert chained(layers) == tier.startswith("native")


def separable(channels: int, out: int, stride: int = 1) -> fastblocks.DepthwiseSeparableConv:
    return fastblocks.DepthwiseSeparableConv(channels, out, stride)


SOURCES = {  # the block that makes the rows, the one that reads them, and what comes before and behind
    "separable": lambda: [PointwiseConvBNAct(3, 16), separable(16, 64), separable(64, 8, 2), separable(8, 8)],
    "behind a stem": lambda: [
        ConvBNAct(3, 32, stride=2),
        separable(32, 257),
        separable(257, 17),
        PointwiseConvBNAct(17, 9),
    ],
    "strided": lambda: [separable(3, 257, 2), separable(257, 24, 2)],
    "expanding": lambda: [PointwiseConvBNAct(3, 12), InvertedResidual(12, 66), InvertedResidual(66, 10, 1, 1)],
    "adding its input": lambda: [
        PointwiseConvBNAct(3, 66),
        InvertedResidual(66, 66, 1, 2),
        InvertedResidual(66, 10, 2, 1),
    ],
    "two in a row": lambda: [separable(3, 72), separable(72, 72), separable(72, 8), PointwiseConvBNAct(8, 72)],
}


@native
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("layers_of", SOURCES.values(), ids=SOURCES)
def test_a_block_makes_its_input_row_by_row(tier: str, layers_of: Callable[[], list[nn.Module]], threads: int) -> None:
    """Maps too large for a cache, in one band and in several, of images that take turns in the same memory."""
    layers = settled(Sequential(*layers_of()))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for size in ((1, 3, 130, 131), (7, 3, 71, 64), (2, 3, 128, 141)):
                x = torch.randn(size)
                want = one_by_one(layers, x)
                for _ in range(3):
                    torch.testing.assert_close(layers(x), want, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)
    assert chained(layers) == tier.startswith("native")


@native
@pytest.mark.parametrize(
    "reader",
    [
        "fastblocks.DepthwiseSeparableConv(32, 16)",
        "fastblocks.DepthwiseSeparableConv(32, 64), fastblocks.DepthwiseSeparableConv(64, 16)",
        "fastblocks.MaxPool2d(3, 2, 1)",
    ],
)
def test_what_is_absorbed_takes_no_memory(reader: str) -> None:
    """The stem's output, 32 x 256 x 256 numbers, and a block's are no part of the peak, in a process of its own."""
    code = f"""
import torch, fastblocks
torch.set_num_threads(1)
layers = fastblocks.Sequential(fastblocks.ConvBNAct(3, 32, stride=2), {reader}).eval()
with torch.no_grad():
    for _ in range(3):
        layers(torch.randn(1, 3, 32, 32))
    y = layers(torch.randn(1, 3, 512, 512))
stats = fastblocks.memory_stats()
print(layers._chain is not None, y.numel() * 4, stats["peak_active_bytes"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    chained, output, peak = done.stdout.split()
    stem = 4 * 32 * 256 * 256
    assert chained == "True" and int(output) in (4 * 16 * 256 * 256, 4 * 32 * 128 * 128)
    assert int(output) <= int(peak) < int(output) + stem // 4
