"""A training step of every layer: output, gradients and statistics, against its leaves in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import layouts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_step import check_step, count_chains, lively
from torch import Tensor, nn

import fastblocks
from fastblocks import (
    ConvBNAct,
    DepthwiseConvBNAct,
    DepthwiseSeparableConv,
    InvertedResidual,
    MaxPool2d,
    PointwiseConvBNAct,
    Sequential,
    ShuffleUnit,
    ShuffleUnitV2,
)

CHANNELS = (1, 3, 8, 17, 24, 58, 67)
ACTIVATIONS = (None, nn.ReLU, nn.ReLU6)
FEW = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def both_formats(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.contiguous(), x.contiguous(memory_format=torch.channels_last)


def check_chain(layer: Any, x: Tensor, *args: Any, chains: int = 1, **kwargs: Any) -> None:
    found = check_step(layer, x, *args, **kwargs)
    assert count_chains(found) in (None, chains), kwargs


# ----------------------------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_stem(tier: str, act: Any) -> None:
    """The dense convolution at a chain's start, from NCHW and from channels_last images."""
    for channels, out, kernel, stride, padding, dilation in (
        (3, 8, 3, 2, 1, 1),
        (3, 24, 3, 1, 0, 1),
        (1, 17, 3, 2, 2, 1),
        (8, 3, 5, 3, 2, 1),
        (17, 8, (1, 3), (2, 1), (0, 1), 1),
        (3, 58, 3, 1, 2, 2),
        (3, 8, 7, 4, 3, 1),
        (24, 67, 3, 1, 1, 1),
        (24, 1, 1, 2, 0, 1),
    ):
        for x in both_formats(torch.randn(2, channels, 9, 11)):
            layer = lively(ConvBNAct(channels, out, kernel, stride, padding, dilation, activation_layer=act))
            check_chain(layer, x, note=(channels, out, kernel, stride, x.stride()))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_pointwise(tier: str, act: Any) -> None:
    for i, channels in enumerate(CHANNELS):
        for out in CHANNELS[i % 2 :: 2]:
            x = both_formats(torch.randn(1 + i % 3, channels, 5, 7))[out % 3 == 0]
            check_chain(lively(PointwiseConvBNAct(channels, out, activation_layer=act)), x, note=(channels, out))


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_grouped_pointwise(tier: str, groups: int) -> None:
    for x in both_formats(torch.randn(2, 24, 5, 6)):
        for out in (24, 48, 120):
            check_chain(
                lively(ConvBNAct(24, out, 1, groups=groups, activation_layer=nn.ReLU)), x, note=(out, x.stride())
            )


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_depthwise(tier: str, kernel: int, stride: int) -> None:
    for padding in range(kernel):
        channels = CHANNELS[padding]
        layer = lively(
            ConvBNAct(
                channels, channels, kernel, stride, padding, groups=channels, activation_layer=ACTIVATIONS[padding % 3]
            )
        )
        x = both_formats(torch.randn(1 + padding % 3, channels, 9, 14))[padding % 2]
        check_chain(layer, x, note=(kernel, stride, padding))


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_depthwise_dilated(tier: str, stride: Any) -> None:
    for kernel, padding in ((3, 2), (3, 0), ((3, 5), (2, 4)), (5, 1)):
        for channels in (3, 24, 67):
            layer = lively(ConvBNAct(channels, channels, kernel, stride, padding, 2, groups=channels))
            check_chain(layer, both_formats(torch.randn(2, channels, 10, 11))[1], note=(kernel, stride, padding))


@FEW
@given(
    st.sampled_from(["dense", "depthwise"]),
    *(
        st.tuples(st.integers(low, high), st.integers(low, high))
        for low, high in ((1, 4), (1, 3), (0, 3), (1, 2), (5, 9))
    ),
    st.integers(1, 3),
    st.sampled_from(CHANNELS[:5]),
    st.booleans(),
)
def test_any_geometry(
    backend: str,
    kind: str,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    size: Any,
    n: int,
    c: int,
    last: bool,
) -> None:
    padding = tuple(min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel, strict=True))
    size = tuple(max(s, d * (k - 1) + 2) for s, d, k in zip(size, dilation, kernel, strict=True))
    out, groups = (c, c) if kind == "depthwise" else (8, 1)
    layer = lively(ConvBNAct(c, out, kernel, stride, padding, dilation, groups, activation_layer=nn.ReLU))
    check_step(layer, both_formats(torch.randn(n, c, *size))[last])


