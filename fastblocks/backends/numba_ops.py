"""The numba tier: float32 tensors on the CPU. Products are torch's; what is around them are compiled loops.

Arguments were checked in ``fastblocks.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.backends import reference
from fastblocks.backends.layout import output_memory_format, suggests_channels_last
from fastblocks.backends.numba_kernels import global_mean
from fastblocks.backends.numba_maps import Map, empty_map, output, read, read_even, room, scratch, shuffle_order, whole
from fastblocks.backends.numba_passes import (
    CLAMPS,
    FREE,
    Conv,
    Folded,
    Pair,
    ring_floats,
    run_depthwise,
    run_finish,
    run_permute,
    run_pool,
    run_product,
    spatial,
)
from fastblocks.backends.numba_pool import run

__all__ = ["TABLE"]

CHUNK = 1 << 21
"""Floats of a tensor between two convolutions of a block: images are taken together up to so many, to stay in cache."""

_LARGEST_RING = 1 << 24
_ONE = (1, 1)


def _torch_conv(
    input: Tensor,
    conv: Conv,
    eps: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str | None,
) -> Tensor:
    """Torch's convolution, and the rest in one pass over its output."""
    weight: Any = conv[0]
    last = output_memory_format(input, weight) is torch.channels_last
    z = F.conv2d(input, weight, None, stride, padding, dilation, groups)  # type: ignore[arg-type]
    folded = Folded((conv,), (eps,))
    m = read_even(z)
    if m.pixels and m.c:
        run_finish(m, folded.scale(0), folded.shift(0), activation, m)
    y = m.tensor()
    form = torch.channels_last if last else torch.contiguous_format
    return y if y.is_contiguous(memory_format=form) else torch.empty(y.shape, memory_format=form).copy_(y)


def conv_bn_act(
    input: Tensor, conv: Conv, eps: float, stride: Pair, padding: Pair, dilation: Pair, activation: str | None
) -> Tensor:
    """Dense convolution, BatchNorm with running statistics, activation."""
    return _torch_conv(input, conv, eps, stride, padding, dilation, 1, activation)


def _formats(input: Tensor, *convs: Conv) -> bool:
    """Whether convolutions one after the other give a channels_last output."""
    return suggests_channels_last(input) or any(suggests_channels_last(conv[0]) for conv in convs)  # type: ignore[arg-type]


def pointwise_conv_bn_act(
    input: Tensor, conv: Conv, eps: float, activation: str | None, residual: Tensor | None
) -> Tensor:
    """1x1 convolution, BatchNorm with running statistics, residual, activation, in this order."""
    return grouped_pointwise_conv_bn_act(input, conv, eps, 1, 1, activation, residual)


def grouped_pointwise_conv_bn_act(
    input: Tensor, conv: Conv, eps: float, groups: int, shuffle: int, activation: str | None, residual: Tensor | None
) -> Tensor:
    """Grouped 1x1 convolution, BatchNorm, residual, activation, and then a shuffle of the output's channels."""
    x = read_even(input)
    to = empty_map(x.n, x.h, x.w, conv[0].shape[0])  # type: ignore[union-attr]
    if to.pixels:
        folded = Folded((conv,), (eps,))
        _pointwise(
            x, conv, groups, folded, 0, activation, to, None if residual is None else read_even(residual), shuffle
        )
    return output(to, _formats(input, conv))


def _pointwise(
    x: Map, conv: Conv, groups: int, folded: Folded, index: int, activation: str | None, to: Map,
    residual: Map | None = None, shuffle: int = 1,
) -> None:  # fmt: skip
    run_product(x, conv[0], groups, to)  # type: ignore[arg-type]
    run_finish(to, folded.scale(index), folded.shift(index), activation, to, residual, shuffle)


def _fits_ring(input: Tensor, weight: Tensor, padding: Pair, dilation: Pair) -> bool:
    return ring_floats(input.shape[3], input.shape[1], weight.shape[2:], padding, dilation) <= _LARGEST_RING


def depthwise_conv_bn_act(
    input: Tensor, conv: Conv, eps: float, stride: Pair, padding: Pair, dilation: Pair, activation: str | None
) -> Tensor:
    """Depthwise convolution, BatchNorm with running statistics, activation."""
    weight: Any = conv[0]
    if not _fits_ring(input, weight, padding, dilation):
        return _torch_conv(input, conv, eps, stride, padding, dilation, weight.shape[0], activation)
    x = read(input)
    h, w = (spatial(*sizes) for sizes in zip((x.h, x.w), weight.shape[2:], stride, padding, dilation, strict=True))
    to = empty_map(x.n, h, w, x.c)
    if to.pixels:
        folded = Folded((conv,), (eps,))
        clamps = CLAMPS[activation]
        run_depthwise(
            x, weight, to, stride, padding, dilation, scale=folded.scale(0), start=folded.shift(0), clamps=clamps
        )
    return output(to, _formats(input, conv))


