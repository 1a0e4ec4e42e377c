"""Which memory format a convolution's output has: torch's rule, for the tiers that do not ask torch itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def strides_like_channels_last(size: Sequence[Any], stride: Sequence[Any]) -> bool:
    """Whether torch reads these sizes and strides as channels_last.

    A contiguous ``(K, C, 1, 1)`` tensor, strides ``(C, 1, 1, 1)``, satisfies both formats; torch counts it as
    contiguous. The same sizes with strides ``(C, 1, C, C)`` count as channels_last. Nothing empty does.

    Example:
        >>> strides_like_channels_last((8, 4, 1, 1), (4, 1, 1, 1))
        False
        >>> strides_like_channels_last((8, 4, 1, 1), (4, 1, 4, 4))
        True
    """
    if len(size) != 4 or stride[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if size[dim] == 0 or stride[dim] < least:
            return False
        # the batch stride equal to the channel stride: every dimension but N is 1, so either format would do
        if dim == 0 and least == stride[1]:
            return False
        least = stride[dim] * size[dim] if size[dim] > 1 else stride[dim]
    return True


def suggests_channels_last(tensor: Tensor) -> bool:
    """Whether torch's convolutions take this tensor for channels_last."""
    return strides_like_channels_last(tensor.shape, tensor.stride())


def output_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of ``conv2d(input, weight)`` on the CPU: channels_last if either of the two is."""
    if suggests_channels_last(input) or suggests_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format
