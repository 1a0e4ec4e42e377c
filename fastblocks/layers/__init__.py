"""The layers: containers of ordinary torch modules that run as one op where that changes nothing but the time."""

from fastblocks.layers.base import can_fuse, why_not_fuse
from fastblocks.layers.chain import Sequential
from fastblocks.layers.conv import ConvBNAct, DepthwiseConvBNAct, PointwiseConvBNAct
from fastblocks.layers.depthwise_separable import DepthwiseSeparableConv
from fastblocks.layers.inverted_residual import InvertedResidual
from fastblocks.layers.pool import MaxPool2d
from fastblocks.layers.shuffle import ChannelShuffle, ChannelShuffleSplit
from fastblocks.layers.shuffle_unit import ShuffleUnit
from fastblocks.layers.shuffle_unit_v2 import ShuffleUnitV2

__all__ = [
    "ChannelShuffle",
    "ChannelShuffleSplit",
    "ConvBNAct",
    "DepthwiseConvBNAct",
    "DepthwiseSeparableConv",
    "InvertedResidual",
    "MaxPool2d",
    "PointwiseConvBNAct",
    "Sequential",
    "ShuffleUnit",
    "ShuffleUnitV2",
    "can_fuse",
    "why_not_fuse",
]
