"""The ops of this package as functions.

Each checks its arguments, is differentiable, works for every floating point dtype and every device, and is known to
torch as ``torch.ops.fastblocks.<name>``. BatchNorm uses the running statistics; training goes through the layers.
"""

from fastblocks.functional.ops import (
    conv_bn_act,
    depthwise_conv_bn_act,
    global_avg_pool,
    inverted_residual,
    linear,
    pointwise_conv_bn_act,
)
from fastblocks.functional.record import ConvBN

__all__ = [
    "ConvBN",
    "conv_bn_act",
    "depthwise_conv_bn_act",
    "global_avg_pool",
    "inverted_residual",
    "linear",
    "pointwise_conv_bn_act",
]
