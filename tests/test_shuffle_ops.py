"""The shuffles and the pools against torch: they move or select values, so they are equal, in every layout and tier."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as tF
from conftest import check_close, expanded, integers, layouts, significant_strides
from torch import Tensor, nn

from fastblocks import functional as F
from fastblocks.backends.layout import suggests_channels_last

CHANNELS = (1, 3, 24, 58, 116, 144, 232)
SIZES = ((1, 1), (1, 2), (2, 1), (7, 7), (14, 15))
GROUPS = (1, 2, 3, 4, 8)
CL = torch.channels_last


def formats(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.contiguous(), x.contiguous(memory_format=CL)


def halves(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    left, right = nn.ChannelShuffle(groups)(x.contiguous()).chunk(2, 1)
    return left, right


def like(y: Tensor, x: Tensor) -> bool:
    """Whether a tensor has the memory format of an input, and no gaps."""
    kept = torch.empty(y.shape, memory_format=CL if suggests_channels_last(x) else torch.contiguous_format)
    return significant_strides(y) == significant_strides(kept)


def groups_of(channels: int) -> Iterator[int]:
    inverse = {channels // g for g in GROUPS if channels % g == 0}
    yield from (g for g in sorted({*GROUPS, *inverse}) if channels % g == 0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_channel_shuffle(tier: str) -> None:
    for i, (c, (h, w)) in enumerate(itertools.product(CHANNELS, SIZES)):
        for groups in groups_of(c):
            for x in formats(torch.randn(1 + i % 3, c, h, w)):
                y = F.channel_shuffle(x, groups)
                assert torch.equal(y, nn.ChannelShuffle(groups)(x)), (c, h, w, groups)
                assert torch.equal(F.channel_shuffle(y, c // groups), x), (c, h, w, groups)
                assert like(y, x) and y.data_ptr() != x.data_ptr(), (c, h, w, groups)


def test_outputs_that_go_past_the_caches(backend: str) -> None:
    # 17 to 18 MB; outputs of odd widths lie at every alignment, and the last buffer is not full
    for n, c, size in ((33, 174, 28), (31, 58, 50), (22, 1002, 14)):
        for x in formats(torch.randn(n, c, size, size)):
            for groups in (2, 3, c // 2):
                if c % groups:
                    continue
                assert torch.equal(F.channel_shuffle(x, groups), nn.ChannelShuffle(groups)(x)), (c, groups)
                found = F.channel_shuffle_split(x, groups)
                assert all(map(torch.equal, found, halves(x, groups))), (c, groups)
            wide = torch.cat((x, x[:, : c // 2]), 1).contiguous(memory_format=CL)
            for a, b in ((x, x), (wide[:, c // 2 :], x), (x[:, :2], wide[:, : c - 2])):
                groups = 2 if a.shape == b.shape else (a.shape[1] + b.shape[1]) // 2
                joined = halves(torch.cat((a, b), 1), groups)
                assert all(map(torch.equal, F.cat_shuffle_split(a, b, groups), joined)), (c, groups)


def test_channel_shuffle_split(tier: str) -> None:
    for i, (c, (h, w)) in enumerate(itertools.product((2, 6, 24, 58, 116, 144, 232), SIZES)):
        for groups in groups_of(c):
            for x in formats(torch.randn(1 + i % 3, c, h, w)):
                found = F.channel_shuffle_split(x, groups)
                assert len(found) == 2
                for y, want in zip(found, halves(x, groups), strict=True):
                    assert torch.equal(y, want), (c, h, w, groups)
                    assert like(y, x), (c, h, w, groups, y.stride())
                left, right = found
                assert left.untyped_storage().data_ptr() != right.untyped_storage().data_ptr()


def test_cat_shuffle_split(tier: str) -> None:
    pairs = ((1, 1), (1, 3), (3, 1), (12, 12), (29, 29), (58, 58), (24, 120), (116, 116), (57, 1))
    for i, ((a, b), (h, w)) in enumerate(itertools.product(pairs, SIZES)):
        n = 1 + i % 3
        one, two = torch.randn(n, a, h, w), torch.randn(n, b, h, w)
        for groups in groups_of(a + b):
            for first, second in itertools.product(formats(one), formats(two)):
                found = F.cat_shuffle_split(first, second, groups)
                joined = torch.cat((first, second), 1)
                for y, want in zip(found, halves(joined, groups), strict=True):
                    assert torch.equal(y, want), (a, b, h, w, groups)
                    assert like(y, joined), (a, b, h, w, groups, y.stride())


def test_layouts_of_shuffles(tier: str) -> None:
    """Any strides give the same values, in memory of their own, in the input's memory format."""
    for n, c, h, w in ((2, 8, 5, 6), (1, 6, 4, 4), (1, 6, 1, 1), (3, 2, 4, 5), (1, 4, 1, 5)):
        x = torch.randn(n, c, h, w)
        for name, view in [*layouts(x), ("expanded", expanded(x))]:
            note = (tuple(x.shape), name, view.stride())
            before = view.clone()
            y = F.channel_shuffle(view, 2)
            assert torch.equal(y, nn.ChannelShuffle(2)(view.contiguous())), note
            assert like(y, view), (note, y.stride())
            for groups in (1, 2, c):
                for y, want in zip(F.channel_shuffle_split(view, groups), halves(view, groups), strict=True):
                    assert torch.equal(y, want) and like(y, view), (note, groups, y.stride())
            for other, same in [*layouts(before)][::3]:
                joined = torch.cat((view, same), 1)
                for y, want in zip(F.cat_shuffle_split(view, same, 4), halves(joined, 4), strict=True):
                    assert torch.equal(y, want) and like(y, joined), (note, other, y.stride())
            assert torch.equal(view, before), f"{note}: the input was written to"


