"""MobileNet (Howard et al. 2017, table 1) on fused layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastblocks.layers import ConvBNAct, DepthwiseSeparableConv, Sequential
from fastblocks.layers.chain import Trunk
from fastblocks.layers.conv import positive
from fastblocks.layers.head import Classifier
from fastblocks.models.common import channels_last, check_weights, initialise, load, multiplier, round_channels, variant
from fastblocks.models.registry import register

BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Rows of the paper's table 1: output channels and stride. (The stride 2 that it prints for the last is a misprint.)"""

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


class MobileNetV1(Trunk):
    """MobileNet; `mobilenet_v1` builds it.

    The children are ``features``, a stem and thirteen `fastblocks.DepthwiseSeparableConv`, and ``classifier``.

    Args:
        num_classes: outputs of the classifier.
        width_mult: multiplies every number of channels, which is then rounded to a multiple of 8.
        activation: ``"relu6"`` or ``"relu"``.
        dropout: probability in front of the classifier, in training.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """

    TRUNK = ("features",)

    def __init__(
        self, num_classes: int = 1000, width_mult: float = 1.0, activation: str = "relu6", dropout: float = 0.001
    ) -> None:
        super().__init__()
        num_classes = positive("num_classes", num_classes)
        width_mult = multiplier("width_mult", width_mult)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: expected 'relu6' or 'relu', got {activation!r}")
        act = _ACTIVATIONS[activation]
        channels = round_channels(32 * width_mult)
        layers: list[nn.Module] = [ConvBNAct(3, channels, stride=2, activation_layer=act)]
        for width, stride in BLOCKS:
            out = round_channels(width * width_mult)
            layers.append(DepthwiseSeparableConv(channels, out, stride, activation_layer=act))
            channels = out
        self.features = Sequential(*layers)
        self.classifier = Classifier(channels, num_classes, dropout)
        initialise(self)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        result: Tensor = self.classify(self.classifier, x)
        return result


@register
def mobilenet_v1(
    width_mult: float = 1.0,
    num_classes: int = 1000,
    weights: Any = None,
    activation: str = "relu6",
    dropout: float = 0.001,
) -> MobileNetV1:
    """MobileNet (Howard et al. 2017): 4,231,976 parameters, 568.74 M multiply-adds at width 1 and 224x224.

    Args:
        width_mult: multiplies every number of channels.
        num_classes: outputs of the classifier.
        weights: None for random ones, or the path of a ``.pth`` or ``.safetensors`` file: of this network's or of
            timm's ``mobilenetv1_100``.
        activation: ``"relu6"``, which timm's weights were trained with, or ``"relu"``, which the paper prints.
        dropout: probability in front of the classifier, in training.

    Returns:
        The network in training mode, with channels_last weights.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> tuple(mobilenet_v1(0.25, num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape)
        (1, 10)
    """
    check_weights(weights)
    network = MobileNetV1(num_classes, width_mult, activation, dropout)
    return load(network, variant("mobilenet_v1", width_mult), weights)


@register
def mobilenet_v1_x0_75(
    num_classes: int = 1000, weights: Any = None, activation: str = "relu6", dropout: float = 0.001
) -> MobileNetV1:
    """MobileNet at width 0.75: 2,585,560 parameters, 325.40 M multiply-adds at 224x224. See `mobilenet_v1`."""
    return mobilenet_v1(0.75, num_classes, weights, activation, dropout)


@register
def mobilenet_v1_x0_5(
    num_classes: int = 1000, weights: Any = None, activation: str = "relu6", dropout: float = 0.001
) -> MobileNetV1:
    """MobileNet at width 0.5: 1,331,592 parameters, 149.50 M multiply-adds at 224x224. See `mobilenet_v1`."""
    return mobilenet_v1(0.5, num_classes, weights, activation, dropout)


@register
def mobilenet_v1_x0_25(
    num_classes: int = 1000, weights: Any = None, activation: str = "relu6", dropout: float = 0.001
) -> MobileNetV1:
    """MobileNet at width 0.25: 470,072 parameters, 41.03 M multiply-adds at 224x224. See `mobilenet_v1`."""
    return mobilenet_v1(0.25, num_classes, weights, activation, dropout)
