"""What convolutions and linear layers cost, read off real modules as one run meets them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Operation", "by_kind", "operations"]


class Operation(NamedTuple):
    """A convolution or linear layer in one run."""

    name: str
    kind: str
    """"1x1", "depthwise", "3x3" and so on, or "linear"."""
    multiply_adds: int
    read: int
    """Numbers of the input."""
    written: int
    """Numbers of the output."""
    weights: int
    """Numbers of the weight, without the bias."""

    @property
    def accesses(self) -> int:
        """Memory access cost: the numbers that are read and written at least (Ma et al. 2018, section 2)."""
        return self.read + self.written + self.weights


def operations(module: nn.Module, *size: int) -> list[Operation]:
    """The convolutions and linear layers of a run on an input of this size, in their order.

    A copy of the module runs on torch's meta device, where tensors have shapes and no values: it takes no time.

    Example:
        >>> operations(nn.Conv2d(8, 16, 1), 1, 8, 4, 4)[0].multiply_adds
        2048
    """
    found: list[Operation] = []
    module = copy.deepcopy(module).to("meta")
    names = {child: name for name, child in module.named_modules()}

    def seen(child: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        each = child.weight[0].numel()  # products that one number of the output sums up
        numbers = (out.numel() * each, args[0].numel(), out.numel(), child.weight.numel())
        found.append(Operation(names[child], kind_of(child), *numbers))

    for child in names:
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            child.register_forward_hook(seen)
    with torch.no_grad():
        module.eval()(torch.empty(size, device="meta"))
    return found


def kind_of(layer: Any) -> str:
    """The kind of a convolution or linear layer."""
    if isinstance(layer, nn.Linear):
        return "linear"
    return "depthwise" if layer.groups == layer.in_channels > 1 else "{}x{}".format(*layer.kernel_size)


def by_kind(found: Iterable[Operation]) -> Counter[str]:
    """Multiply-adds by kind."""
    cost: Counter[str] = Counter()
    for operation in found:
        cost[operation.kind] += operation.multiply_adds
    return cost
