"""MobileNetV2 (Sandler et al. 2018, table 2) on fused layers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastblocks.layers import ConvBNAct, InvertedResidual, Sequential
from fastblocks.layers.conv import positive
from fastblocks.layers.head import Classifier, global_avg_pool
from fastblocks.models.registry import register

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Rows of the paper's table 2: expansion, output channels, repeats, stride of the first."""


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, one more where that would lose over a tenth of the channels.

    Example:
        >>> round_channels(32 * 1.4), round_channels(24 * 0.75), round_channels(11)
        (48, 24, 16)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class MobileNetV2(nn.Module):
    """MobileNetV2 with torchvision's ``state_dict`` keys and shapes; `mobilenet_v2` builds it.

    Args:
        num_classes: outputs of the classifier.
        width_mult: multiplies every number of channels, which is then rounded to a multiple of 8.
        dropout: probability in front of the classifier, in training.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """

    def __init__(self, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        num_classes = positive("num_classes", num_classes)
        if isinstance(width_mult, bool) or not isinstance(width_mult, (int, float)):
            raise TypeError(f"width_mult: expected a number, got {type(width_mult).__name__} {width_mult!r}")
        if not 0 < width_mult <= 100:
            raise ValueError(f"width_mult: expected a number above 0 and up to 100, got {width_mult!r}")
        channels = round_channels(32 * width_mult)
        self.last_channel = round_channels(1280 * max(1.0, width_mult))
        blocks: list[nn.Module] = [ConvBNAct(3, channels, stride=2)]
        for expansion, width, repeats, stride in STAGES:
            out = round_channels(width * width_mult)
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        blocks.append(ConvBNAct(channels, self.last_channel, 1))
        self.features = Sequential(*blocks)
        self.classifier = Classifier(self.last_channel, num_classes, dropout)
        initialise(self)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        result: Tensor = self.classifier(global_avg_pool(self.features(x)))
        return result


def initialise(model: nn.Module) -> None:
    """Give a network torchvision's initial values; the same random seed gives the same weights.

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


def _build(name: str, width_mult: float, num_classes: int, weights: Any, dropout: float) -> MobileNetV2:
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights: expected None, a name or a path, got {type(weights).__name__}")
    model = MobileNetV2(num_classes, width_mult, dropout)
    if weights is not None:
        # kept out of import time: it brings in downloading
        from fastblocks.models.weights import load_state_dict

        model.load_state_dict(load_state_dict(weights, name))
    return model


@register
def mobilenet_v2(
    width_mult: float = 1.0, num_classes: int = 1000, weights: Any = None, dropout: float = 0.2
) -> MobileNetV2:
    """MobileNetV2 (Sandler et al. 2018), 3,504,872 parameters and 300.77 M multiply-adds at width 1 and 224x224.

    Args:
        width_mult: multiplies every number of channels.
        num_classes: outputs of the classifier.
        weights: None for random ones, ``"imagenet"`` for torchvision's ImageNet weights (width 1 and 1000 classes), or
            the path of a ``.pth`` or ``.safetensors`` file.
        dropout: probability in front of the classifier, in training.

    Returns:
        The network in training mode, with channels_last weights.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> tuple(mobilenet_v2(num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape)
        (1, 10)
    """
    names = {1.0: "mobilenet_v2", 0.75: "mobilenet_v2_x0_75", 1.4: "mobilenet_v2_x1_4"}
    name = names.get(width_mult, f"mobilenet_v2_x{width_mult}".replace(".", "_"))
    return _build(name, width_mult, num_classes, weights, dropout)


@register
def mobilenet_v2_x0_75(num_classes: int = 1000, weights: Any = None, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2 at width 0.75: 2,636,424 parameters, 209.07 M multiply-adds at 224x224. See `mobilenet_v2`."""
    return _build("mobilenet_v2_x0_75", 0.75, num_classes, weights, dropout)


@register
def mobilenet_v2_x1_4(num_classes: int = 1000, weights: Any = None, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2 at width 1.4: 6,108,776 parameters, 582.20 M multiply-adds at 224x224. See `mobilenet_v2`."""
    return _build("mobilenet_v2_x1_4", 1.4, num_classes, weights, dropout)
