"""What convolutions and linear layers cost, in the papers' terms: `analysis` counts, this names and sorts."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastblocks.analysis import count

__all__ = ["Operation", "by_kind", "kind_of", "operations", "portions"]


class Operation(NamedTuple):
    """A convolution or linear layer in one run."""

    name: str
    kind: str
    """"1x1", "depthwise", "3x3" and so on, or "linear"; a kernel that is no square is "3 taps"."""
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
    meta = copy.deepcopy(module).to("meta").eval()
    found = []
    for each in count(meta, torch.empty(size, device="meta")):
        product = each.product
        if product is None:
            continue
        dense = each.name in ("mm", "addmm")
        kind = "linear" if dense else _convolution(product.in_channels, product.groups, product.taps)
        weights = product.out_channels * product.in_channels // product.groups * product.taps
        numbers = (each.read // product.item, each.written // product.item, weights)
        found.append(Operation(each.module, kind, each.multiply_adds, *numbers))
    return found


def kind_of(layer: Any) -> str:
    """The kind of a convolution or linear layer, as `operations` has it."""
    if isinstance(layer, nn.Linear):
        return "linear"
    return _convolution(layer.in_channels, layer.groups, math.prod(layer.kernel_size))


def _convolution(channels: int, groups: int, taps: int) -> str:
    if groups == channels > 1:
        return "depthwise"
    side = math.isqrt(taps)
    return f"{side}x{side}" if side**2 == taps else f"{taps} taps"


def by_kind(found: Iterable[Operation]) -> Counter[str]:
    """Multiply-adds by kind."""
    cost: Counter[str] = Counter()
    for operation in found:
        cost[operation.kind] += operation.multiply_adds
    return cost


def portions(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's share of their sum.

    Example:
        >>> portions({"1x1": 3, "3x3": 1})
        {'1x1': 0.75, '3x3': 0.25}
    """
    whole = sum(values.values())
    return {key: value / whole for key, value in values.items()}
