"""The record of one convolution together with the BatchNorm that follows it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvBN(NamedTuple):
    """The tensors of one convolution and of the BatchNorm behind it.

    ``running_mean`` decides: where it is None there is no BatchNorm, the record is a plain convolution and the other
    BatchNorm entries must be None too. BatchNorm here always uses the running statistics, as torch does in eval
    mode (Ioffe and Szegedy 2015, algorithm 2).

    Attributes:
        weight: ``(out, in, kh, kw)``; ``(channels, 1, kh, kw)`` for a depthwise convolution.
        bias: ``(out,)`` or None.
        running_mean: ``(out,)``, or None where no BatchNorm follows.
        running_var: ``(out,)``.
        bn_weight: ``(out,)``, or None for ones.
        bn_bias: ``(out,)``, or None for zeros.
        eps: added to the variance.

    Example:
        >>> import torch
        >>> ConvBN(torch.ones(8, 3, 1, 1)).running_mean is None
        True
    """

    weight: Tensor
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    eps: float = 1e-5
