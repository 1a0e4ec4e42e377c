"""MobileNetV2 (Sandler et al. 2018, table 2) on fused layers."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fastblocks.layers import ConvBNAct, InvertedResidual, Sequential
from fastblocks.layers.chain import Trunk
from fastblocks.layers.conv import positive
from fastblocks.layers.head import Classifier
from fastblocks.models.common import channels_last, check_weights, initialise, load, multiplier, round_channels, variant
from fastblocks.models.registry import register

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Rows of the paper's table 2: expansion, output channels, repeats, stride of the first."""


class MobileNetV2(Trunk):
    """MobileNetV2 with torchvision's ``state_dict`` keys and shapes; `mobilenet_v2` builds it.

    Args:
        num_classes: outputs of the classifier.
        width_mult: multiplies every number of channels, which is then rounded to a multiple of 8.
        dropout: probability in front of the classifier, in training.
        depth_mult: multiplies the repeats of all stages but the first and the last; fractions are rounded up.
        fix_stem_head: whether the first and the last convolution keep their width, 32 and 1280.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """

    TRUNK = ("features",)

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        depth_mult: float = 1.0,
        fix_stem_head: bool = False,
    ) -> None:
        super().__init__()
        num_classes = positive("num_classes", num_classes)
        width_mult = multiplier("width_mult", width_mult)
        depth_mult = multiplier("depth_mult", depth_mult)
        ends = 1.0 if fix_stem_head else width_mult
        channels = round_channels(32 * ends)
        self.last_channel = round_channels(1280 * max(1.0, ends))
        blocks: list[nn.Module] = [ConvBNAct(3, channels, stride=2)]
        for stage in STAGES:
            expansion, width, repeats, stride = stage
            out = round_channels(width * width_mult)
            if stage not in (STAGES[0], STAGES[-1]):
                repeats = math.ceil(repeats * depth_mult)
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
        result: Tensor = self.classify(self.classifier, x)
        return result


@register
def mobilenet_v2(
    width_mult: float = 1.0,
    num_classes: int = 1000,
    weights: Any = None,
    dropout: float = 0.2,
    depth_mult: float = 1.0,
    fix_stem_head: bool = False,
) -> MobileNetV2:
    """MobileNetV2 (Sandler et al. 2018), 3,504,872 parameters and 300.77 M multiply-adds at width 1 and 224x224.

    Args:
        width_mult: multiplies every number of channels.
        num_classes: outputs of the classifier.
        weights: None for random ones, ``"imagenet"`` for torchvision's ImageNet weights (width 1 and 1000 classes), or
            the path of a ``.pth`` or ``.safetensors`` file: of this network's, torchvision's or timm's. timm's
            ``mobilenetv2_110d`` has the widths 1.1 and the depth 1.2, ``mobilenetv2_120d`` 1.2 and 1.4, both with
            `fix_stem_head`.
        dropout: probability in front of the classifier, in training.
        depth_mult: multiplies the repeats of all stages but the first and the last; fractions are rounded up.
        fix_stem_head: whether the first and the last convolution keep their width whatever `width_mult` is.

    Returns:
        The network in training mode, with channels_last weights.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> tuple(mobilenet_v2(num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape)
        (1, 10)
    """
    check_weights(weights)
    network = MobileNetV2(num_classes, width_mult, dropout, depth_mult, fix_stem_head)
    name = variant("mobilenet_v2", width_mult)
    if depth_mult != 1:
        name += f"_d{depth_mult}".replace(".", "_")
    return load(network, name, weights)


@register
def mobilenet_v2_x0_75(num_classes: int = 1000, weights: Any = None, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2 at width 0.75: 2,636,424 parameters, 209.07 M multiply-adds at 224x224. See `mobilenet_v2`."""
    return mobilenet_v2(0.75, num_classes, weights, dropout)


@register
def mobilenet_v2_x1_4(num_classes: int = 1000, weights: Any = None, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2 at width 1.4: 6,108,776 parameters, 582.20 M multiply-adds at 224x224. See `mobilenet_v2`."""
    return mobilenet_v2(1.4, num_classes, weights, dropout)
