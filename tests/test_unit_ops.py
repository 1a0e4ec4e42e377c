"""The blocks of MobileNet, ShuffleNet and ShuffleNetV2 against plain torch.

Near to float64 truth on real numbers, equal on whole numbers, in every layout and tier.
"""

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
)
from test_grouped_ops import ACTIVATIONS, CHANNELS, CL, SIZES, grouped, some_format
from torch import Tensor, nn

from fastblocks import functional as F
from fastblocks.functional import ConvBN
from fastblocks.functional.shapes import FAKES


def strides_of(name: str, *args: Any) -> list[int]:
    """The strides that an op's fake kernel promises."""
    return significant_strides(FAKES[name](*args))


# The ops once more, out of torch's own functions. In each, the record's order is that of the op's arguments.


def separable(
    x: Tensor, depthwise: ConvBN, pointwise: ConvBN, *, stride: int, padding: int, activation: str | None
) -> Tensor:
    y = stock(x, depthwise, x.shape[1], activation, stride=stride, padding=padding)
    return stock(y, pointwise, 1, activation)


def unit(
    x: Tensor,
    compress: ConvBN,
    depthwise: ConvBN,
    expand: ConvBN,
    *,
    stride: int,
    groups: int,
    activation: str | None = "relu",
) -> Tensor:
    first = x.shape[1] // compress.weight.shape[1]
    assert first in (1, groups)
    y = nn.ChannelShuffle(groups)(stock(x, compress, first, activation))
    y = stock(y, depthwise, y.shape[1], None, stride=stride, padding=depthwise.weight.shape[2] // 2)
    y = stock(y, expand, groups)
    act = {None: lambda t: t, "relu": torch.relu, "relu6": tF.relu6}[activation]
    return act(x + y) if stride == 1 else torch.cat((nn.AvgPool2d(3, 2, 1)(x), act(y)), 1)


def unit_v2(
    x: Tensor,
    pointwise1: ConvBN,
    depthwise: ConvBN,
    pointwise2: ConvBN,
    *,
    left_depthwise: ConvBN | None = None,
    left_pointwise: ConvBN | None = None,
    stride: int = 1,
    activation: str | None = "relu",
) -> Tensor:
    def half(y: Tensor, conv: ConvBN) -> Tensor:
        return stock(y, conv, y.shape[1], None, stride=stride, padding=conv.weight.shape[2] // 2)

    if left_depthwise is None or left_pointwise is None:
        left, right = x.chunk(2, 1)
    else:
        left, right = stock(half(x, left_depthwise), left_pointwise, 1, activation), x
    right = stock(half(stock(right, pointwise1, 1, activation), depthwise), pointwise2, 1, activation)
    return nn.ChannelShuffle(2)(torch.cat((left, right), 1))


# ----------------------------------------------------------------------------------------------------------- separable


def test_depthwise_separable(tier: str) -> None:
    cases = itertools.product(CHANNELS, SIZES, ((3, 1), (3, 2), (5, 1), (5, 3), (1, 1)))
    for i, (c, (h, w), (kernel, stride)) in enumerate(cases):
        records = record(c, 1, kernel, bias=i % 4 == 0), record((7, 32, 58, 116)[i % 4], c, bn=i % 7 > 0)
        x = some_format(torch.randn(1 + i % 2, c, h, w), i)
        kwargs: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "activation": ACTIVATIONS[i % 3]}
        y = F.depthwise_separable(x, *records, **kwargs)
        check_close(y, separable, x, *records, **kwargs, note=(x.shape, kernel, kwargs))


def test_depthwise_separable_geometry_is_exact(tier: str) -> None:
    for k, padding, stride, (h, w) in itertools.product((1, 3, 5), (0, 1, 2, 4), (1, 2, 3), ((1, 2), (5, 4), (9, 8))):
        if min(h, w) + 2 * padding >= k:
            d, p = integer_record(19, 1, k), integer_record(5, 19)
            for x in layouts(integers(2, 19, h, w)) if k == 3 and padding == 1 else [("", integers(2, 19, h, w))]:
                y = F.depthwise_separable(x[1], d, p, stride=stride, padding=padding, activation="relu6")
                z = separable(x[1], d, p, stride=stride, padding=padding, activation="relu6")
                assert torch.equal(y, z), (k, padding, stride, h, w, x[0])
                assert significant_strides(y) == significant_strides(z), (x[0], y.stride(), z.stride())
    x = integers(1, 19, 5, 5)
    assert torch.equal(F.depthwise_separable(x, d, p), separable(x, d, p, stride=1, padding=2, activation="relu6"))


# ---------------------------------------------------------------------------------------------------------- ShuffleNet


def unit_records(
    c: int, out: int, bottleneck: int, groups: int, *, whole: bool = False, k: int = 3, exact: bool
) -> Any:
    make: Any = integer_record if exact else record
    return (
        make(bottleneck, c if whole else c // groups),
        make(bottleneck, 1, k),
        make(out, bottleneck // groups),
    )


def test_shuffle_unit(tier: str) -> None:
    shapes = (
        *((1, c, 36) for c in (1, 3, 58, 144)),
        *((2, c, 50) for c in (2, 24, 58, 200)),
        *((3, c, 60) for c in (3, 24, 144, 240)),
        *((4, c, 68) for c in (4, 24, 116, 272)),
        *((8, c, 96) for c in (8, 24, 232, 384)),
        (2, 58, 2),
        (3, 24, 3),
    )
    for i, ((groups, c, wide), (h, w)) in enumerate(itertools.product(shapes, SIZES)):
        x = some_format(torch.randn(1 + i % 3, c, h, w), i)
        for stride in (1, 2):
            out = c if stride == 1 else groups * (i % 7 + 1)
            records = unit_records(c, out, wide, groups, whole=i % 2 == 1, exact=False)
            kwargs: dict[str, Any] = {"stride": stride, "groups": groups, "activation": ACTIVATIONS[i % 3]}
            y = F.shuffle_unit(x, *records, **kwargs)
            check_close(y, unit, x, *records, **kwargs, note=(x.shape, wide, kwargs))


def test_the_first_unit_of_a_stage(tier: str) -> None:
    """As ShuffleNet has them: 24 channels to the stage's width at stride 2, the compression not grouped."""
    for groups, width in ((1, 144), (2, 200), (3, 240), (4, 272), (8, 384)):
        x = torch.randn(1, 24, 15, 14).contiguous(memory_format=CL)
        records = unit_records(24, width - 24, width // 4, groups, whole=True, exact=False)
        y = F.shuffle_unit(x, *records, stride=2, groups=groups)
        assert y.shape == (1, width, 8, 7) and y.is_contiguous(memory_format=CL)
        check_close(y, unit, x, *records, stride=2, groups=groups, note=groups)


def test_shuffle_unit_whole_numbers_are_exact(tier: str) -> None:
    cases = itertools.product((1, 2, 3, 4, 8), (1, 2), ((1, 1), (1, 4), (5, 2), (7, 8)), (1, 3, 5), (False, True))
    for i, (groups, stride, (h, w), k, whole) in enumerate(cases):
        c, wide = groups * (3 + i % 5), groups * (1 + i % 7)
        records = unit_records(c, c if stride == 1 else groups * 2, wide, groups, whole=whole, k=k, exact=True)
        image = 9 * integers(2, c, h, w)
        for x in (image, image.contiguous(memory_format=CL)):
            y = F.shuffle_unit(x, *records, stride=stride, groups=groups, activation="relu6")
            z = unit(x, *records, stride=stride, groups=groups, activation="relu6")
            assert torch.equal(y, z), (groups, c, wide, stride, h, w, k, whole)


def test_shuffle_unit_layouts(tier: str) -> None:
    for n, c, h, w in ((2, 6, 5, 6), (1, 6, 4, 4), (1, 6, 1, 1), (3, 2, 4, 5), (1, 4, 1, 5)):
        image = 9 * integers(n, c, h, w)
        for stride in (1, 2):
            records = unit_records(c, c if stride == 1 else 8, 10, 2, exact=True)
            for name, x in [*layouts(image), ("expanded", expanded(image))]:
                before = x.clone()
                y = F.shuffle_unit(x, *records, stride=stride, groups=2, activation="relu6")
                note = (tuple(x.shape), name, x.stride(), stride)
                want = unit(x.contiguous(), *records, stride=stride, groups=2, activation="relu6")
                assert torch.equal(y, want), note
                promised = strides_of("shuffle_unit", x, *(r[:6] for r in records), [0.0] * 3, stride, 2, None)
                assert significant_strides(y) == promised, (note, y.stride(), promised)
                assert torch.equal(x, before), f"{note}: the input was written to"


# -------------------------------------------------------------------------------------------------------- ShuffleNetV2


def v2_records(c: int, wide: int, out: int, stride: int, *, k: int = 3, left_k: int = 3, exact: bool) -> Any:
    make: Any = integer_record if exact else record
    fan = c if stride == 2 else c // 2
    right = make(wide, fan), make(wide, 1, k), make(out, wide)
    left = {"left_depthwise": make(c, 1, left_k), "left_pointwise": make(out, c)}
    return right, left if stride == 2 else {}


def test_shuffle_unit_v2(tier: str) -> None:
    for i, (c, (h, w), stride) in enumerate(itertools.product((2, 6, 24, 48, 116, 232), SIZES, (1, 2))):
        out = c // 2 if stride == 1 else (1, 3, 24, 58)[i % 4]
        right, left = v2_records(c, (c // 2, 1, 58, 33)[i % 4], out, stride, exact=False)
        x = some_format(torch.randn(1 + i % 3, c, h, w), i)
        kwargs: dict[str, Any] = {"stride": stride, "activation": ACTIVATIONS[i % 3], **left}
        y = F.shuffle_unit_v2(x, *right, **kwargs)
        check_close(y, unit_v2, x, *right, **kwargs, note=(x.shape, out, stride))
    for c in (1, 3, 58):
        x = some_format(torch.randn(2, c, 7, 6), c)
        right, left = v2_records(c, 58, 58, 2, exact=False)
        y = F.shuffle_unit_v2(x, *right, stride=2, **left)
        check_close(y, unit_v2, x, *right, stride=2, **left, note=c)


def test_shuffle_unit_v2_whole_numbers_are_exact(tier: str) -> None:
    cases = itertools.product((2, 10, 34, 66), (1, 2), ((1, 1), (1, 4), (5, 2), (7, 8)), (1, 3, 5), (1, 3))
    for i, (c, stride, (h, w), k, left_k) in enumerate(cases):
        out = c // 2 if stride == 1 else 1 + i % 9
        right, left = v2_records(c, 1 + i % 23, out, stride, k=k, left_k=left_k, exact=True)
        image = integers(2, c, h, w)
        for x in (image, image.contiguous(memory_format=CL)):
            y = F.shuffle_unit_v2(x, *right, stride=stride, activation="relu6", **left)
            z = unit_v2(x, *right, stride=stride, activation="relu6", **left)
            assert torch.equal(y, z), (c, stride, h, w, k, left_k)


def test_shuffle_unit_v2_layouts(tier: str) -> None:
    for n, c, h, w in ((2, 6, 5, 6), (1, 6, 4, 4), (1, 6, 1, 1), (3, 2, 4, 5), (1, 4, 1, 5)):
        image = integers(n, c, h, w)
        for stride in (1, 2):
            right, left = v2_records(c, 9, c // 2, stride, exact=True)
            records = [*left.values(), *right] if left else [(), (), *right]
            for name, x in [*layouts(image), ("expanded", expanded(image))]:
                before = x.clone()
                y = F.shuffle_unit_v2(x, *right, stride=stride, activation="relu6", **left)
                note = (tuple(x.shape), name, x.stride(), stride)
                want = unit_v2(x.contiguous(), *right, stride=stride, activation="relu6", **left)
                assert torch.equal(y, want), note
                promised = strides_of("shuffle_unit_v2", x, *(r[:6] for r in records), [0.0] * 5, stride, None)
                # of a half of one channel, torch's own functions may choose either format
                if tier != "reference":
                    assert significant_strides(y) == promised, (note, y.stride(), promised)
                assert torch.equal(x, before), f"{note}: the input was written to"


# ---------------------------------------------------------------------------------------------------------- all of them


def test_channels_last_weights_make_channels_last_outputs(tier: str) -> None:
    x = integers(2, 8, 5, 5)

    def last(conv: ConvBN) -> ConvBN:
        weight = torch.empty(conv.weight.shape, memory_format=CL).copy_(conv.weight)
        return conv._replace(weight=weight)

    conv, d, p = integer_record(6, 4), integer_record(8, 1, 3), integer_record(6, 8)
    for shuffle in (1, 2):
        y = F.grouped_pointwise_conv_bn_act(x, last(conv), groups=2, shuffle=shuffle)
        assert y.is_contiguous(memory_format=CL) and not y.is_contiguous()
        assert torch.equal(y, F.grouped_pointwise_conv_bn_act(x, conv, groups=2, shuffle=shuffle))
    for y in (F.depthwise_separable(x, d, last(p)), F.depthwise_separable(x, last(d), p)):
        assert y.is_contiguous(memory_format=CL) and torch.equal(y, F.depthwise_separable(x, d, p))
    for stride in (1, 2):
        records = unit_records(8, 8, 4, 2, exact=True)
        y = F.shuffle_unit(x, *map(last, records), stride=stride, groups=2)
        assert torch.equal(y, F.shuffle_unit(x, *records, stride=stride, groups=2))
        want = strides_of("shuffle_unit", x, *(last(r)[:6] for r in records), [0.0] * 3, stride, 2, None)
        assert significant_strides(y) == want
        right, left = v2_records(8, 5, 4, stride, exact=True)
        y = F.shuffle_unit_v2(x, *map(last, right), stride=stride, **{k: last(r) for k, r in left.items()})
        assert torch.equal(y, F.shuffle_unit_v2(x, *right, stride=stride, **left))
        every = [*left.values(), *right] if left else [(), (), *right]
        promised = (last(r)[:6] if r else r for r in every)
        assert significant_strides(y) == strides_of("shuffle_unit_v2", x, *promised, [0.0] * 5, stride, None)


def test_empty_batches(tier: str) -> None:
    for x in (torch.empty(0, 8, 5, 6), torch.empty(0, 8, 5, 6).contiguous(memory_format=CL)):
        assert F.grouped_pointwise_conv_bn_act(x, record(6, 4), groups=2, shuffle=3).shape == (0, 6, 5, 6)
        assert F.depthwise_separable(x, record(8, 1, 3), record(7, 8), stride=2).shape == (0, 7, 3, 3)
        for stride, shape in ((1, (0, 8, 5, 6)), (2, (0, 16, 3, 3))):
            y = F.shuffle_unit(x, *unit_records(8, 8, 4, 2, exact=False), stride=stride, groups=2)
            assert y.shape == shape
            right, left = v2_records(8, 5, 4 * stride, stride, exact=False)
            assert F.shuffle_unit_v2(x, *right, stride=stride, **left).shape == shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity(tier: str, activation: str | None) -> None:
    """As torch's forward, wherever they stand."""
    for c in (2, 10, 34):
        for value in (float("nan"), float("inf"), -float("inf")):
            x = torch.full((1, c, 3, c), 0.5)
            for i in range(c):
                x[0, i, 1, i] = value
            for view in (x, x.contiguous(memory_format=CL)):
                one, three = ConvBN(torch.ones(c, 1, 1, 1)), ConvBN(torch.ones(c, 1, 3, 3))
                eye = ConvBN(torch.eye(c)[:, :, None, None].contiguous())
                half = ConvBN(torch.eye(c // 2)[:, :, None, None].contiguous())
                small = ConvBN(torch.ones(c // 2, 1, 3, 3))
                thin = ConvBN(torch.ones(c, 1, 1, 1))
                kwargs: dict[str, Any] = {"stride": 1, "groups": c, "activation": activation}
                full: dict[str, Any] = {"groups": c, "shuffle": 2, "activation": activation, "residual": None}
                plain: dict[str, Any] = {"stride": 1, "padding": 1, "activation": activation}
                for y, z in (
                    (F.grouped_pointwise_conv_bn_act(view, one, **full), grouped(view, one, **full)),
                    (F.depthwise_separable(view, three, eye, **plain), separable(view, three, eye, **plain)),
                    (F.shuffle_unit(view, thin, three, thin, **kwargs), unit(view, thin, three, thin, **kwargs)),
                    (
                        F.shuffle_unit_v2(view, half, small, half, activation=activation),
                        unit_v2(view, half, small, half, activation=activation),
                    ),
                ):
                    torch.testing.assert_close(y, z, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_in_their_own_precision(tier: str, dtype: torch.dtype) -> None:
    x = integers(2, 8, 5, 5).to(dtype)

    def cast(conv: ConvBN) -> ConvBN:
        return ConvBN(*(v.to(dtype) if isinstance(v, Tensor) else v for v in conv))

    conv = cast(integer_record(6, 4))
    y = F.grouped_pointwise_conv_bn_act(x, conv, groups=2, shuffle=3)
    assert y.dtype == dtype and torch.equal(y, nn.ChannelShuffle(3)(stock(x, conv, 2)))
    records = [cast(r) for r in unit_records(8, 8, 4, 2, exact=True)]
    assert torch.equal(F.shuffle_unit(x, *records, groups=2), unit(x, *records, stride=1, groups=2))


def test_odd_weights_and_vectors(tier: str) -> None:
    """Weights and BatchNorm vectors may be views with gaps."""
    x = integers(2, 6, 5, 5)
    conv = integer_record(8, 3)
    gaps = ConvBN(
        conv.weight.repeat_interleave(2, 1)[:, ::2], None, *(v.repeat_interleave(3)[::3] for v in conv[2:6]), 0
    )
    assert torch.equal(F.grouped_pointwise_conv_bn_act(x, gaps, groups=2), stock(x, conv, 2))
    d, p = integer_record(6, 1, 3), integer_record(8, 6)
    bare = p._replace(weight=torch.ones(1, 1, 1, 1).expand(8, 6, 1, 1))
    want = separable(x, d, bare, stride=1, padding=1, activation="relu6")
    assert torch.equal(F.depthwise_separable(x, d, bare), want)


def test_repeated_runs_are_equal_bit_for_bit_at_any_thread_count(tier: str) -> None:
    if tier == "reference":
        pytest.skip("torch's own kernels")
    x = torch.randn(2, 24, 30, 30)
    records = unit_records(24, 24, 60, 3, exact=False)
    right, left = v2_records(24, 58, 58, 2, exact=False)
    conv, d, p = record(60, 8), record(24, 1, 3), record(58, 24)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            with running(tier):
                outputs.append(
                    (
                        F.grouped_pointwise_conv_bn_act(x, conv, groups=3, shuffle=3),
                        F.depthwise_separable(x, d, p),
                        F.shuffle_unit(x, *records),
                        F.shuffle_unit(x, *records, stride=2),
                        F.shuffle_unit_v2(x, *right, stride=2, **left),
                        F.avg_pool2d(x, 3, 2, 1),
                    )
                )
    finally:
        torch.set_num_threads(threads)
    for other in outputs[1:]:
        assert all(map(torch.equal, outputs[0], other))
