"""Call sites without the extension: the same comparisons as ``csrc/site.cpp`` makes, in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

__all__ = ["make_site"]


class _Site:
    """One op, called again and again with the same tensors; see ``functional/site.py``."""

    def __init__(self, description: Sequence[Any]) -> None:
        table, name, arguments, guard, _, watchers, grad_enabled, differentiable, needs_grad, *rest = description
        channels, height, width, tables, states, hooks, backward_hooks, settings = rest
        self.table, self.name = table, name
        self.guard, self.watchers = guard, watchers
        self.grad_enabled, self.differentiable, self.needs_grad = grad_enabled, differentiable, needs_grad
        # torch's guard knows whether gradients were recorded when it was made, and holds in that case only
        self.grad = grad_enabled()
        self.channels, self.least = channels, (height, width)
        self.tables, self.states, self.settings = list(tables), list(states), list(settings)
        self.children = self._children()
        self.size = sum(map(len, self.states))
        self.hooks, self.backward_hooks = list(hooks), list(backward_hooks)
        self.values = [value for _, _, value in settings]
        self.parts = [
            (kind, list(what) if kind == "record" else [what] if kind == "tensor" else what) for kind, what in arguments
        ]
        self.filled = [there is not None for there in self._found()]

    def _children(self) -> list[Any]:
        found = list(chain.from_iterable(table.values() for table in self.tables))
        return [*found, *map(type, found)]

    def _found(self) -> list[Any]:
        return [table[key] for kind, places in self.parts if kind != "value" for table, key in places]

    def _unchanged(self) -> bool:
        return (
            not any(self.hooks)
            and not (self.grad and any(self.backward_hooks))
            and sum(map(len, self.states)) == self.size
            and self._children() == self.children
            and [table[key] for table, key, _ in self.settings] == self.values
        )

    def __call__(self, input: Any) -> Any:
        """The op on an input; None where something is not as it was."""
        if self.grad_enabled() is not self.grad:
            return None
        try:
            if not self._unchanged():
                return None
            found = self._found()
        except KeyError:
            return None
        if [there is not None for there in found] != self.filled:
            return None
        if not self.guard(input, *[there for there in found if there is not None]):
            return None
        for watcher in self.watchers:
            if watcher():
                return None
        size = input.shape
        if 0 <= self.channels != size[1]:
            return None
        if self.least[0] >= 0 and (size[2] < self.least[0] or size[3] < self.least[1]):
            return None
        rest = iter(found)
        args = [input]
        for kind, what in self.parts:
            if kind == "record":
                args.append(tuple([next(rest) for _ in what]))
            else:
                args.append(what if kind == "value" else next(rest))
        if self.needs_grad and self.grad:
            return None if self.differentiable is None else self.differentiable(self.name, tuple(args))
        return self.table[self.name](*args)


def make_site(description: Sequence[Any]) -> Callable[[Any], Any]:
    """A call site of a description, as the extension's function of this name takes it."""
    return _Site(description)