def test_halves_of_a_chunk_are_shuffled_in_place_of_the_whole(tier: str) -> None:
    """The two halves of one channels_last tensor, as ShuffleNetV2 has them."""
    x = torch.randn(2, 116, 7, 7).contiguous(memory_format=CL)
    left, right = x.chunk(2, 1)
    for y, want in zip(F.cat_shuffle_split(left, right), halves(x, 2), strict=True):
        assert torch.equal(y, want) and y.is_contiguous(memory_format=CL)


def test_shuffles_pass_every_value_through(tier: str) -> None:
    """NaN with its payload, infinities, denormals and negative zeros, bit for bit."""
    special = torch.tensor([0x7FC12345, -0x3FFFFF, 0x7F800000, -0x800000, 1, -0x7FFFFFFF, -0x80000000, 0x3F800000])
    values = special.to(torch.int32).view(torch.float32)
    for c in (6, 34, 58):
        x = values[torch.randint(0, 8, (2, c, 3, 5))]
        for view in formats(x):
            assert same_bits(F.channel_shuffle(view, 2), nn.ChannelShuffle(2)(x))
            for found in (F.channel_shuffle_split(view), F.cat_shuffle_split(*view.chunk(2, 1))):
                assert all(map(same_bits, found, halves(x, 2)))


def test_lazy_negatives(tier: str) -> None:
    x = torch.complex(integers(1, 4, 3, 3), integers(1, 4, 3, 3)).conj().imag
    assert x.is_neg()
    assert torch.equal(F.channel_shuffle(x, 2), nn.ChannelShuffle(2)(x.resolve_neg()))
    assert torch.equal(F.max_pool2d(x, 2), tF.max_pool2d(x.resolve_neg(), 2))