def test_dense_inside_a_row_runs_its_children(backend: str) -> None:
    """A dense convolution is known at a chain's start alone; the layers around it stay chains."""
    layers = lively(Sequential(PointwiseConvBNAct(8, 8), ConvBNAct(8, 8, 3), PointwiseConvBNAct(8, 8)))
    check_step(layers, torch.randn(2, 8, 5, 5))
    found = check_step(
        lively(Sequential(PointwiseConvBNAct(8, 8), ConvBNAct(8, 8, 3, groups=2))), torch.randn(2, 8, 5, 5)
    )
    assert count_chains(found) in (None, 1)


def test_layers_that_are_no_chain(backend: str) -> None:
    """A bias, no normalisation, grouped 3x3: the children run, as the eval op would not."""
    for layer in (
        ConvBNAct(8, 8, 3, bias=True),
        ConvBNAct(8, 8, 1, norm_layer=None),
        ConvBNAct(8, 8, 3, groups=2),
        ConvBNAct(8, 8, 1, stride=2, groups=4),
        ConvBNAct(8, 8, 1, activation_layer=nn.Hardswish),
        ConvBNAct(8, 16, 3, groups=8),
    ):
        check_chain(lively(layer), torch.randn(2, 8, 5, 5), chains=0, note=layer)


# ----------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_separable(tier: str, act: Any) -> None:
    for i, (channels, out) in enumerate(((3, 8), (8, 17), (24, 58), (67, 24), (1, 3), (17, 1))):
        layer = lively(DepthwiseSeparableConv(channels, out, 1 + i % 3, activation_layer=act))
        for x in both_formats(torch.randn(1 + i % 2, channels, 7, 9)):
            check_chain(layer, x, note=(channels, out))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ratio", [1, 6, 2.5])
def test_inverted_residual(tier: str, stride: int, ratio: float) -> None:
    for i, (channels, out) in enumerate(((8, 8), (8, 24), (3, 3), (17, 17), (24, 8), (1, 1))):
        layer = lively(InvertedResidual(channels, out, stride, ratio))
        for x in both_formats(torch.randn(1 + i % 3, channels, 7 - i % 2, 5 + i)):
            check_chain(layer, x, note=(channels, out, x.shape))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_shuffle_unit(tier: str, groups: int, stride: int) -> None:
    for i, first_grouped in enumerate((True, False)):
        for per in (1, 5):
            width = 4 * groups * per
            channels = width if stride == 1 else width - (2 - i) * groups
            layer = lively(ShuffleUnit(channels, width, stride, groups, first_grouped))
            for x in both_formats(torch.randn(2, channels, 7, 6 + i)):
                check_chain(layer, x, note=(channels, width, first_grouped))


def test_shuffle_unit_of_the_other_convention(tier: str) -> None:
    """The inverse shuffle is no op in eval mode; in training it must be right, whoever runs it."""
    for x in both_formats(torch.randn(2, 48, 5, 6)):
        check_step(lively(ShuffleUnit(48, 48, 1, 4, shuffle_groups=3)), x)


@pytest.mark.parametrize("stride", [1, 2])
def test_shuffle_unit_v2(tier: str, stride: int) -> None:
    for i, (channels, out) in enumerate(((2, 2), (6, 6), (16, 16), (34, 34), (58, 58), (24, 116))):
        if stride == 1:
            channels = out
        layer = lively(ShuffleUnitV2(channels, out, stride))
        for x in both_formats(torch.randn(1 + i % 3, channels, 7, 6 + i % 2)):
            check_chain(layer, x, note=(channels, out))


