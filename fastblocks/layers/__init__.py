"""The layers: containers of ordinary torch modules that run as one op where that changes nothing but the time."""

from fastblocks.layers.base import can_fuse, why_not_fuse
from fastblocks.layers.chain import Sequential
from fastblocks.layers.conv import ConvBNAct, DepthwiseConvBNAct, PointwiseConvBNAct
from fastblocks.layers.inverted_residual import InvertedResidual

__all__ = [
    "ConvBNAct",
    "DepthwiseConvBNAct",
    "InvertedResidual",
    "PointwiseConvBNAct",
    "Sequential",
    "can_fuse",
    "why_not_fuse",
]
