"""Every op against torch: near to float64 truth on real numbers, equal on whole numbers, in every layout and tier."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as tF
from conftest import (
    check_close,
    expanded,
    integer_record,
    integers,
    layouts,
    record,
    running,
    significant_strides,
    stock,
    taking,
    ways,
)
from torch import Tensor

from fastblocks import functional as F
from fastblocks.functional import ConvBN

CHANNELS = (1, 3, 24, 58, 116, 144, 232)
SIZES = ((1, 1), (1, 2), (2, 1), (7, 7), (14, 15), (2, 113), (113, 1))
ACTIVATIONS = (None, "relu", "relu6")


def variants(conv: ConvBN) -> list[ConvBN]:
    """With and without bias, BatchNorm, and its two vectors."""
    bias = torch.randn(conv.weight.shape[0])
    return [
        conv,
        conv._replace(bias=bias),
        conv._replace(bn_weight=None, bn_bias=None),
        conv._replace(bn_bias=None, bias=bias),
        ConvBN(conv.weight),
        ConvBN(conv.weight, bias),
    ]


def test_pointwise_channels_and_sizes(tier: str) -> None:
    for i, (c, k) in enumerate(itertools.product(CHANNELS, CHANNELS)):
        h, w = SIZES[i % len(SIZES)]
        n = 1 + i % 3
        conv = variants(record(k, c))[i % 6]
        x = torch.randn(n, c, h, w)
        if i % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        activation = ACTIVATIONS[i % 3]
        residual = torch.randn(n, k, h, w) if i % 5 < 2 else None
        if i % 5 == 1 and residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        y = F.pointwise_conv_bn_act(x, conv, activation=activation, residual=residual)
        check_close(y, F.pointwise_conv_bn_act, x, conv, activation=activation, residual=residual, note=(n, c, k, h, w))


def test_pointwise_sizes(tier: str) -> None:
    for c, k, (h, w) in itertools.product((3, 58), (5, 32, 116), SIZES):
        x = torch.randn(2, c, h, w).contiguous(memory_format=torch.channels_last)
        conv = record(k, c)
        y = F.pointwise_conv_bn_act(x, conv, activation="relu6")
        check_close(y, F.pointwise_conv_bn_act, x, conv, activation="relu6", note=(c, k, h, w))


def test_depthwise_channels_and_sizes(tier: str) -> None:
    for i, (c, (h, w), k) in enumerate(itertools.product(CHANNELS, SIZES, (3, 5))):
        conv = variants(record(c, 1, k))[i % 6]
        x = torch.randn(1 + i % 2, c, h, w)
        if i % 3:
            x = x.contiguous(memory_format=torch.channels_last)
        kwargs: dict[str, Any] = {"stride": 1 + i % 2, "padding": k // 2, "activation": ACTIVATIONS[i % 3]}
        y = F.depthwise_conv_bn_act(x, conv, **kwargs)
        check_close(y, F.depthwise_conv_bn_act, x, conv, **kwargs, note=(x.shape, k, kwargs))


def test_depthwise_of_pixels_that_share_cache_sets(tier: str) -> None:
    """Pixels a multiple of 256 floats apart, all channels or some of them; edges where one tap is missing, or more."""
    for k, stride, (wide, c), w in itertools.product((3, 5, 7), (1, 2), ((256, 256), (512, 299)), (1, 2, 4, 7, 11, 14)):
        x = integers(1, wide, 6, w).contiguous(memory_format=torch.channels_last)[:, :c]
        conv = integer_record(c, 1, k)
        for padding in {0, 1, k // 2} if min(w, 6) >= k else {k // 2}:
            y = F.depthwise_conv_bn_act(x, conv, stride=stride, padding=padding, activation="relu")
            want = stock(x, conv, c, "relu", stride=stride, padding=padding)
            assert torch.equal(y, want), (k, stride, wide, c, w, padding)


def test_conv_channels_and_sizes(tier: str) -> None:
    for i, (c, k, (h, w)) in enumerate(itertools.product((1, 3, 24), (1, 24, 58), SIZES)):
        conv = variants(record(k, c, 3))[i % 6]
        x = torch.randn(1 + i % 2, c, h, w)
        if i % 3:
            x = x.contiguous(memory_format=torch.channels_last)
        kwargs: dict[str, Any] = {"stride": 1 + i % 2, "padding": 1, "activation": ACTIVATIONS[i % 3]}
        y = F.conv_bn_act(x, conv, **kwargs)
        check_close(y, F.conv_bn_act, x, conv, **kwargs, note=(x.shape, k, kwargs))


def test_stem(tier: str) -> None:
    image = torch.randn(2, 3, 113, 113)
    conv = record(32, 3, 3)
    for x in (image, image.contiguous(memory_format=torch.channels_last)):
        y = F.conv_bn_act(x, conv, stride=2, padding=1, activation="relu6")
        check_close(y, F.conv_bn_act, x, conv, stride=2, padding=1, activation="relu6")


def block(c: int, t: int, k: int, kernel: int = 3) -> tuple[ConvBN | None, ConvBN, ConvBN]:
    expand = None if t == 1 else record(c * t, c)
    return expand, record(c * t, 1, kernel), record(k, c * t)


def test_inverted_residual(tier: str) -> None:
    cases = itertools.product((1, 3, 24, 58), (1, 2, 6), (1, 2), ((1, 1), (2, 1), (7, 7), (14, 15), (30, 29)))
    for i, (c, t, stride, (h, w)) in enumerate(cases):
        residual = stride == 1 and i % 2 == 0
        records = block(c, t, c if residual else (16, 58, 1)[i % 3])
        x = torch.randn(1 + i % 3, c, h, w)
        if i % 3:
            x = x.contiguous(memory_format=torch.channels_last)
        kwargs: dict[str, Any] = {"stride": stride, "residual": residual, "activation": ("relu6", "relu", None)[i % 3]}
        y = F.inverted_residual(x, *records, **kwargs)
        check_close(y, F.inverted_residual, x, *records, **kwargs, note=(x.shape, t, kwargs))


def test_inverted_residual_kernels_and_padding(tier: str) -> None:
    for k, padding, stride in itertools.product((1, 3, 5, 7), (0, 1, 2, 4), (1, 2, 3)):
        x = integers(2, 8, 9, 8).contiguous(memory_format=torch.channels_last)
        e, d, p = integer_record(19, 8), integer_record(19, 1, k), integer_record(5, 19)
        if 8 + 2 * padding < k:
            continue
        y = F.inverted_residual(x, e, d, p, stride=stride, padding=padding)
        z = stock(stock(x, e, activation="relu6"), d, 19, "relu6", stride=stride, padding=padding)
        assert torch.equal(y, stock(z, p)), (k, padding, stride)


def test_whole_numbers_are_exact_in_inverted_residuals(tier: str) -> None:
    for c, t, stride, size in itertools.product((3, 24), (1, 3), (1, 2), (1, 2, 7, 14, 29)):
        image = integers(2, c, size, size + 1)
        for x in (image, image.contiguous(memory_format=torch.channels_last)):
            e = None if t == 1 else integer_record(c * t, c)
            d, p = integer_record(c * t, 1, 3), integer_record(c, c * t)
            y = F.inverted_residual(x, e, d, p, stride=stride, residual=stride == 1)
            z = x if e is None else stock(x, e, activation="relu6")
            z = stock(stock(z, d, c * t, "relu6", stride=stride, padding=1), p)
            assert torch.equal(y, x + z if stride == 1 else z), (c, t, stride, size)


def test_geometry_is_exact(tier: str) -> None:
    """Every kernel, stride, padding and dilation on every small map: a border is a matter of geometry alone."""
    c, k = 5, 4
    for kernel, stride, padding, dilation in itertools.product((1, 3, 5, 7), (1, 2, 3), range(5), (1, 2)):
        dense, depthwise = integer_record(k, c, kernel, bias=True), integer_record(c, 1, kernel)
        least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
        sizes = [(h, w) for h, w in itertools.product(range(1, 9), range(1, 9)) if h >= least and w >= least]
        step = 1 if kernel == 3 and dilation == 1 else 5
        for i, (h, w) in enumerate(sizes[::step]):
            x = integers(1 + i % 2, c, h, w)
            if i % 3:
                x = x.contiguous(memory_format=torch.channels_last)
            kwargs = {"stride": stride, "padding": padding, "dilation": dilation}
            note = (kernel, tuple(x.shape), kwargs)
            y = F.conv_bn_act(x, dense, activation="relu", **kwargs)
            assert torch.equal(y, stock(x, dense, activation="relu", **kwargs)), note
            y = F.depthwise_conv_bn_act(x, depthwise, activation="relu6", **kwargs)
            assert torch.equal(y, stock(x, depthwise, c, "relu6", **kwargs)), note


def test_two_directions_may_differ(tier: str) -> None:
    x = integers(2, 6, 9, 11).contiguous(memory_format=torch.channels_last)
    for kernel in ((3, 5), (1, 3), (3, 1), (2, 4)):
        kwargs: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
        dense, depthwise = integer_record(7, 6, kernel), integer_record(6, 1, kernel)
        assert torch.equal(F.conv_bn_act(x, dense, **kwargs), stock(x, dense, **kwargs)), kernel
        assert torch.equal(F.depthwise_conv_bn_act(x, depthwise, **kwargs), stock(x, depthwise, 6, **kwargs)), kernel


def test_whole_numbers_are_exact_in_every_channel_count(tier: str) -> None:
    for c in range(1, 68):
        x = integers(1, c, 5, 3).contiguous(memory_format=torch.channels_last)
        conv, depthwise = integer_record(68 - c, c), integer_record(c, 1, 3)
        residual = integers(1, 68 - c, 5, 3)
        y = F.pointwise_conv_bn_act(x, conv, activation="relu6", residual=residual)
        z = tF.relu6(stock(x, conv) + residual)
        assert torch.equal(y, z), c
        y = F.depthwise_conv_bn_act(x, depthwise, padding=1)
        assert torch.equal(y, stock(x, depthwise, c, padding=1)), c


def test_half_vectors_of_channels_are_exact(tier: str) -> None:
    """With AVX-512 a panel may end in half a vector, which two pixels share: from 16 pixels on, in any product.

    Where a core has no pipe to spare for that it is a whole vector; where it splits its vectors, half vectors
    throughout.

    Sums of 5 and 18 have the scale in their weights where the map is large; a stem's rows are 20 pixels wide.
    """
    for way in ways(tier):
        with taking(way):
            _half_vectors()


def _half_vectors() -> None:
    sizes = ((4, 4), (3, 7), (2, 7), (20, 19))
    for i, (c, fan, (h, w)) in enumerate(itertools.product((17, 20, 24, 33, 40, 56, 68), (5, 18, 72), sizes)):
        activation = ACTIVATIONS[i % 2]
        x = integers(2, fan, h, w).contiguous(memory_format=torch.channels_last)
        conv, residual = integer_record(c, fan), integers(2, c, h, w)
        y = F.pointwise_conv_bn_act(x, conv, activation=activation)
        assert torch.equal(y, stock(x, conv, activation=activation)), (c, fan, h, w)
        y = F.pointwise_conv_bn_act(x, conv, activation="relu", residual=residual)
        assert torch.equal(y, tF.relu(stock(x, conv) + residual)), (c, fan, h, w)
        e, d, p = integer_record(c, fan), integer_record(c, 1, 3), integer_record(fan, c)
        y = F.inverted_residual(x, e, d, p, residual=True, activation="relu6")
        z = stock(stock(x, e, activation="relu6"), d, c, "relu6", padding=1)
        assert torch.equal(y, x + stock(z, p)), (c, fan, h, w)
    for c, activation in itertools.product((17, 24, 40, 56), ACTIVATIONS):
        picture, stem = integers(2, 3, 45, 40), integer_record(c, 3, 3)
        for image in (picture, picture.contiguous(memory_format=torch.channels_last)):
            y = F.conv_bn_act(image, stem, stride=2, padding=1, activation=activation)
            assert torch.equal(y, stock(image, stem, activation=activation, stride=2, padding=1)), c


def test_layouts(tier: str) -> None:
    """Any strides give the same numbers, and the output has the memory format of torch's convolution."""
    for n, c, h, w in ((2, 8, 5, 6), (1, 3, 4, 4), (1, 6, 1, 1), (3, 1, 4, 5), (1, 4, 1, 5)):
        x = integers(n, c, h, w)
        pointwise, dense, depthwise = integer_record(7, c), integer_record(7, c, 3), integer_record(c, 1, 3)
        views = [*layouts(x), ("expanded", expanded(x))]
        for name, view in views:
            note = (tuple(x.shape), name, view.stride())
            before = view.clone()
            residual = integers(view.shape[0], 7, h, w)
            want = stock(view.contiguous(), pointwise) + residual
            for other, same in [*layouts(residual)][::3]:
                y = F.pointwise_conv_bn_act(view, pointwise, residual=same)
                assert torch.equal(y, want), (note, other)
            for y, z in (
                (F.pointwise_conv_bn_act(view, pointwise), stock(view, pointwise)),
                (F.conv_bn_act(view, dense, padding=1), stock(view, dense, padding=1)),
                (F.depthwise_conv_bn_act(view, depthwise, padding=1), stock(view, depthwise, c, padding=1)),
                (F.inverted_residual(view, None, depthwise, pointwise), None),
                (F.global_avg_pool(view), None),
            ):
                if z is not None:
                    assert torch.equal(y, z), note
                    assert significant_strides(y) == significant_strides(z), (note, y.stride(), z.stride())
            y = F.inverted_residual(view, None, depthwise, pointwise)
            assert torch.equal(y, stock(stock(view, depthwise, c, "relu6", padding=1), pointwise)), note
            assert torch.allclose(F.global_avg_pool(view), view.mean((2, 3), keepdim=True)), note
            assert torch.equal(view, before), f"{note}: the input was written to"


