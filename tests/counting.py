"""What a network costs: multiply-adds and parameters by kind, and the bytes that operators read and write."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastblocks.backends import reference


def by_kind(module: nn.Module, *size: int) -> tuple[Counter[str], Counter[str]]:
    """Multiply-adds and weights (no biases) of the convolutions and linear layers, by kind, as one run meets them.

    Hooked children run one by one: this does not see what the fused ops say of themselves.
    """
    cost: Counter[str] = Counter()
    weights: Counter[str] = Counter()

    def seen(child: Any, args: Any, out: Tensor) -> None:
        if isinstance(child, nn.Linear):
            kind = "linear"
        elif child.groups == child.in_channels > 1:
            kind = "depthwise"
        else:
            kind = "{}x{}".format(*child.kernel_size)
        each = child.weight[0].numel()  # products that one number of the output sums up
        cost[kind] += out.numel() * each
        weights[kind] += child.weight.numel()

    hooks = [m.register_forward_hook(seen) for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        module.eval()(torch.zeros(size))
    for hook in hooks:
        hook.remove()
    return cost, weights


def multiply_adds(module: nn.Module, *size: int) -> int:
    """The same as a sum, as torch's counter has it; fused ops answer for themselves there."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(size))
    return counter.get_total_flops() // 2


def _maps(tensors: Any) -> list[Tensor]:
    """The activations among the tensors: one image each, which no weight here looks like."""
    return [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.dim() >= 4 and t.shape[0] == 1]


class Traffic(TorchDispatchMode):
    """Bytes of activations that operators read and write, for one image; weights are left out.

    Args:
        how: "fused" takes an op of fastblocks as one operator, "single" as the torch operators that it stands for,
            "folded" likewise, with BatchNorm and activation inside the operator in front of them.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.bytes = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastblocks" and self.how != "fused":
            with self:
                return reference.TABLE[func._schema.name.split("::")[1]](*args)
        out = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info
        storages = [{s.untyped_storage().data_ptr() for s in _maps(tensors)} for tensors in (args, out)]
        view = storages[1] <= storages[0] and not (alias is not None and alias.is_write)
        inside = re.match(r"aten::(.*batch_norm|relu6?_?|hardtanh_?)$", func._schema.name)
        if not view and not (inside and self.how == "folded"):
            moved = sum(t.numel() * t.element_size() for t in _maps((args, out)))
            self.bytes += moved
            self.largest = max(self.largest, moved)
        return out


def traffic(how: str, run: Callable[[], Any]) -> Traffic:
    with torch.no_grad(), Traffic(how) as mode:
        run()
    return mode


def channels_last(*size: int) -> Tensor:
    return torch.randn(size).contiguous(memory_format=torch.channels_last)