# ------------------------------------------------------------------------------------------------------------- rows

ROWS: dict[str, tuple[Callable[[], Any], int]] = {
    "pool": (lambda: Sequential(ConvBNAct(3, 24, 3, 2, activation_layer=nn.ReLU), MaxPool2d(3, 2, 1)), 3),
    "pool, then a unit": (
        lambda: Sequential(
            ConvBNAct(3, 24, 3, 2, activation_layer=nn.ReLU), MaxPool2d(3, 2, 1), ShuffleUnit(24, 48, 2, 3, False)
        ),
        3,
    ),
    "pool, then a residual": (
        lambda: Sequential(ConvBNAct(3, 17, 3, 1), MaxPool2d((2, 3), (1, 2), (0, 1)), InvertedResidual(17, 17)),
        3,
    ),
    "pool first": (lambda: Sequential(MaxPool2d((2, 3), (1, 2), (0, 1)), PointwiseConvBNAct(17, 8)), 17),
    "pool amid": (lambda: Sequential(PointwiseConvBNAct(8, 24), MaxPool2d(2), InvertedResidual(24, 24)), 8),
    "stem": (lambda: Sequential(ConvBNAct(3, 8, 3, 2), DepthwiseSeparableConv(8, 17), InvertedResidual(17, 17)), 3),
    "residuals": (lambda: Sequential(*(InvertedResidual(8, 8, 1, r) for r in (1, 6, 2))), 8),
    "strides": (
        lambda: Sequential(InvertedResidual(8, 24, 2), InvertedResidual(24, 24), InvertedResidual(24, 17, 2)),
        8,
    ),
    "units": (lambda: Sequential(ShuffleUnit(24, 48, 2, 3, False), *(ShuffleUnit(48, 48, 1, 3) for _ in range(2))), 24),
    "units v2": (lambda: Sequential(ShuffleUnitV2(24, 58, 2), *(ShuffleUnitV2(58, 58, 1) for _ in range(2))), 24),
    "many units v2": (lambda: Sequential(ShuffleUnitV2(8, 20, 2), *(ShuffleUnitV2(20, 20, 1) for _ in range(6))), 8),
    "wide units v2, whose outputs lie in planes": (
        lambda: Sequential(ShuffleUnitV2(24, 134, 2), *(ShuffleUnitV2(134, 134, 1) for _ in range(5))),
        24,
    ),
    "wide units v2, then one that reads all": (
        lambda: Sequential(*(ShuffleUnitV2(134, 134, 1) for _ in range(4)), DepthwiseConvBNAct(134)),
        134,
    ),
    "units v2, then one that reads all": (
        lambda: Sequential(*(ShuffleUnitV2(14, 14, 1) for _ in range(3)), PointwiseConvBNAct(14, 9)),
        14,
    ),
    "units v2, then a stride": (
        lambda: Sequential(*(ShuffleUnitV2(12, 12, 1) for _ in range(2)), ShuffleUnitV2(12, 26, 2)),
        12,
    ),
    "units v2, then a depthwise": (
        lambda: Sequential(*(ShuffleUnitV2(34, 34, 1) for _ in range(2)), DepthwiseConvBNAct(34)),
        34,
    ),
    "units v2, then groups": (
        lambda: Sequential(*(ShuffleUnitV2(12, 12, 1) for _ in range(2)), ConvBNAct(12, 8, 1, groups=2)),
        12,
    ),
    "sums, then a pool": (
        lambda: Sequential(*(ShuffleUnit(24, 24, 1, 3) for _ in range(3)), ShuffleUnit(24, 60, 2, 3)),
        24,
    ),
    "a sum, then a maximum": (lambda: Sequential(ShuffleUnit(20, 20, 1, 1), MaxPool2d(3, 2, 1)), 20),
    "a sum, then a depthwise": (lambda: Sequential(ShuffleUnit(20, 20, 1, 1), DepthwiseConvBNAct(20)), 20),
    "a sum, then halves": (
        lambda: Sequential(ShuffleUnit(40, 40, 1, 2), *(ShuffleUnitV2(40, 40, 1) for _ in range(2))),
        40,
    ),
    "mixed": (lambda: Sequential(ShuffleUnitV2(8, 8, 1), InvertedResidual(8, 8), ShuffleUnit(8, 8, 1, 2)), 8),
    "join": (lambda: Sequential(PointwiseConvBNAct(8, 16), ShuffleUnitV2(16, 16, 1), ShuffleUnitV2(16, 16, 1)), 8),
    "convolution and unit": (lambda: Sequential(PointwiseConvBNAct(8, 16), ShuffleUnit(16, 32, 2, 2)), 8),
    "convolution and residual": (lambda: Sequential(PointwiseConvBNAct(8, 16), InvertedResidual(16, 16)), 8),
    "nested": (lambda: Sequential(Sequential(PointwiseConvBNAct(8, 8)), Sequential(DepthwiseConvBNAct(8))), 8),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(tier: str, name: str) -> None:
    """Layers in a row: fewer chains than layers, the numbers of the layers one by one."""
    make, channels = ROWS[name]
    layers = lively(make())
    for x in both_formats(torch.randn(2, channels, 11, 9)):
        found = check_step(layers, x)
        count = count_chains(found)
        assert count is None or 1 <= count < len(layers)
        check_step(layers, x, None)


def saved_tensors(y: Tensor) -> list[Tensor]:
    return [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]


def test_every_second_sum_is_made_by_its_readers() -> None:
    """Five units: of their sums two are stored, and the output."""
    layers = lively(Sequential(*(ShuffleUnit(48, 48, 1, 3) for _ in range(5))))
    y = layers(torch.randn(2, 48, 6, 6).requires_grad_())
    found = [tuple(t.shape) for t in saved_tensors(y)]
    third_convolutions, the_input = 5, 1
    assert found.count((2, 48, 6, 6)) == the_input + third_convolutions + 2 + 1
    assert found.count((2, 12, 6, 6)) == 10


@pytest.mark.parametrize(("channels", "out_channels"), [(130, 515), (512, 520)])
def test_many_pointwise_channels(tier: str, channels: int, out_channels: int) -> None:
    """Gradients of weights that do not stay in a cache, and blocks of pixels whose own gradients come in parts."""
    layer = lively(PointwiseConvBNAct(channels, out_channels))
    check_step(layer, torch.randn(5, channels, 16, 17).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "height", "width"), [(403, 12, 44), (512, 9, 14)])
