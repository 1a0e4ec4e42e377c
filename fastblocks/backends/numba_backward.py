"""The backward half of a chain: one convolution after the other, from the last to the first.

A gradient that arrives at a value is added to what arrived before. With the last one it is masked by the value's
activation and summed for its BatchNorm, chunk by chunk, while it is in cache. Then dz, the gradient of the
convolution's output as it was before BatchNorm, is a linear function of it and z, which the next pass applies as it
reads both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastblocks.backends.numba_chain import Chain, chunks, image_chunks, part, pass_of
from fastblocks.backends.numba_depthwise import depthwise_weight
from fastblocks.backends.numba_gradients import Arrival, Gradients
from fastblocks.backends.numba_maps import Map, empty_map, read_even, room, scratch, shuffle_order, whole
from fastblocks.backends.numba_norm import gradient_of_z, norm_backward
from fastblocks.backends.numba_passes import Pair, bands_of, ring_floats, run_depthwise, run_permute
from fastblocks.backends.numba_pool import run, threads
from fastblocks.backends.program import Kind, Node, Program

__all__ = ["backward"]

_CHANNELS = 64
_ONE = (1, 1)


class _Backward(Gradients):
    def __init__(self, chain: Chain, affine: Sequence[Any], places: list[Tensor], needs: Sequence[bool]) -> None:
        super().__init__(chain, needs)
        self.affine, self.wanted, self.places = affine, needs, places
        self.results: list[Tensor | None] = [None] * len(needs)

    def build(self, grad: Map) -> None:
        """All gradients, of that of the output."""
        program = self.chain.program
        last = len(program)
        self.grads[last] = grad
        if self.needs[last]:
            self.finish(last)
        for i in range(last - 1, -1, -1):
            if self.needs[i + 1]:
                self._add(program[i], i + 1)
            self.grads[i + 1] = None
        if self.needs[0] and self.grads[0] is not None:
            self.results[0] = self.grads[0].tensor()

    def _add(self, node: Node, value: int) -> None:
        g = self.grads[value]
        assert g is not None
        if node.kind <= Kind.DENSE:
            self._conv(node, value, g)
        elif node.kind == Kind.MAX_POOL:
            self._max_pool(node, value, g)
        elif node.kind == Kind.MEAN:
            self._mean(node, g)
        elif node.kind == Kind.POOL_CAT:
            self._pool_cat(node, g)
        elif node.kind == Kind.INTERLEAVE:
            self._interleave(node, g)
        else:
            for source in (node.other, node.input):
                if source >= 0 and self.needs[source]:
                    Arrival(self, source).alias(g)

    def _max_pool(self, node: Node, value: int, g: Map) -> None:
        if not self.needs[node.input]:
            return
        x = self.chain.value(node.input)
        like = torch.empty((x.n, x.c, x.h, x.w), memory_format=torch.channels_last)
        places = self.places[sum(n.kind == Kind.MAX_POOL for n in self.chain.program[: value - 1])]
        dx = torch.ops.aten.max_pool2d_with_indices_backward(
            g.tensor(), like, node.kernel, node.stride, node.padding, [1, 1], False, places
        )
        self._deliver(node.input, read_even(dx))

    def _mean(self, node: Node, g: Map) -> None:
        if self.needs[node.input]:
            x = self.chain.value(node.input)
            dx = empty_map(x.n, x.h, x.w, x.c)
            dx.tensor().copy_(g.tensor() / (x.h * x.w))
            self._deliver(node.input, dx)

    def _deliver(self, value: int, g: Map) -> None:
        """A gradient in memory that nobody else reads."""
        arrival = Arrival(self, value)
        if arrival.before is None:
            self.grads[value], self.owned[value] = g, True
            arrival.to = g
        for first, last in chunks(g.pixels, g.c):
            arrival.take(part(g, first, last), first, last)

    def _pool_cat(self, node: Node, g: Map) -> None:
        x = self.chain.value(node.input)
        if self.needs[node.other]:
            Arrival(self, node.other).alias(g.slice(x.c, g.c - x.c))
        if self.needs[node.input]:
            like = torch.empty((x.n, x.c, x.h, x.w), memory_format=torch.channels_last)
            dx = torch.ops.aten.avg_pool2d_backward(
                g.slice(0, x.c).tensor(), like, node.kernel, node.stride, node.padding, False, True, None
            )
            self._deliver(node.input, read_even(dx))

    def _interleave(self, node: Node, g: Map) -> None:
        half = g.c // 2
        parts = [empty_map(g.n, g.h, g.w, half) for _ in range(2)]
        run_permute((g,), parts, half)
        if self.needs[node.other]:
            self._deliver(node.other, parts[1])
        if self.needs[node.input]:
            if node.channels < 0:
                self._deliver(node.input, parts[0])
                return
            arrival = Arrival(self, node.input, (node.first, node.channels))
            arrival.take(part(parts[0]), 0, g.pixels)
            arrival.finish()

    # ------------------------------------------------------------------------------------------- convolutions

    def _conv(self, node: Node, value: int, g: Map) -> None:
        chain = self.chain
        conv = chain.conv_of(value)
        wanted = self.wanted[1 + 3 * conv : 4 + 3 * conv]
        weight = chain.weights[conv]
        factors = self._norm(node, value, g.c, conv)
        self.sums[value] = []
        if not (wanted[0] or self.needs[node.input]):
            return
        d_weight = torch.empty_like(weight) if wanted[0] else None
        if node.kind == Kind.POINTWISE:
            self._pointwise(node, value, g, factors, weight, d_weight)
        elif node.kind == Kind.DEPTHWISE:
            if d_weight is not None:
                self._depthwise_weight(node, value, g, factors, d_weight)
            if self.needs[node.input]:
                self._depthwise_input(node, value, g, factors, weight)
        else:
            self._dense(node, value, g, factors, weight, d_weight)
        self.results[1 + 3 * conv] = d_weight

    def _norm(self, node: Node, value: int, channels: int, conv: int) -> Tensor:
        """The factors that make dz, and the gradients of the BatchNorm's weight and bias."""
        sums = torch.cat(self.sums[value])
        factors = torch.empty(3 * room(channels))
        pair: list[Tensor | None] = [None, None]
        for i in (0, 1):
            if self.wanted[2 + 3 * conv + i] and self.affine[2 * conv + i] is not None:
                pair[i] = self.results[2 + 3 * conv + i] = torch.empty(channels)
        addresses = [0 if t is None else t.data_ptr() for t in pair]
        run(
            norm_backward, -(-channels // _CHANNELS), channels, self.chain.value(value).pixels, sums.shape[0],
            sums.data_ptr(), self.chain.norm(value), int(node.frozen), factors.data_ptr(), *addresses,
        )  # fmt: skip
        return factors

    def _dz(self, value: int, g: Map, factors: Tensor, first: int, last: int, to: Map) -> None:
        items, step = pass_of(last - first, g.c)
        a, z, y = part(g, first, last), part(self.chain.value(value), first, last), part(to)
        run(
            gradient_of_z, items, last - first, step, g.c, a.address, a.stride, z.address, z.stride,
            self.chain.norm(value), factors.data_ptr(), y.address, y.stride,
        )  # fmt: skip

    def _pointwise(
        self, node: Node, value: int, g: Map, factors: Tensor, weight: Tensor, d_weight: Tensor | None
    ) -> None:
        x = self.chain.value(node.input)
        out, fan = weight.shape[:2]
        groups = node.groups
        channels = None if node.channels < 0 else (node.first, node.channels)
        arrival = Arrival(self, node.input, channels) if self.needs[node.input] else None
        begun = False
        for first, last in chunks(g.pixels, max(x.c, g.c)):
            pixels = last - first
            dz = whole(scratch("dz", pixels * out), 1, 1, pixels, out)
            self._dz(value, g, factors, first, last, dz)
            if arrival is not None:
                to = arrival.memory().rows(first, last)
                if not arrival.direct():
                    to = whole(scratch("da", pixels * fan * groups), 1, 1, pixels, fan * groups)
                _times_weight(dz, weight, groups, to)
                arrival.take(part(to), first, last)
            if d_weight is not None:
                a = self.chain.activated(node.input, first, last, channels)
                _add_weight(dz, a, groups, d_weight, begun)
                begun = True
        if arrival is not None:
            arrival.finish()

    def _depthwise_weight(self, node: Node, value: int, g: Map, factors: Tensor, d_weight: Tensor) -> None:
        chain = self.chain
        x, z = chain.value(node.input), chain.value(value)
        kernel = node.kernel
        taps = kernel[0] * kernel[1]
        bands = bands_of(x.n, z.h)
        items = x.n * bands
        parts = torch.empty((items, taps, room(x.c)))
        norm = chain.norm(node.input)
        line = 4 * room(x.c)
        normed = (norm + line, norm + 2 * line, norm) if norm else (0, 0, 0)
        order = shuffle_order(x.c, node.shuffle).data_ptr() if node.shuffle > 1 else 0
        slices = min(threads(), items)
        floats = ring_floats(x.w, x.c, kernel, node.padding, node.dilation) + room(x.c) * z.w
        memory = scratch("ring", slices * floats)
        run(
            depthwise_weight, items, x.address, x.image, x.row, x.pixel, x.h, x.w, x.c, g.address, g.image, g.row,
            g.pixel, g.h, g.w, *kernel, *node.stride, *node.padding, *node.dilation, bands, *normed,
            *chain.clamps(node.input), order, z.address, z.image, z.row, z.pixel, chain.norm(value), factors.data_ptr(),
            parts.data_ptr(), memory.data_ptr(), floats, slices=slices,
        )  # fmt: skip
        d_weight.copy_(parts.sum(0)[:, : x.c].t().reshape(d_weight.shape))

    def _depthwise_input(self, node: Node, value: int, g: Map, factors: Tensor, weight: Tensor) -> None:
        chain = self.chain
        x, z = chain.value(node.input), chain.value(value)
        arrival = Arrival(self, node.input)
        reach = [d * (k - 1) for d, k in zip(node.dilation, node.kernel, strict=True)]
        padding = [r - p for r, p in zip(reach, node.padding, strict=True)]
        order = shuffle_order(x.c, node.shuffle).data_ptr() if node.shuffle > 1 else 0
        for i, j in image_chunks(x.n, max(x.h * x.w, g.h * g.w) * x.c):
            first, last = i * x.h * x.w, j * x.h * x.w
            to = arrival.memory().images(i, j)
            if order or not arrival.direct():
                to = whole(scratch("da", to.pixels * x.c), j - i, x.h, x.w, x.c)
            source, at = g.images(i, j), z.images(i, j)
            if min(padding) < 0:
                self._wide_padding(node, value, source, factors, weight, (i, j), to)
            else:
                gradient = (at.address, at.image, at.row, at.pixel, factors.data_ptr())
                run_depthwise(
                    source, weight, to, _ONE, padding, node.dilation, center=chain.norm(value), gradient=gradient,
                    spread=node.stride, flipped=True,
                )  # fmt: skip
            arrival.take(part(to), first, last, order)

    def _wide_padding(
        self, node: Node, value: int, g: Map, factors: Tensor, weight: Tensor, images: Pair, to: Map
    ) -> None:
        """A padding wider than the kernel reaches: outputs that read nothing but it. torch's own gradient serves."""
        dz = empty_map(g.n, g.h, g.w, g.c)
        whole_map = self.grads[value]
        assert whole_map is not None
        self._dz(value, whole_map, factors, images[0] * g.h * g.w, images[1] * g.h * g.w, dz)
        like = torch.empty((to.n, to.c, to.h, to.w), memory_format=torch.channels_last)
        geometry = (node.stride, node.padding, node.dilation, False, [0, 0], to.c, [True, False, False])
        dx = torch.ops.aten.convolution_backward(dz.tensor(), like, weight, None, *geometry)[0]
        to.tensor().copy_(dx)

    def _dense(self, node: Node, value: int, g: Map, factors: Tensor, weight: Tensor, d_weight: Tensor | None) -> None:
        x = self.chain.value(node.input)
        dz = empty_map(g.n, g.h, g.w, g.c)
        self._dz(value, g, factors, 0, g.pixels, dz)
        needed = [self.needs[node.input], d_weight is not None, False]
        geometry = (node.stride, node.padding, node.dilation, False, [0, 0], 1, needed)
        dx, dw, _ = torch.ops.aten.convolution_backward(dz.tensor(), x.tensor(), weight, None, *geometry)
        if d_weight is not None:
            d_weight.copy_(dw)
        if needed[0]:
            self._deliver(node.input, read_even(dx))


def _times_weight(dz: Map, weight: Tensor, groups: int, to: Map) -> None:
    """``dz @ weight``: the gradient of a product's input."""
    out, fan = weight.shape[:2]
    strides = weight.stride()[:2]
    a, y = dz.matrix(), to.matrix()
    if groups == 1:
        torch.mm(a, weight.as_strided((out, fan), strides), out=y)
        return
    n, p = out // groups, dz.pixels
    w = weight.as_strided((groups, n, fan), (n * strides[0], *strides))
    torch.bmm(a.as_strided((groups, p, n), (n, dz.pixel, 1)), w, out=y.as_strided((groups, p, fan), (fan, to.pixel, 1)))


def _add_weight(dz: Map, a: Map, groups: int, to: Tensor, begun: bool) -> None:
    """``dz.T @ a``, added to what there is of a weight's gradient."""
    out, fan = to.shape[:2]
    strides = to.stride()[:2]
    g, x = dz.matrix(), a.matrix()
    if groups == 1:
        y = to.as_strided((out, fan), strides)
        torch.addmm(y, g.t(), x, beta=int(begun), out=y)
        return
    n, p = out // groups, dz.pixels
    y = to.as_strided((groups, n, fan), (n * strides[0], *strides))
    g = g.as_strided((groups, n, p), (n, 1, dz.pixel))
    torch.baddbmm(y, g, x.as_strided((groups, p, fan), (fan, a.pixel, 1)), beta=int(begun), out=y)


def backward(
    program: Program, grad: Tensor, x: Tensor, weights: Sequence[Tensor], affine: Sequence[Any],
    saved: Sequence[Tensor | None], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of input, weights, and BatchNorms' weights and biases; None where none is needed.

    `saved` as `forward` returned it; the output only where it is a sum with an activation.
    """
    chain = Chain(program, x, weights)
    output, norms, *rest = saved
    assert norms is not None
    chain.norms = norms
    inside: list[Any] = rest[: len(program) - 1]
    chain.values += [read_even(t) for t in inside]
    g = read_even(grad)
    # of an output that is not kept the shape alone is read
    chain.values.append(g if output is None else read_even(output))
    places: list[Any] = rest[len(program) - 1 :]
    half = _Backward(chain, affine, places, needs)
    half.build(g)
    return half.results
