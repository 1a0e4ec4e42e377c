"""ShuffleNet (Zhang et al. 2017, table 1) on fused layers.

Two conventions of the channel shuffle are in use. With g groups of n channels each, the paper, and torch's
``nn.ChannelShuffle``, reshape the channels to ``(g, n)``, transpose and flatten: ``shuffle="gn"``, the default. Other
implementations, the authors' own among them, reshape to ``(n, g)``: ``shuffle="ng"``. The one permutation is the
inverse of the other, and the shapes in a ``state_dict`` are the same; so a checkpoint of the one loads into the other
without a word and gives other logits. `fastblocks.models.convert_shuffle` makes a checkpoint of the one into one of
the other where the group convolutions allow it: with 1, 2 or 3 groups at every width. With 4 or 8 groups, build the
network with ``shuffle="ng"``; its units then are several ops each.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fastblocks.layers import ConvBNAct, MaxPool2d, Sequential, ShuffleUnit
from fastblocks.layers.chain import Trunk
from fastblocks.layers.conv import positive
from fastblocks.layers.head import Linear
from fastblocks.models.common import channels_last, check_weights, initialise, load, multiplier, variant
from fastblocks.models.registry import register

WIDTHS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
"""Groups -> output channels of stage 2; every further stage has twice as many."""

STEM = 24
REPEATS = (4, 8, 4)
"""Units of the three stages; the first of each has stride 2."""


def stage_width(groups: int, width_mult: float) -> int:
    """Output channels of stage 2, or a ValueError that says why there can be no such network.

    Example:
        >>> stage_width(3, 0.5)
        120
    """
    if groups not in WIDTHS:
        raise ValueError(f"groups: expected one of {', '.join(map(str, WIDTHS))}, got {groups!r}")
    product = WIDTHS[groups] * width_mult
    width = round(product)
    if abs(product - width) > 1e-6:
        raise ValueError(
            f"width_mult: expected a whole number of channels, got {width_mult!r}, "
            f"which leaves {product:g} of the {WIDTHS[groups]} of stage 2 with groups = {groups}"
        )
    if width % (4 * groups):
        raise ValueError(
            f"width_mult: expected a quarter of the width to be divisible by groups = {groups}, got {width_mult!r}: "
            f"stage 2 has {width} channels, and {width} / 4 = {width / 4:g} is not"
        )
    return width


def stem_width(groups: int, width_mult: float) -> int:
    """Output channels of the stem: 24 at width 1, never a fraction more, and `groups` divides them.

    Example:
        >>> [stem_width(3, 0.5), stem_width(8, 0.5), stem_width(3, 1.5), stem_width(3, 2.0)]
        [12, 16, 24, 48]
    """
    factor = width_mult if width_mult < 1 else math.floor(width_mult)
    return math.ceil(STEM * factor / groups) * groups


class ShuffleNetV1(Trunk):
    """ShuffleNet; `shufflenet_v1` builds it.

    The children are ``conv1``, ``maxpool``, ``stage2`` to ``stage4`` of `fastblocks.ShuffleUnit`, and ``fc``.

    Args:
        num_classes: outputs of the classifier.
        groups: of the 1x1 convolutions: 1, 2, 3, 4 or 8.
        width_mult: multiplies the numbers of channels, of which a quarter must be divisible by `groups`.
        fc_bias: whether the classifier has a bias.
        shuffle: ``"gn"`` or ``"ng"``, the convention of the channel shuffle.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """

    TRUNK = ("conv1", "maxpool", "stage2", "stage3", "stage4")

    def __init__(
        self,
        num_classes: int = 1000,
        groups: int = 3,
        width_mult: float = 1.0,
        fc_bias: bool = True,
        shuffle: str = "gn",
    ) -> None:
        super().__init__()
        num_classes = positive("num_classes", num_classes)
        width_mult = multiplier("width_mult", width_mult)
        width = stage_width(positive("groups", groups), width_mult)
        if shuffle not in ("gn", "ng"):
            raise ValueError(f"shuffle: expected 'gn' or 'ng', got {shuffle!r}")
        channels = stem_width(groups, width_mult)
        self.conv1 = ConvBNAct(3, channels, stride=2, activation_layer=nn.ReLU)
        self.maxpool = MaxPool2d(3, 2, 1)
        stages: list[Sequential] = []
        for repeats in REPEATS:
            other = width // 4 // groups if shuffle == "ng" else groups
            first = ShuffleUnit(channels, width, 2, groups, first_grouped=bool(stages), shuffle_groups=other)
            rest = (ShuffleUnit(width, width, 1, groups, shuffle_groups=other) for _ in range(repeats - 1))
            stages.append(Sequential(first, *rest))
            channels, width = width, 2 * width
        self.stage2, self.stage3, self.stage4 = stages
        self.fc = Linear(channels, num_classes, bias=bool(fc_bias))
        initialise(self)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        result: Tensor = self.classify(self.fc, x)
        return result


def shufflenet_v1(
    groups: int = 3,
    width_mult: float = 1.0,
    num_classes: int = 1000,
    weights: Any = None,
    fc_bias: bool = True,
    shuffle: str = "gn",
) -> ShuffleNetV1:
    """ShuffleNet (Zhang et al. 2017), 137.46 M multiply-adds at 3 groups, width 1 and 224x224.

    Args:
        groups: of the 1x1 convolutions: 1, 2, 3, 4 or 8.
        width_mult: multiplies the numbers of channels; a quarter of them must be divisible by `groups`.
        num_classes: outputs of the classifier.
        weights: None for random ones, or the path of a ``.pth`` or ``.safetensors`` file.
        fc_bias: whether the classifier has a bias. (The paper's counts of parameters have none.)
        shuffle: the convention of the channel shuffle: ``"gn"`` as in the paper, or ``"ng"``, its inverse.
            `fastblocks.models.convert_shuffle` has checkpoints of the one run under the other.

    Returns:
        The network in training mode, with channels_last weights.

    Raises:
        ValueError, TypeError: an argument that does not fit, or a width that cannot be built without rounding; the
            message names it.

    Example:
        >>> import torch
        >>> tuple(shufflenet_v1(groups=3, num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape)
        (1, 10)
        >>> shufflenet_v1(groups=2, width_mult=0.5)
        Traceback (most recent call last):
        ...
        ValueError: width_mult: expected a quarter of the width to be divisible by groups = 2, got 0.5: stage 2 has \
100 channels, and 100 / 4 = 25 is not
    """
    check_weights(weights)
    network = ShuffleNetV1(num_classes, groups, width_mult, fc_bias, shuffle)
    return load(network, variant(f"shufflenet_v1_g{groups}", width_mult), weights)


@register
def shufflenet_v1_g1(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 1x with 1 group: 1,531,936 parameters, 143.08 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(1, 1.0, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g2(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 1x with 2 groups: 1,733,848 parameters, 140.84 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(2, 1.0, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g3(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 1x with 3 groups: 1,865,728 parameters, 137.46 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(3, 1.0, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g4(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 1x with 4 groups: 1,968,344 parameters, 134.34 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(4, 1.0, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g8(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 1x with 8 groups: 2,434,768 parameters, 138.37 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(8, 1.0, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g3_x0_5(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 0.5x with 3 groups: 718,324 parameters, 37.59 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(3, 0.5, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g8_x0_5(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 0.5x with 8 groups: 1,011,448 parameters, 40.47 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(8, 0.5, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g3_x1_5(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 1.5x with 3 groups: 3,442,168 parameters, 292.44 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(3, 1.5, num_classes, weights, fc_bias, shuffle)


@register
def shufflenet_v1_g3_x2_0(
    num_classes: int = 1000, weights: Any = None, fc_bias: bool = True, shuffle: str = "gn"
) -> ShuffleNetV1:
    """ShuffleNet 2x with 3 groups: 5,450,776 parameters, 524.05 M multiply-adds at 224x224. See `shufflenet_v1`."""
    return shufflenet_v1(3, 2.0, num_classes, weights, fc_bias, shuffle)