def test_empty_batches(tier: str) -> None:
    for x in formats(torch.empty(0, 8, 5, 6)):
        y = F.channel_shuffle(x, 2)
        assert y.shape == x.shape and y is not x
        assert [y.shape for y in F.channel_shuffle_split(x)] == [(0, 4, 5, 6)] * 2
        assert [y.shape for y in F.cat_shuffle_split(x, x)] == [(0, 8, 5, 6)] * 2
        assert F.max_pool2d(x, 3, 2, 1).shape == F.avg_pool2d(x, 3, 2, 1).shape == (0, 8, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(tier: str, dtype: torch.dtype) -> None:
    x = integers(2, 8, 5, 5).to(dtype)
    y = F.channel_shuffle(x, 2)
    assert y.dtype == dtype and torch.equal(y, nn.ChannelShuffle(2)(x))
    assert [y.dtype for y in (*F.channel_shuffle_split(x), *F.cat_shuffle_split(x, x))] == [dtype] * 4
    assert torch.equal(F.max_pool2d(x, 3, 2, 1), tF.max_pool2d(x, 3, 2, 1))
    assert torch.equal(F.avg_pool2d(x, 2), tF.avg_pool2d(x, 2))


def test_under_vmap_and_autocast(backend: str) -> None:
    x = torch.randn(3, 2, 6, 4, 4)
    for batch in (x, x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)):
        mapped = torch.vmap(lambda t: F.channel_shuffle(t, 3))(batch)
        assert torch.equal(mapped, torch.stack([nn.ChannelShuffle(3)(t.contiguous()) for t in batch]))
        mapped = torch.vmap(lambda t: F.channel_shuffle_split(t, 3)[1])(batch)
        assert torch.equal(mapped, torch.stack([halves(t, 3)[1] for t in batch]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.channel_shuffle(x[0], 2).dtype == torch.float32
        assert F.cat_shuffle_split(x[0], x[0].bfloat16())[0].dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- pools


WINDOWS = (
    (3, 2, 1),
    (2, 2, 0),
    (3, 1, 1),
    (1, 1, 0),
    (2, 3, 1),
    (5, 2, 2),
    ((3, 2), (2, 1), (1, 0)),
    ((1, 3), (1, 2), (0, 1)),
)


def fits(size: tuple[int, int], kernel: int | tuple[int, int], padding: int | tuple[int, int]) -> bool:
    k, p = ((v, v) if isinstance(v, int) else v for v in (kernel, padding))
    return all(n + 2 * b >= a for n, a, b in zip(size, k, p, strict=True))


def test_max_pool(tier: str) -> None:
    sizes = [*SIZES, *itertools.product(range(1, 6), range(1, 6))]
    for i, (size, (kernel, stride, padding)) in enumerate(itertools.product(sizes, WINDOWS)):
        if fits(size, kernel, padding):
            for x in formats(torch.randn(1 + i % 2, CHANNELS[i % len(CHANNELS)], *size) - 3):
                y = F.max_pool2d(x, kernel, stride, padding)
                assert torch.equal(y, tF.max_pool2d(x, kernel, stride, padding)), (x.shape, kernel, stride, padding)
                assert like(y, x), (x.shape, x.stride(), y.stride())


def test_avg_pool(tier: str) -> None:
    sizes = [*SIZES, *itertools.product(range(1, 6), range(1, 6))]
    for i, (size, (kernel, stride, padding)) in enumerate(itertools.product(sizes, WINDOWS)):
        if fits(size, kernel, padding):
            for x in formats(torch.randn(1 + i % 2, CHANNELS[i % len(CHANNELS)], *size) + 2):
                y = F.avg_pool2d(x, kernel, stride, padding)
                note = (x.shape, kernel, stride, padding)
                check_close(y, tF.avg_pool2d, x, kernel, stride, padding, note=note)
                assert like(y, x), (note, x.stride(), y.stride())
                # 900 is a multiple of every window's size
                x = 900 * x.round()
                assert torch.equal(F.avg_pool2d(x, kernel, stride, padding), tF.avg_pool2d(x, kernel, stride, padding))


def test_the_stride_of_a_pool_is_its_kernel_by_default(tier: str) -> None:
    x = integers(2, 5, 9, 8)
    for kernel in (1, 2, 3, (3, 2)):
        assert torch.equal(F.max_pool2d(x, kernel), tF.max_pool2d(x, kernel))
        assert torch.equal(F.avg_pool2d(36 * x, kernel), tF.avg_pool2d(36 * x, kernel))


def test_layouts_of_pools(tier: str) -> None:
    for n, c, h, w in ((2, 8, 5, 6), (1, 3, 4, 4), (1, 6, 1, 1), (3, 1, 4, 5), (1, 4, 1, 5)):
        x = 9 * integers(n, c, h, w)
        for name, view in [*layouts(x), ("expanded", expanded(x))]:
            note = (tuple(x.shape), name, view.stride())
            before = view.clone()
            for ours, torchs in ((F.max_pool2d, tF.max_pool2d), (F.avg_pool2d, tF.avg_pool2d)):
                y, z = ours(view, 3, 2, 1), torchs(view, 3, 2, 1)
                assert torch.equal(y, z), note
                assert significant_strides(y) == significant_strides(z), (note, y.stride(), z.stride())
            assert torch.equal(view, before), f"{note}: the input was written to"


def test_nan_and_infinity_in_every_place_of_a_window(tier: str) -> None:
    """As torch: a NaN wins wherever it stands, and padding never does."""
    for c in (1, 5, 16, 37):
        for value in (float("nan"), float("inf"), -float("inf")):
            for fill in (0.5, -float("inf")):
                x = torch.full((1, c, 5, 5), fill)
                for i in range(c):
                    x[0, i, i % 5, i // 5 % 5] = value
                for view in formats(x):
                    for ours, torchs in ((F.max_pool2d, tF.max_pool2d), (F.avg_pool2d, tF.avg_pool2d)):
                        found, want = ours(view, 3, 2, 1), torchs(view, 3, 2, 1)
                        torch.testing.assert_close(found, want, rtol=1e-6, atol=0, equal_nan=True)
