"""The ops of this package as functions.

Each checks its arguments, is differentiable, works for every floating point dtype and every device, and is known to
torch as ``torch.ops.fastblocks.<name>``. BatchNorm uses the running statistics; training goes through the layers.
"""

from fastblocks.functional.ops import (
    avg_pool2d,
    conv_bn_act,
    depthwise_conv_bn_act,
    depthwise_separable,
    global_avg_pool,
    inverted_residual,
    linear,
    max_pool2d,
    pointwise_conv_bn_act,
)
from fastblocks.functional.record import ConvBN
from fastblocks.functional.shuffle_ops import (
    cat_shuffle_split,
    channel_shuffle,
    channel_shuffle_split,
    grouped_pointwise_conv_bn_act,
    shuffle_unit,
    shuffle_unit_v2,
)

__all__ = [
    "ConvBN",
    "avg_pool2d",
    "cat_shuffle_split",
    "channel_shuffle",
    "channel_shuffle_split",
    "conv_bn_act",
    "depthwise_conv_bn_act",
    "depthwise_separable",
    "global_avg_pool",
    "grouped_pointwise_conv_bn_act",
    "inverted_residual",
    "linear",
    "max_pool2d",
    "pointwise_conv_bn_act",
    "shuffle_unit",
    "shuffle_unit_v2",
]