def test_channels_last_weights_make_channels_last_outputs(tier: str) -> None:
    x = integers(2, 8, 5, 5)
    for conv in (integer_record(6, 8, 3), integer_record(6, 8, 1)):
        weight = torch.empty(conv.weight.shape, memory_format=torch.channels_last).copy_(conv.weight)
        y = F.conv_bn_act(x, conv._replace(weight=weight), padding=1)
        assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
        y = F.conv_bn_act(x, conv, padding=1)
        assert y.is_contiguous() and not y.is_contiguous(memory_format=torch.channels_last)


def test_odd_weights_and_vectors(tier: str) -> None:
    """Weights and BatchNorm vectors may be views with gaps, or of one element a stride of 0."""
    x = integers(2, 6, 5, 5)
    conv = integer_record(8, 6, 3)
    wide = conv.weight.transpose(0, 1).contiguous().transpose(0, 1)
    gaps = ConvBN(wide, None, *(v.repeat_interleave(3)[::3] for v in conv[2:6]), 0.0)
    assert torch.equal(F.conv_bn_act(x, gaps), stock(x, conv))
    one = torch.ones(1)
    flat = ConvBN(conv.weight, one.expand(8), one.expand(8), one.expand(8), one.expand(8), one.expand(8), 0.0)
    assert torch.equal(F.conv_bn_act(x, flat), stock(x, flat))
    flat = ConvBN(torch.ones(1, 1, 1, 1).expand(4, 6, 1, 1), None)
    assert torch.equal(F.pointwise_conv_bn_act(x, flat), stock(x, flat))
    weight = integers(4, 12)[:, ::2]
    assert torch.equal(F.linear(x[..., 0, 0], weight, one.expand(4)), tF.linear(x[..., 0, 0], weight, one.expand(4)))