def test_many_depthwise_channels(tier: str, channels: int, height: int, width: int, stride: int) -> None:
    """Rings that are too large for all channels at once; and pixels that share sets of the cache."""
    layer = lively(DepthwiseConvBNAct(channels, stride=stride))
    check_step(layer, torch.randn(2, channels, height, width).contiguous(memory_format=torch.channels_last))


def test_a_layer_twice_in_a_row(tier: str) -> None:
    """Its gradients add up, its statistics are updated twice."""
    layer = InvertedResidual(8, 8)
    check_step(lively(Sequential(layer, layer)), torch.randn(2, 8, 5, 5))
    layer = PointwiseConvBNAct(8, 8)
    layer[1].momentum = None
    check_step(lively(Sequential(layer, DepthwiseConvBNAct(8), layer)), torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0])
def test_a_pool_behind_any_scale(tier: str, scale: float) -> None:
    """Where BatchNorm turns the order round the smallest value wins; where it makes all equal, the first."""
    layers = lively(Sequential(ConvBNAct(3, 18, 3, 2), MaxPool2d(3, 2, 1), PointwiseConvBNAct(18, 8)))
    with torch.no_grad():
        layers[0][1].weight[::2].mul_(scale)
        layers[0][1].bias.abs_()
    for x in both_formats(torch.randn(2, 3, 17, 20)):
        check_step(layers, x)


