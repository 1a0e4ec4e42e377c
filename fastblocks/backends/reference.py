"""The reference tier: every op as plain torch calls.

It works for every dtype and device, torch differentiates it, and its numbers are torch's own. The other tiers are
measured against it and fall back to it.

A convolution comes as the six entries ``[weight, bias, running_mean, running_var, bn_weight, bn_bias]``;
``running_mean is None`` says that no BatchNorm follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Conv = Sequence[Tensor | None]

_ONE = (1, 1)
_ZERO = (0, 0)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    # In place, as torchvision's blocks do: `x` is always this module's own intermediate. Nothing saved it for
    # backward, since neither convolution nor BatchNorm needs its output there.
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x, inplace=True)
    return F.relu6(x, inplace=True)


def _conv_bn(
    x: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    weight, bias, mean, var, bn_weight, bn_bias = conv
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    if mean is None:
        return y
    return F.batch_norm(y, mean, var, bn_weight, bn_bias, False, 0.0, eps)


def _add(y: Tensor, residual: Tensor) -> Tensor:
    # In place keeps y's memory format; out of place is for vmap and for autocast, where the dtypes differ.
    if y.dtype == residual.dtype and y.shape == residual.shape and not torch._C._functorch.maybe_current_level():
        return y.add_(residual)
    return y + residual


def conv_bn_act(
    input: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    """Dense convolution, BatchNorm with running statistics, activation."""
    return _activate(_conv_bn(input, conv, eps, stride, padding, dilation, 1), activation)


def pointwise_conv_bn_act(
    input: Tensor, conv: Conv, eps: float, activation: str | None, residual: Tensor | None
) -> Tensor:
    """1x1 convolution, BatchNorm with running statistics, residual, activation, in this order."""
    y = _conv_bn(input, conv, eps, _ONE, _ZERO, _ONE, 1)
    if residual is not None:
        y = _add(y, residual)
    return _activate(y, activation)


def depthwise_conv_bn_act(
    input: Tensor,
    conv: Conv,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    """Depthwise convolution, BatchNorm with running statistics, activation."""
    return _activate(_conv_bn(input, conv, eps, stride, padding, dilation, input.shape[1]), activation)


def inverted_residual(
    input: Tensor,
    expand: Conv,
    depthwise: Conv,
    project: Conv,
    eps: Sequence[float],
    stride: int,
    padding: int,
    activation: str | None,
    residual: bool,
) -> Tensor:
    """Expand (unless `expand` is empty), depthwise, project, and the sum with the input."""
    y = pointwise_conv_bn_act(input, expand, eps[0], activation, None) if expand else input
    y = depthwise_conv_bn_act(y, depthwise, eps[1], (stride, stride), (padding, padding), _ONE, activation)
    return pointwise_conv_bn_act(y, project, eps[2], None, input if residual else None)


def global_avg_pool(input: Tensor) -> Tensor:
    """Mean over height and width, which stay as sizes of 1."""
    return F.adaptive_avg_pool2d(input, 1)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input @ weight.T + bias``."""
    return F.linear(input, weight, bias)


TABLE: dict[str, Callable[..., Tensor]] = {
    "conv_bn_act": conv_bn_act,
    "pointwise_conv_bn_act": pointwise_conv_bn_act,
    "depthwise_conv_bn_act": depthwise_conv_bn_act,
    "inverted_residual": inverted_residual,
    "global_avg_pool": global_avg_pool,
    "linear": linear,
}
"""The ops of this tier by name; every tier has the same names with the same arguments."""
