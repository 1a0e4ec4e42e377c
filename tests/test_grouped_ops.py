"""Grouped 1x1 convolutions with and without a shuffle, against plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from conftest import check_close, expanded, integer_record, integers, layouts, record, significant_strides, stock
from torch import Tensor, nn

from fastblocks import functional as F
from fastblocks.functional import ConvBN
from fastblocks.functional.shapes import FAKES

CHANNELS = (1, 3, 24, 58, 116, 144, 232)
SIZES = ((1, 1), (1, 2), (2, 1), (7, 7), (14, 15))
ACTIVATIONS = (None, "relu", "relu6")
CL = torch.channels_last


def some_format(x: Tensor, i: int) -> Tensor:
    return x.contiguous(memory_format=CL) if i % 3 else x


def grouped(
    x: Tensor, conv: ConvBN, *, groups: int, shuffle: int, activation: str | None, residual: Tensor | None
) -> Tensor:
    y = stock(x, conv, groups)
    y = stock(y if residual is None else y + residual, identity(y.shape[1], y.dtype), y.shape[1], activation)
    return nn.ChannelShuffle(shuffle)(y)


def identity(channels: int, dtype: torch.dtype) -> ConvBN:
    return ConvBN(torch.ones(channels, 1, 1, 1, dtype=dtype))


def test_grouped_pointwise(tier: str) -> None:
    shapes = (
        *((1, c, k) for c, k in ((1, 3), (3, 1), (24, 58), (58, 24), (116, 58), (232, 144))),
        *((2, c, k) for c, k in ((2, 2), (24, 58), (50, 200), (200, 50), (116, 232))),
        *((3, c, k) for c, k in ((3, 3), (24, 60), (60, 240), (240, 60), (144, 3))),
        *((4, c, k) for c, k in ((4, 8), (24, 68), (68, 272), (272, 68), (116, 232))),
        *((8, c, k) for c, k in ((8, 8), (24, 96), (96, 384), (384, 96), (232, 8))),
        (58, 58, 116),
        (7, 14, 21),
    )
    for i, ((groups, c, k), (h, w)) in enumerate(itertools.product(shapes, SIZES)):
        conv = record(k, c // groups, bias=i % 4 == 0, bn=i % 5 > 0)
        n = 1 + i % 3
        x = some_format(torch.randn(n, c, h, w), i)
        residual = some_format(torch.randn(n, k, h, w), i // 2) if i % 5 < 2 else None
        for shuffle in {1, groups, k}:
            kwargs: dict[str, Any] = {
                "groups": groups,
                "shuffle": shuffle,
                "activation": ACTIVATIONS[i % 3],
                "residual": residual,
            }
            y = F.grouped_pointwise_conv_bn_act(x, conv, **kwargs)
            check_close(y, grouped, x, conv, **kwargs, note=(n, c, k, h, w, groups, shuffle))


def test_grouped_whole_numbers_are_exact(tier: str) -> None:
    for groups, fan, out in itertools.product((1, 2, 3, 4, 8), (1, 2, 5, 8, 17, 33), (1, 3, 6, 16, 19)):
        c, k = groups * fan, groups * out
        conv, image = integer_record(k, fan, bias=True), integers(2, c, 3, 5)
        residual = integers(2, k, 3, 5)
        for x in (image, image.contiguous(memory_format=CL)):
            for shuffle in {1, groups, out, k}:
                y = F.grouped_pointwise_conv_bn_act(
                    x, conv, groups=groups, shuffle=shuffle, activation="relu", residual=residual
                )
                want = nn.ChannelShuffle(shuffle)(torch.relu(stock(x, conv, groups) + residual))
                assert torch.equal(y, want), (groups, fan, out, shuffle)


def test_more_than_one_step(tier: str) -> None:
    """Pixels and panels beyond what a step makes at a time, in items of every kind, some with a smaller last step."""
    shapes = ((1, 4, 1500), (2, 5, 400), (2, 5, 393), (3, 4, 331), (4, 6, 150), (8, 3, 200), (8, 13, 9), (30, 2, 25))
    former = torch.get_num_threads()
    try:
        for (groups, fan, out), (n, h, w) in itertools.product(
            shapes, ((1, 7, 7), (1, 9, 11), (2, 13, 15), (3, 14, 14))
        ):
            conv = integer_record(groups * out, fan, bias=True)
            x = integers(n, groups * fan, h, w).contiguous(memory_format=CL)
            want = torch.relu(stock(x, conv, groups))
            residual = integers(*want.shape)
            for threads, shuffle in itertools.product((1, 2, 3), sorted({1, groups, out})):
                torch.set_num_threads(threads)
                y = F.grouped_pointwise_conv_bn_act(x, conv, groups=groups, shuffle=shuffle, activation="relu")
                assert torch.equal(y, nn.ChannelShuffle(shuffle)(want)), (groups, fan, out, n, h, w, threads, shuffle)
            y = F.grouped_pointwise_conv_bn_act(x, conv, groups=groups, shuffle=groups, residual=residual)
            assert torch.equal(y, nn.ChannelShuffle(groups)(stock(x, conv, groups) + residual))
    finally:
        torch.set_num_threads(former)


def test_results_beyond_the_caches(tier: str) -> None:
    """Where so much is written, the last groups fetch the lines that it goes to."""
    for groups, fan, out in ((2, 3, 99), (3, 5, 66), (8, 12, 48)):
        conv = integer_record(groups * out, fan, bias=True)
        x = integers(3, groups * fan, 31, 31).contiguous(memory_format=CL)
        y = F.grouped_pointwise_conv_bn_act(x, conv, groups=groups, shuffle=groups, activation="relu")
        assert y.numel() > 1 << 19
        assert torch.equal(y, nn.ChannelShuffle(groups)(torch.relu(stock(x, conv, groups))))


def test_the_residual_comes_before_the_shuffle(backend: str) -> None:
    x = torch.zeros(1, 4, 1, 1)
    conv = ConvBN(torch.zeros(4, 2, 1, 1))
    y = F.grouped_pointwise_conv_bn_act(x, conv, groups=2, shuffle=2, residual=torch.arange(4.0).view(1, 4, 1, 1))
    assert y.flatten().tolist() == [0, 2, 1, 3]


def test_groups_see_their_own_channels_alone(tier: str) -> None:
    """A NaN in one group's input reaches no other group's output."""
    for groups, fan, out in ((2, 5, 3), (3, 8, 20), (4, 17, 9), (8, 1, 1)):
        conv = record(groups * out, fan)
        for bad in range(groups):
            x = torch.ones(1, groups * fan, 2, 3)
            x[:, bad * fan : (bad + 1) * fan] = float("nan")
            for view in (x, x.contiguous(memory_format=CL)):
                y = F.grouped_pointwise_conv_bn_act(view, conv, groups=groups)
                found = y.isnan().all(3).all(2).view(groups, out).all(1)
                assert found.tolist() == [g == bad for g in range(groups)] and y.isnan().sum() == out * 6


def test_grouped_layouts(tier: str) -> None:
    for n, c, h, w in ((2, 8, 5, 6), (1, 6, 4, 4), (1, 6, 1, 1), (3, 2, 4, 5), (1, 4, 1, 5)):
        conv, image = integer_record(10, c // 2), integers(n, c, h, w)
        for name, x in [*layouts(image), ("expanded", expanded(image))]:
            before = x.clone()
            residual = integers(x.shape[0], 10, h, w)
            for (other, same), shuffle in itertools.product([*layouts(residual)][::4], (1, 2, 5)):
                note = (tuple(x.shape), name, x.stride(), other, shuffle)
                y = F.grouped_pointwise_conv_bn_act(x, conv, groups=2, shuffle=shuffle, residual=same)
                assert torch.equal(y, nn.ChannelShuffle(shuffle)(stock(x.contiguous(), conv, 2) + residual)), note
                promised = FAKES["grouped_pointwise_conv_bn_act"](x, conv[:6], 0.0, 2, shuffle, None, same)
                assert significant_strides(y) == significant_strides(promised), (note, y.stride())
            assert torch.equal(x, before), f"{name}: the input was written to"