def test_pool_alone(tier: str) -> None:
    """The first of equal values gets the gradient, as torch has it."""
    layer = MaxPool2d(3, 2, 1)
    for x in both_formats(torch.randint(-2, 3, (2, 17, 7, 8)).float()):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = layer(a), nn.functional.max_pool2d(b, 3, 2, 1)
        g = torch.randint(1, 9, want.shape).float()
        y.backward(g), want.backward(g)
        assert torch.equal(y, want) and torch.equal(a.grad, b.grad)


# ---------------------------------------------------------------------------------------------------------- layouts

LAYERS: dict[str, Callable[[], Any]] = {
    "stem": lambda: ConvBNAct(6, 8, 3, 2),
    "pointwise": lambda: PointwiseConvBNAct(6, 17),
    "depthwise": lambda: DepthwiseConvBNAct(6),
    "inverted residual": lambda: InvertedResidual(6, 6),
    "unit": lambda: ShuffleUnit(6, 12, 2, 3),
    "unit v2": lambda: ShuffleUnitV2(6, 6, 1),
    "pool": lambda: Sequential(MaxPool2d(2), PointwiseConvBNAct(6, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_input_layouts(backend: str, name: str) -> None:
    layer = lively(LAYERS[name]())
    for layout, x in layouts(torch.randn(2, 6, 6, 8)):
        check_step(layer, x, note=layout)
    check_step(layer, torch.randn(1, 6, 6, 8).expand(3, -1, -1, -1), note="expanded")
    x = torch.randn(1, 6, 6, 8).contiguous(memory_format=torch.channels_last)
    check_step(layer, x.as_strided(x.shape, (7, *x.stride()[1:])), note="odd batch stride", formats=False)


def test_inputs_that_do_not_fit_a_row(backend: str) -> None:
    """Refused as they are by the layers alone; no image at all is none too few."""
    layers = lively(Sequential(ConvBNAct(6, 8), DepthwiseConvBNAct(8)))
    for shape in ((6, 5, 5), (2, 6), (2, 6, 5, 5, 1), (2, 7, 5, 5)):
        with pytest.raises(ValueError, match=r"^input: expected"):
            layers(torch.randn(shape))
    assert layers(torch.randn(0, 6, 5, 5)).shape == (0, 8, 5, 5)


@pytest.mark.parametrize("groups", [2, 3])
def test_shuffles_alone(backend: str, groups: int) -> None:
    """Layers without a convolution, whose input wants a gradient."""
    x = torch.randn(2, 12, 3, 4, requires_grad=True)
    want = nn.functional.channel_shuffle(x.detach(), groups)
    y, halves = fastblocks.ChannelShuffle(groups)(x), fastblocks.ChannelShuffleSplit(groups)(x)
    assert torch.equal(y, want) and torch.equal(torch.cat(halves, 1), want)
    (y.square().sum() + torch.cat(halves, 1).square().sum()).backward()
    torch.testing.assert_close(x.grad, 4 * x.detach())


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_layouts(backend: str, name: str) -> None:
    """Incoming gradients in every layout, sums' (strides of 0) and half expanded ones included."""
    layer = lively(LAYERS[name]())
    x = torch.randn(2, 6, 6, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        like = layer(x)
    for layout, grad in layouts(torch.randn(like.shape)):
        check_step(layer, x, lambda y, grad=grad: grad, note=layout)
    half = torch.randn(1, like.shape[1], 1, 1).expand(like.shape)
    check_step(layer, x, lambda y: half, note="half expanded")
    check_step(layer, x, None, note="sum")


def test_weight_layouts(backend: str) -> None:
    """channels_last weights, and weights that are views with gaps, get gradients of their own shape."""
    for make in LAYERS.values():
        layer = lively(make()).to(memory_format=torch.channels_last)
        check_step(layer, torch.randn(2, 6, 6, 8), formats=False)
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                gaps = module.weight.detach().repeat_interleave(2, 0)[::2]
                module.weight = nn.Parameter(gaps)
        layer.zero_grad()
        check_step(layer, torch.randn(2, 6, 6, 8).contiguous(memory_format=torch.channels_last), formats=False)