class _Branch:
    """1x1 (unless there is none), depthwise, 1x1, from images to images, a few at a time."""

    def __init__(
        self, first: Conv, depthwise: Conv, last: Conv, eps: Sequence[float], stride: int, padding: int, *,
        activations: Sequence[str | None], groups: Sequence[int] = (1, 1), shuffle: int = 1, slot: str = "branch",
    ) -> None:  # fmt: skip
        self.first, self.depthwise, self.last = first, depthwise, last
        self.stride, self.padding = (stride, stride), (padding, padding)
        self.activations, self.groups = activations, groups
        convs = [conv for conv in (first, depthwise, last) if conv]
        self.folded = Folded(convs, eps[-len(convs) :], slot)
        self.order = shuffle_order(depthwise[0].shape[0], shuffle).data_ptr() if shuffle > 1 else 0  # type: ignore[union-attr]

    def size(self, x: Map) -> tuple[int, int]:
        """Height and width of the output."""
        kernel = self.depthwise[0].shape[2:]  # type: ignore[union-attr]
        h, w = (spatial(s, k, self.stride[0], self.padding[0]) for s, k in zip((x.h, x.w), kernel, strict=True))
        return h, w

    def run(self, x: Map, to: Map, residual: Map | None = None, last_activation: bool = True) -> None:
        """From a map with even pixels."""
        weight: Any = self.depthwise[0]
        hidden = weight.shape[0]
        step = max(1, CHUNK // max(x.h * x.w * hidden, 1))
        index = int(bool(self.first))
        for i in range(0, x.n, step):
            j = min(x.n, i + step)
            source = x.images(i, j)
            normed, clamps = (0, 0), FREE
            if self.first:
                a = whole(scratch("expanded", source.pixels * hidden), j - i, x.h, x.w, hidden)
                run_product(source, self.first[0], self.groups[0], a)  # type: ignore[arg-type]
                normed, clamps = (self.folded.scale(0), self.folded.shift(0)), CLAMPS[self.activations[0]]
                source = a
            z = whole(scratch("hidden", (j - i) * to.h * to.w * hidden), j - i, to.h, to.w, hidden)
            run_depthwise(
                source, weight, z, self.stride, self.padding, _ONE, scale=self.folded.scale(index),
                start=self.folded.shift(index), clamps=CLAMPS[self.activations[1]], normed=normed, in_clamps=clamps,
                order=self.order,
            )  # fmt: skip
            added = None if residual is None else residual.images(i, j)
            part = to.images(i, j)
            even = (
                part if part.pixel == part.c else whole(scratch("last", part.pixels * part.c), j - i, to.h, to.w, to.c)
            )
            run_product(z, self.last[0], self.groups[1], even)  # type: ignore[arg-type]
            run_finish(
                even, self.folded.scale(index + 1), self.folded.shift(index + 1), self.activations[2], part, added
            )


def inverted_residual(
    input: Tensor, expand: Conv, depthwise: Conv, project: Conv, eps: Sequence[float], stride: int, padding: int,
    activation: str | None, residual: bool,
) -> Tensor:  # fmt: skip
    """Expand (unless `expand` is empty), depthwise, project, and the sum with the input."""
    branch = _Branch(expand, depthwise, project, eps, stride, padding, activations=(activation, activation, None))
    x = read_even(input)
    to = empty_map(x.n, *branch.size(x), project[0].shape[0])  # type: ignore[union-attr]
    if to.pixels:
        branch.run(x, to, x if residual else None)
    return output(to, _formats(input, *(conv for conv in (expand, depthwise, project) if conv)))


def depthwise_separable(
    input: Tensor, depthwise: Conv, pointwise: Conv, eps: Sequence[float], stride: int, padding: int,
    activation: str | None,
) -> Tensor:  # fmt: skip
    """Depthwise and 1x1 convolution, each with BatchNorm and activation."""
    branch = _Branch((), depthwise, pointwise, eps, stride, padding, activations=(None, activation, activation))
    x = read(input)
    to = empty_map(x.n, *branch.size(x), pointwise[0].shape[0])  # type: ignore[union-attr]
    if to.pixels:
        branch.run(x, to)
    return output(to, _formats(input, depthwise, pointwise))


def shuffle_unit(
    input: Tensor, compress: Conv, depthwise: Conv, expand: Conv, eps: Sequence[float], stride: int, groups: int,
    activation: str | None,
) -> Tensor:  # fmt: skip
    """ShuffleNet's unit: grouped 1x1, shuffle, depthwise, grouped 1x1; then the sum or the concatenation."""
    x = read_even(input)
    whole_first = compress[0].shape[1] == x.c  # type: ignore[union-attr]
    padding = depthwise[0].shape[2] // 2  # type: ignore[union-attr]
    branch = _Branch(
        compress, depthwise, expand, eps, stride, padding, activations=(activation, None, activation),
        groups=(1 if whole_first else groups, groups), shuffle=groups,
    )  # fmt: skip
    out = expand[0].shape[0]  # type: ignore[union-attr]
    h, w = branch.size(x)
    last = _formats(input, compress, depthwise, expand)
    if stride == 1:
        to = empty_map(x.n, h, w, out)
        if to.pixels:
            branch.run(x, to, x)
        return output(to, last)
    to = empty_map(x.n, h, w, x.c + out)
    if to.pixels:
        run_pool(x, to.slice(0, x.c), False, (3, 3), (2, 2), (1, 1))
        branch.run(x, to.slice(x.c, out))
    return output(to, last and suggests_channels_last(input))


def shuffle_unit_v2(
    input: Tensor, left_depthwise: Conv, left_pointwise: Conv, pointwise1: Conv, depthwise: Conv, pointwise2: Conv,
    eps: Sequence[float], stride: int, activation: str | None,
) -> Tensor:  # fmt: skip
    """ShuffleNetV2's unit: two branches, each on a half of the channels (stride 1) or on all, joined and shuffled."""
    x = read_even(input)
    padding = depthwise[0].shape[2] // 2  # type: ignore[union-attr]
    right = _Branch(
        pointwise1, depthwise, pointwise2, eps[2:], stride, padding, activations=(activation, None, activation)
    )
    h, w = right.size(x)
    c = pointwise2[0].shape[0]  # type: ignore[union-attr]
    if left_depthwise:
        pad = left_depthwise[0].shape[2] // 2  # type: ignore[union-attr]
        branch = _Branch(
            (), left_depthwise, left_pointwise, eps[:2], stride, pad, activations=(None, None, activation), slot="left"
        )
        other = left_pointwise[0].shape[0]  # type: ignore[union-attr]
        left = whole(scratch("left branch", x.n * h * w * other), x.n, h, w, other)
        if left.pixels:
            branch.run(x, left)
        source, formats = x, _formats(input, left_depthwise, left_pointwise)
    else:
        half = x.c // 2
        left, source = x.slice(0, half), x.slice(half, half)
        formats = suggests_channels_last(input.chunk(2, 1)[0])
    result = whole(scratch("right branch", x.n * h * w * c), x.n, h, w, c)
    to = empty_map(x.n, h, w, left.c + c)
    if to.pixels:
        right.run(source, result)
        run_permute((left, result), (to,), 2)
    halves = input if left_depthwise else input.chunk(2, 1)[1]
    return output(to, formats and _formats(halves, pointwise1, depthwise, pointwise2))


def _shuffled(inputs: Sequence[Tensor], groups: int, parts: int) -> list[Tensor]:
    maps = [read_even(x) for x in inputs]
    first = maps[0]
    channels = sum(m.c for m in maps) // parts
    outputs = [empty_map(first.n, first.h, first.w, channels) for _ in range(parts)]
    if first.pixels and channels:
        run_permute(maps, outputs, groups)
    return [output(m, True) for m in outputs]


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Channel ``i * (C / groups) + j`` becomes channel ``j * groups + i``; always a copy."""
    if not suggests_channels_last(input):
        # whole planes move: torch's copy is as good as any
        return reference.channel_shuffle(input, groups)
    return _shuffled((input,), groups, 1)[0]


def channel_shuffle_split(input: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The two halves of the shuffled channels, each in memory of its own."""
    if not suggests_channels_last(input):
        return reference.channel_shuffle_split(input, groups)
    left, right = _shuffled((input,), groups, 2)
    return left, right


def cat_shuffle_split(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The two halves of the shuffled channels of `a` and `b` together."""
    if not (suggests_channels_last(a) and suggests_channels_last(b)):
        return reference.cat_shuffle_split(a, b, groups)
    left, right = _shuffled((a, b), groups, 2)
    return left, right


def _pooled(input: Tensor, largest: bool, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    x = read(input)
    h, w = (spatial(*sizes) for sizes in zip((x.h, x.w), kernel, stride, padding, strict=True))
    to = empty_map(x.n, h, w, x.c)
    if to.pixels and x.c:
        run_pool(x, to, largest, kernel, stride, padding)
    return output(to, suggests_channels_last(input))


def max_pool2d(input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Largest value under each place of the window; what lies outside of the map does not take part."""
    return _pooled(input, True, kernel_size, stride, padding)


def avg_pool2d(input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Mean under each place of the window; what lies outside of the map counts as zeros."""
    return _pooled(input, False, kernel_size, stride, padding)


def global_avg_pool(input: Tensor) -> Tensor:
    """Mean over height and width, which stay as sizes of 1."""
    x = read(input)
    to = empty_map(x.n, 1, 1, x.c)
    blocks = room(x.c) // room(1)
    if x.n and x.c:
        run(global_mean, x.n * blocks, x.address, x.image, x.row, x.pixel, x.h, x.w, x.c, to.address, x.c)
    return output(to, suggests_channels_last(input))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input @ weight.T + bias``."""
    return F.linear(input, weight, bias)


TABLE: dict[str, Callable[..., Any]] = {name: globals()[name] for name in reference.TABLE}
"""The ops of this tier by name."""