def test_lazy_negatives(tier: str) -> None:
    z = torch.complex(integers(1, 4, 3, 3), integers(1, 4, 3, 3)).conj()
    conv = integer_record(5, 4)
    assert z.imag.is_neg()
    assert torch.equal(F.pointwise_conv_bn_act(z.imag, conv), stock(z.imag, conv))
    mean = torch.complex(integers(5), integers(5)).conj().imag
    conv = conv._replace(running_mean=mean)
    assert torch.equal(F.pointwise_conv_bn_act(z.imag, conv), stock(z.imag, conv))


def test_empty_batches(tier: str) -> None:
    for x in (torch.empty(0, 8, 5, 6), torch.empty(0, 8, 5, 6).contiguous(memory_format=torch.channels_last)):
        assert F.pointwise_conv_bn_act(x, record(7, 8)).shape == (0, 7, 5, 6)
        assert F.pointwise_conv_bn_act(x, record(8, 8), residual=x).shape == (0, 8, 5, 6)
        assert F.conv_bn_act(x, record(7, 8, 3), stride=2, padding=1).shape == (0, 7, 3, 3)
        assert F.depthwise_conv_bn_act(x, record(8, 1, 3), padding=1).shape == (0, 8, 5, 6)
        assert F.inverted_residual(x, record(16, 8), record(16, 1, 3), record(8, 16), residual=True).shape == x.shape
        assert F.global_avg_pool(x).shape == (0, 8, 1, 1)
    assert F.linear(torch.empty(0, 8), torch.ones(3, 8)).shape == (0, 3)
    assert F.linear(torch.ones(2, 8), torch.empty(0, 8)).shape == (2, 0)
    assert torch.equal(F.linear(torch.empty(2, 0), torch.empty(3, 0), torch.ones(3)), torch.ones(2, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_in_every_lane(tier: str, activation: str | None) -> None:
    """As torch's forward, wherever they stand: the value depends on no length and no tail."""
    for way in ways(tier):
        with taking(way):
            _nan_and_infinity_in_every_lane(activation)


def _nan_and_infinity_in_every_lane(activation: str | None) -> None:
    for c in (1, 5, 16, 37):
        depthwise = ConvBN(torch.ones(c, 1, 1, 1))
        identity = ConvBN(torch.eye(c)[:, :, None, None].contiguous(), torch.zeros(c))
        for value in (float("nan"), float("inf"), -float("inf")):
            x = torch.full((1, c, 1, c), 0.5).contiguous(memory_format=torch.channels_last)
            for i in range(c):
                x[0, i, 0, i] = value
            for y, z in (
                (
                    F.depthwise_conv_bn_act(x, depthwise, activation=activation),
                    stock(x, depthwise, c, activation),
                ),
                (
                    F.pointwise_conv_bn_act(x, identity, activation=activation),
                    stock(x, identity, 1, activation),
                ),
                (F.conv_bn_act(x, identity, activation=activation), stock(x, identity, 1, activation)),
                (
                    F.inverted_residual(x, None, depthwise, identity, activation=activation),
                    stock(stock(x, depthwise, c, activation), identity),
                ),
            ):
                torch.testing.assert_close(y, z, rtol=0, atol=0, equal_nan=True)


def test_batch_norm_far_from_zero(tier: str) -> None:
    """Mean 1e4, deviation 0.1; a variance of 0; values of 1e30."""
    x = 1e4 + 0.1 * torch.randn(2, 6, 5, 5)
    conv = ConvBN(torch.ones(6, 1, 1, 1), None, torch.full((6,), 1e4), torch.full((6,), 0.01), None, None, 1e-5)
    check_close(F.depthwise_conv_bn_act(x, conv), F.depthwise_conv_bn_act, x, conv)
    conv = conv._replace(running_var=torch.zeros(6))
    check_close(F.depthwise_conv_bn_act(x, conv), F.depthwise_conv_bn_act, x, conv)
    x = 1e30 * torch.randn(2, 6, 5, 5)
    assert torch.isfinite(F.depthwise_conv_bn_act(x, conv._replace(running_var=torch.ones(6)))).all()


def test_global_avg_pool(tier: str) -> None:
    for c, (h, w) in itertools.product(CHANNELS, SIZES):
        image = torch.randn(2, c, h, w) + 3
        for x in (image, image.contiguous(memory_format=torch.channels_last)):
            check_close(F.global_avg_pool(x), F.global_avg_pool, x, note=tuple(x.shape))


def test_linear(tier: str) -> None:
    for i, (n, c, k) in enumerate(itertools.product((1, 2, 7), (1, 3, 58, 232), (1, 5, 32, 116))):
        x, weight, bias = torch.randn(n, c), torch.randn(k, c), torch.randn(k) if i % 2 else None
        check_close(F.linear(x, weight, bias), F.linear, x, weight, bias, note=(n, c, k))
        assert torch.equal(F.linear(x.round(), weight.round()), tF.linear(x.round(), weight.round()))
        wide = torch.randn(n, 2 * c)[:, ::2]
        check_close(F.linear(wide, weight, bias), F.linear, wide, weight, bias, note=(n, c, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_run_in_their_own_precision(tier: str, dtype: torch.dtype) -> None:
    x = integers(2, 8, 5, 5).to(dtype)
    conv = ConvBN(*(v.to(dtype) if isinstance(v, Tensor) else v for v in integer_record(6, 8, 3)))
    y = F.conv_bn_act(x, conv, padding=1)
    assert y.dtype == dtype and torch.equal(y, stock(x, conv, padding=1))


def test_meta_tensors_have_shapes(tier: str) -> None:
    conv = ConvBN(*(v.to("meta") if isinstance(v, Tensor) else v for v in record(6, 8, 3)))
    assert F.conv_bn_act(torch.empty(2, 8, 5, 5, device="meta"), conv, stride=2).shape == (2, 6, 2, 2)


_CUTS = ((2, 6, 30, 30), (1, 6, 30, 30), (1, 2, 31, 27), (1, 6, 14, 14), (1, 2, 14, 15), (3, 6, 7, 7), (1, 6, 7, 7))


def test_repeated_runs_are_equal_bit_for_bit_at_any_thread_count(tier: str) -> None:
    """Maps are cut by images, bands or slices; sums of 48 have the scale in their weights.

    How a core takes its vectors does not matter, either.
    """
    blocks = [(torch.randn(n, 24, h, w), block(24, t, 24)) for n, t, h, w in _CUTS]
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with running(tier):
                for way in ways(tier):
                    with taking(way):
                        fused = [F.inverted_residual(x, *records, residual=True) for x, records in blocks]
                        outputs.append([*fused, F.global_avg_pool(blocks[0][0])])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, outputs[0], outputs[-1]))
    # products of the numba tier are torch's, whose bits depend on the number of threads; its pooling is its own
    own = slice(-1, None) if tier == "numba" else slice(None)
    if tier != "reference":
        for other in outputs[1:-1]:
            assert all(map(torch.equal, outputs[0][own], other[own]))
