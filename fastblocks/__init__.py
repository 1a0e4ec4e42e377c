"""Fused CPU kernels for mobile networks, as PyTorch layers."""

from fastblocks import backends, functional, layers, models
from fastblocks.backends import backend_info, current_backend, refresh, use_backend
from fastblocks.backends.memory import empty_cache, memory_stats
from fastblocks.layers import (
    ChannelShuffle,
    ChannelShuffleSplit,
    ConvBNAct,
    DepthwiseConvBNAct,
    DepthwiseSeparableConv,
    InvertedResidual,
    MaxPool2d,
    PointwiseConvBNAct,
    Sequential,
    ShuffleUnit,
    ShuffleUnitV2,
)

__version__ = "0.1.0"

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
    "__version__",
    "backend_info",
    "backends",
    "current_backend",
    "empty_cache",
    "functional",
    "layers",
    "memory_stats",
    "models",
    "refresh",
    "use_backend",
]
