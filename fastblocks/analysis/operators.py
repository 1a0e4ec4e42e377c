"""torch's operators: what kind each is, and how many multiply-adds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

__all__ = ["has_formula", "kind_of", "multiply_adds", "product_of"]

ELEMENT_WISE = frozenset(
    [
        "native_batch_norm",
        "_native_batch_norm_legit_no_training",
        "hardswish",
        "hardsigmoid",
        "prelu",
        "_prelu_kernel",
        "elu",
        "celu",
        "selu",
        "rrelu",
        "leaky_relu",
        "threshold",
        "native_dropout",
        "clamp_min",
        "clamp_max",
    ]
)
"""Beside those that torch tags as pointwise."""
COPIES = frozenset(
    [
        "clone",
        "copy",
        "_to_copy",
        "cat",
        "stack",
        "constant_pad_nd",
        "reflection_pad2d",
        "replication_pad2d",
        "channel_shuffle",
        "native_channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "roll",
        "flip",
        "index_select",
        "gather",
        "repeat",
        "fill",
        "zero",
        "zeros",
        "ones",
        "full",
        "zeros_like",
        "ones_like",
        "full_like",
        "arange",
        "scalar_tensor",
        "_reshape_copy",
        "slice_scatter",
    ]
)
CPU_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"  # torch has no formula for it
LOOK_UPS = frozenset(("embedding", "_embedding_bag", "index"))
"""They read a matrix of weights and multiply nothing."""


def has_formula(func: OpOverload) -> bool:
    """Whether the multiply-adds of this operator are known."""
    return func._schema.name == CPU_ATTENTION or func._overloadpacket in flop_registry


def multiply_adds(func: OpOverload, args: Any, kwargs: Any, out: Any) -> int | None:
    """The multiply-adds of an operator's call; None if there is no formula, or none for such arguments."""
    if func._schema.name == CPU_ATTENTION:
        return _attention(*args[:3])
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return None
    try:
        return int(formula(*args, **kwargs, out_val=out)) // 2
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # a formula may not know nested or sparse tensors


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Query with key, and the weights that this gives with value."""
    *batch, rows, depth = query.shape
    return math.prod(batch) * rows * key.shape[-2] * (depth + value.shape[-1])


def kind_of(func: OpOverload, flops: int | None, reads_matrix: bool) -> str:
    """The kind of an operator; see `cost.Operator`."""
    name = func._schema.name.partition("::")[2]
    plain = name.rstrip("_")
    if flops is not None:
        return "product"
    if plain in COPIES:
        return "copy"
    if plain in ELEMENT_WISE or torch.Tag.pointwise in func.tags:
        return "element-wise"
    return "uncounted" if reads_matrix and plain not in LOOK_UPS else "other"


def product_of(func: OpOverload, args: Any, out: Any) -> tuple[int, int, int, int, int, int] | None:
    """The fields of `cost.Product` for a convolution, or a matrix product of two dimensions; else None."""
    name = func._schema.name
    if name == "aten::convolution" and len(args) == 9:
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        taps = math.prod(weight.shape[2:])
        places = x if transposed else out  # where the kernel is put
        return x.shape[1], out.shape[1], groups, taps, places.shape[0] * math.prod(places.shape[2:]), out.element_size()
    if name in ("aten::mm", "aten::addmm") and len(args) >= 2:
        left, right = args[-2:]
        return left.shape[1], right.shape[1], 1, 1, left.shape[0], out.element_size()
    return None
