"""Gradients on their way to the values of a chain: added up, masked by the activation, summed for the BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastblocks.backends.numba_chain import Chain, Part, chunks, clamps_of, part, pass_of
from fastblocks.backends.numba_maps import Map, empty_map, room, scratch
from fastblocks.backends.numba_norm import receive
from fastblocks.backends.numba_passes import FREE, Pair
from fastblocks.backends.numba_pool import run, threads

__all__ = ["Arrival", "Gradients"]


class Arrival:
    """A gradient on its way to a value: where it goes, and what happens to it there."""

    def __init__(self, half: Gradients, value: int, channels: Pair | None = None) -> None:
        self.half, self.value = half, value
        m = half.chain.value(value)
        half.left[value] -= 1
        self.sliced = channels is not None and channels[1] < m.c
        self.last = half.left[value] == 0
        self.before = half.grads[value]
        self.channels = channels or (0, m.c)
        self.to: Map | None = None
        if self.sliced:
            if self.before is None:
                self.before = empty_map(m.n, m.h, m.w, m.c)
                self.before.owner.zero_()
                half.grads[value], half.owned[value] = self.before, True
            self.before = self.to = self.before.slice(*self.channels)

    def memory(self) -> Map:
        """Where the gradient is to be written."""
        if self.to is None:
            m = self.half.chain.value(self.value)
            before = self.half.grads[self.value]
            reuse = before is not None and self.half.owned[self.value]
            self.to = before if reuse and before is not None else empty_map(m.n, m.h, m.w, m.c)
            self.half.grads[self.value], self.half.owned[self.value] = self.to, True
        return self.to

    def direct(self) -> bool:
        """Whether the gradient may be written to `memory` by whoever makes it: nothing is there yet."""
        return self.before is None

    def take(self, g: Part, first: int, last: int, order: int = 0) -> None:
        """Some pixels of the gradient, which lie in scratch or, where that is `direct`, in `memory` already."""
        to = part(self.memory(), first, last)
        before = None if self.before is None else part(self.before, first, last)
        mask = self.last and not self.sliced
        if mask and self.half.masks(self.value):
            self.half.receive(self.value, g, to, first, last, before, order)
        elif before is not None or order or g.address != to.address:
            self.half.pass_on(g, to, before, order)

    def finish(self) -> None:
        """All pixels were taken."""
        if self.sliced and self.last:
            self.half.finish(self.value)

    def alias(self, g: Map) -> None:
        """All of a gradient, which is in memory that it keeps."""
        half = self.half
        if self.before is None and not self.sliced:
            half.grads[self.value], half.owned[self.value] = g, False
            if self.last:
                half.finish(self.value)
            return
        for first, last in chunks(g.pixels, g.c):
            self.take(part(g, first, last), first, last)
        self.finish()


class Gradients:
    """The gradients that have arrived at the values of a chain."""

    def __init__(self, chain: Chain, needs: Sequence[bool]) -> None:
        self.chain = chain
        program = chain.program
        count = len(program) + 1
        self.grads: list[Map | None] = [None] * count
        self.owned = [False] * count
        self.sums: list[list[Tensor]] = [[] for _ in range(count)]
        self.needs = [needs[0]]
        for i, node in enumerate(program):
            conv = chain.convs[i]
            any_needed = self.needs[node.input] or (node.other > 0 and self.needs[node.other])
            self.needs.append(any_needed or (conv >= 0 and any(needs[1 + 3 * conv : 4 + 3 * conv])))
        self.left = [0] * count
        """How many gradients are still to arrive at a value."""
        for i, node in enumerate(program):
            if self.needs[i + 1]:
                for value in {node.input, max(node.other, 0)} if node.other > 0 else {node.input}:
                    self.left[value] += 1

    def masks(self, value: int) -> bool:
        """Whether a gradient changes at a value, or is summed there."""
        return value > 0 and (self.chain.conv_of(value) >= 0 or self.chain.program[value - 1].activation > 0)

    def receive(
        self, value: int, g: Part, to: Part, first: int, last: int, before: Part | None = None, order: int = 0,
        store: bool = True,
    ) -> None:  # fmt: skip
        """Add, mask and sum some pixels of a gradient that is complete with these."""
        chain = self.chain
        z, norm = chain.value(value), chain.norm(value)
        items, step = pass_of(g.pixels, g.channels, sums=bool(norm))
        sums = torch.empty((items, 2 * g.channels), dtype=torch.float64) if norm else None
        if sums is not None:
            self.sums[value].append(sums)
        mask = part(z, first, last)
        clamps = clamps_of(chain.program[value - 1])
        self._receive(
            items, step, g, to if store else None, before, order, (mask.address, mask.stride, norm, *clamps),
            0 if sums is None else sums.data_ptr(),
        )  # fmt: skip

    def pass_on(self, g: Part, to: Part, before: Part | None, order: int) -> None:
        """Add some pixels of a gradient to those that were there."""
        items, step = pass_of(g.pixels, g.channels)
        self._receive(items, step, g, to, before, order, (0, 0, 0, *FREE), 0)

    def _receive(
        self, items: int, step: int, g: Part, to: Part | None, before: Part | None, order: int, mask: tuple[int, ...],
        sums: int,
    ) -> None:  # fmt: skip
        slices = min(threads(), items)
        memory = scratch("lines", slices * 3 * room(g.channels)).data_ptr()
        added = (0, 0) if before is None else (before.address, before.stride)
        out = (0, 0) if to is None else (to.address, to.stride)
        run(
            receive, items, g.pixels, step, g.channels, g.address, g.stride, *added, *mask, *out, sums, order, memory,
            slices=slices,
        )  # fmt: skip

    def finish(self, value: int) -> None:
        """Mask and sum a gradient that is complete, in a pass of its own."""
        g = self.grads[value]
        assert g is not None
        if not self.masks(value):
            return
        to = g
        changes = self.chain.program[value - 1].activation > 0
        if changes and not self.owned[value]:
            to = empty_map(g.n, g.h, g.w, g.c)
        for first, last in chunks(g.pixels, g.c):
            self.receive(value, part(g, first, last), part(to, first, last), first, last, store=changes)
        self.grads[value], self.owned[value] = to, to is not g or self.owned[value]
