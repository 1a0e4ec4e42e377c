"""ShuffleNetV2 (Ma et al. 2018, table 5) on fused layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastblocks.layers import ConvBNAct, MaxPool2d, PointwiseConvBNAct, ShuffleUnitV2
from fastblocks.layers import Sequential as Layers
from fastblocks.layers.chain import Trunk
from fastblocks.layers.conv import positive
from fastblocks.layers.head import Linear
from fastblocks.models.common import channels_last, check_weights, initialise, load
from fastblocks.models.registry import register

STEM = 24
REPEATS = (4, 8, 4)
"""Units of the three stages; the first of each has stride 2."""


class ShuffleNetV2(Trunk):
    """ShuffleNetV2 with torchvision's children and ``state_dict`` keys; `shufflenet_v2_x1_0` and its like build it.

    The halves of a unit are those of ``chunk(2)``, and the shuffle ends the unit, as torchvision has it. A checkpoint
    that takes the even channels for the one half and the odd ones for the other is of another network.

    Args:
        widths: output channels of the three stages, even numbers.
        last_channel: output channels of the last convolution.
        num_classes: outputs of the classifier.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """

    TRUNK = ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")

    def __init__(self, widths: Sequence[int], last_channel: int = 1024, num_classes: int = 1000) -> None:
        super().__init__()
        num_classes = positive("num_classes", num_classes)
        last_channel = positive("last_channel", last_channel)
        if len(widths) != len(REPEATS):
            raise ValueError(f"widths: expected {len(REPEATS)} numbers of channels, got {widths!r}")
        for width in widths:
            if positive("widths", width) % 2:
                raise ValueError(f"widths: expected even numbers, for two halves, got {widths!r}")
        self.conv1 = ConvBNAct(3, STEM, stride=2, activation_layer=nn.ReLU)
        self.maxpool = MaxPool2d(3, 2, 1)
        self.stage2, self.stage3, self.stage4 = (
            Layers(ShuffleUnitV2(before, width, 2), *(ShuffleUnitV2(width, width, 1) for _ in range(repeats - 1)))
            for before, width, repeats in zip((STEM, *widths[:-1]), widths, REPEATS, strict=True)
        )
        self.conv5 = PointwiseConvBNAct(widths[-1], last_channel, activation_layer=nn.ReLU)
        self.fc = Linear(last_channel, num_classes)
        initialise(self)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        result: Tensor = self.classify(self.fc, x)
        return result


def _build(
    name: str, widths: tuple[int, int, int], num_classes: int, weights: Any, last_channel: int = 1024
) -> ShuffleNetV2:
    check_weights(weights)
    return load(ShuffleNetV2(widths, last_channel, num_classes), name, weights)


@register
def shufflenet_v2_x0_5(num_classes: int = 1000, weights: Any = None) -> ShuffleNetV2:
    """ShuffleNetV2 0.5x: 1,366,792 parameters, 40.48 M multiply-adds at 224x224. See `shufflenet_v2_x1_0`."""
    return _build("shufflenet_v2_x0_5", (48, 96, 192), num_classes, weights)


@register
def shufflenet_v2_x1_0(num_classes: int = 1000, weights: Any = None) -> ShuffleNetV2:
    """ShuffleNetV2 1x (Ma et al. 2018): 2,278,604 parameters, 144.91 M multiply-adds at 224x224.

    Args:
        num_classes: outputs of the classifier.
        weights: None for random ones, or the path of a ``.pth`` or ``.safetensors`` file: of this network's or of
            torchvision's.

    Returns:
        The network in training mode, with channels_last weights.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> tuple(shufflenet_v2_x1_0(num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape)
        (1, 10)
    """
    return _build("shufflenet_v2_x1_0", (116, 232, 464), num_classes, weights)


@register
def shufflenet_v2_x1_5(num_classes: int = 1000, weights: Any = None) -> ShuffleNetV2:
    """ShuffleNetV2 1.5x: 3,503,624 parameters, 295.76 M multiply-adds at 224x224. See `shufflenet_v2_x1_0`."""
    return _build("shufflenet_v2_x1_5", (176, 352, 704), num_classes, weights)


@register
def shufflenet_v2_x2_0(num_classes: int = 1000, weights: Any = None) -> ShuffleNetV2:
    """ShuffleNetV2 2x: 7,393,996 parameters, 583.25 M multiply-adds at 224x224. See `shufflenet_v2_x1_0`."""
    return _build("shufflenet_v2_x2_0", (244, 488, 976), num_classes, weights, last_channel=2048)
