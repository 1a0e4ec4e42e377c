"""The forward half of a chain in training: each convolution writes its output once, as it was before BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.backends.numba_chain import (
    PLAIN,
    Chain,
    Moments,
    chunks,
    clamps_of,
    image_chunks,
    join_parts,
    part,
)
from fastblocks.backends.numba_maps import Map, empty_map, read_even, shuffle_order
from fastblocks.backends.numba_passes import run_depthwise, run_pool, run_product, spatial
from fastblocks.backends.program import Kind, Node, Program

__all__ = ["forward", "make_program"]


def make_program(nodes: tuple[tuple[int | float, ...], ...]) -> Program:
    """The nodes again, of their numbers."""
    program = []
    for flat in nodes:
        *head, eps = flat
        kind, value, first, channels, other, groups, shuffle, *rest = map(int, head)
        stride, padding, dilation, kernel = ((rest[i], rest[i + 1]) for i in range(0, 8, 2))
        activation, frozen, update = rest[8:]
        node = Node(Kind(kind), value, first, channels, other, groups, shuffle, stride, padding, dilation, kernel)
        node = node._replace(activation=activation, frozen=bool(frozen), update=bool(update), eps=eps)
        program.append(node)
    return tuple(program)


class _Forward:
    def __init__(self, chain: Chain, affine: Sequence[Any], running: Sequence[Any], momenta: Sequence[float]) -> None:
        self.chain = chain
        self.affine, self.running, self.momenta = affine, running, momenta
        self.places: list[Tensor] = []
        """Where the largest values of the pools' windows were."""
        chain.norms = torch.empty(max(chain.norm_at[-1], 1))

    def add(self, node: Node, value: int) -> None:
        """Compute a node's value."""
        chain = self.chain
        if node.kind <= Kind.DENSE:
            self._conv(node, value)
            return
        x = chain.value(node.input)
        if node.kind == Kind.MAX_POOL:
            image = chain.activated(node.input).shaped(x.n, x.h, x.w).tensor()
            y, places = torch.ops.aten.max_pool2d_with_indices(image, node.kernel, node.stride, node.padding)
            self.places.append(places)
            chain.values.append(read_even(y))
        elif node.kind == Kind.MEAN:
            image = chain.activated(node.input).shaped(x.n, x.h, x.w).tensor()
            chain.values.append(read_even(F.adaptive_avg_pool2d(image, (1, 1))))
        elif node.kind == Kind.POOL_CAT:
            chain.values.append(self._pool_cat(node, x))
        elif node.kind == Kind.INTERLEAVE:
            chain.values.append(self._interleave(node, x))
        else:
            to = empty_map(x.n, x.h, x.w, x.c)
            b = None if node.kind == Kind.ACTIVATE else part(chain.value(node.other))
            other = chain.reading(max(node.other, 0))
            join_parts(part(x), chain.reading(node.input), part(to), b, other, clamps_of(node))
            chain.values.append(to)

    def _pool_cat(self, node: Node, x: Map) -> Map:
        chain = self.chain
        b = chain.value(node.other)
        to = empty_map(b.n, b.h, b.w, x.c + b.c)
        source = chain.activated(node.input).shaped(x.n, x.h, x.w)
        run_pool(source, to.slice(0, x.c), False, node.kernel, node.stride, node.padding)
        join_parts(part(b), chain.reading(node.other), part(to.slice(x.c, b.c)))
        return to

    def _interleave(self, node: Node, x: Map) -> Map:
        chain = self.chain
        a, reading = x, chain.reading(node.input)
        if node.channels >= 0:
            a, reading = chain.activated(node.input, channels=(node.first, node.channels)), PLAIN
        b = chain.value(node.other)
        to = empty_map(b.n, b.h, b.w, a.c + b.c)
        join_parts(part(a), reading, part(to), part(b), chain.reading(node.other), turns=True)
        return to

    def _conv(self, node: Node, value: int) -> None:
        chain = self.chain
        conv = chain.conv_of(value)
        weight = chain.weights[conv]
        moments = Moments()
        if node.kind == Kind.POINTWISE:
            z = self._pointwise(node, weight, moments)
        elif node.kind == Kind.DEPTHWISE:
            z = self._depthwise(node, weight, moments)
        else:
            z = self._dense(node, weight, moments)
        chain.values.append(z)
        pair = slice(2 * conv, 2 * conv + 2)
        moments.finish(
            node, z.c, z.pixels, self.affine[pair], self.running[pair], self.momenta[conv], chain.norm(value)
        )

    def _pointwise(self, node: Node, weight: Tensor, moments: Moments) -> Map:
        chain = self.chain
        x = chain.value(node.input)
        z = empty_map(x.n, x.h, x.w, weight.shape[0])
        channels = None if node.channels < 0 else (node.first, node.channels)
        for first, last in chunks(x.pixels, max(x.c, z.c)):
            a = chain.activated(node.input, first, last, channels)
            run_product(a, weight, node.groups, z.rows(first, last))
            if not node.frozen:
                moments.add(part(z, first, last))
        return z

    def _depthwise(self, node: Node, weight: Tensor, moments: Moments) -> Map:
        chain = self.chain
        x = chain.value(node.input)
        sizes = zip((x.h, x.w), weight.shape[2:], node.stride, node.padding, node.dilation, strict=True)
        h, w = (spatial(*s) for s in sizes)
        z = empty_map(x.n, h, w, x.c)
        order = shuffle_order(x.c, node.shuffle).data_ptr() if node.shuffle > 1 else 0
        how: Any = chain.normed(node.input)
        for i, j in image_chunks(x.n, max(x.h * x.w, z.h * z.w) * x.c):
            to = z.images(i, j)
            run_depthwise(x.images(i, j), weight, to, node.stride, node.padding, node.dilation, order=order, **how)
            if not node.frozen:
                moments.add(part(to))
        return z

    def _dense(self, node: Node, weight: Tensor, moments: Moments) -> Map:
        x = self.chain.value(node.input)
        z = read_even(F.conv2d(x.tensor(), weight, None, node.stride, node.padding, node.dilation))
        if not node.frozen:
            for first, last in chunks(z.pixels, z.c):
                moments.add(part(z, first, last))
        return z


def forward(
    program: Program, x: Tensor, weights: Sequence[Tensor], affine: Sequence[Any], running: Sequence[Any],
    momenta: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """Run a chain: its output, its BatchNorms' constants, the values inside, and where pools found their values."""
    chain = Chain(program, x, weights)
    half = _Forward(chain, affine, running, momenta)
    for i, node in enumerate(program):
        half.add(node, i + 1)
    *inside, y = (m.tensor() for m in chain.values[1:] if m is not None)
    return [y, chain.norms, *inside, *half.places]
