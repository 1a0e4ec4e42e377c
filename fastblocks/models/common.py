"""What the networks share: widths, initial values, memory format, weights."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, one more where that would lose over a tenth of the channels.

    Example:
        >>> round_channels(32 * 1.4), round_channels(24 * 0.75), round_channels(11)
        (48, 24, 16)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def multiplier(name: str, value: Any) -> float:
    """A factor of widths or depths, else a ValueError or TypeError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if not 0 < value <= 100:
        raise ValueError(f"{name}: expected a number above 0 and up to 100, got {value!r}")
    return value


def variant(name: str, width_mult: float) -> str:
    """The name of a network at this width.

    Example:
        >>> variant("mobilenet_v2", 1.0), variant("mobilenet_v2", 0.75), variant("shufflenet_v1_g3", 2)
        ('mobilenet_v2', 'mobilenet_v2_x0_75', 'shufflenet_v1_g3_x2_0')
    """
    return name if width_mult == 1 else f"{name}_x{float(width_mult)}".replace(".", "_")


def initialise(model: nn.Module) -> None:
    """Give a network torchvision's initial values of MobileNetV2; the same random seed gives the same weights.

    Kaiming fan-out for convolutions, ones and zeros for BatchNorm, N(0, 0.01) for the classifier, zeros for biases.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def channels_last(model: nn.Module) -> None:
    """Give every 4-d parameter channels_last strides, in place.

    torch's ``.to(memory_format=...)`` leaves 1x1 kernels as they are, for their elements would not move; but torch
    reads the output's format from the strides. So each one is written into a new tensor.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            old = parameter.data
            new = torch.empty(old.shape, dtype=old.dtype, device=old.device, memory_format=torch.channels_last)
            parameter.data = new.copy_(old)


def check_weights(weights: Any) -> None:
    """Refuse what is neither None nor a name nor a path, before a network is built."""
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights: expected None, a name or a path, got {type(weights).__name__}")


def load(model: Network, name: str, weights: Any) -> Network:
    """Give the network called `name` its weights, if any are asked for."""
    if weights is not None:
        # kept out of import time: it brings in downloading
        from fastblocks.models.weights import load_state_dict

        model.load_state_dict(load_state_dict(weights, name))
    return model
