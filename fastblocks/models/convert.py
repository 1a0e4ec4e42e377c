"""Checkpoints of other implementations, made into ours: timm's names, and the other channel shuffle."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastblocks.layers.conv import positive

_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)")
_TIMM_SEPARABLE_V1 = {"conv_dw": "depthwise.0", "bn1": "depthwise.1", "conv_pw": "pointwise.0", "bn2": "pointwise.1"}
_TIMM_SEPARABLE_V2 = {"conv_dw": "conv.0.0", "bn1": "conv.0.1", "conv_pw": "conv.1", "bn2": "conv.2"}
_TIMM_INVERTED = {
    "conv_pw": "conv.0.0",
    "bn1": "conv.0.1",
    "conv_dw": "conv.1.0",
    "bn2": "conv.1.1",
    "conv_pwl": "conv.2",
    "bn3": "conv.3",
}
_UNIT = re.compile(r"(stage\d+\.\d+)\.compress\.0\.weight")


def is_timm(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a MobileNet or MobileNetV2 of timm's.

    Example:
        >>> is_timm({"conv_stem.weight": torch.ones(1), "blocks.0.0.conv_dw.weight": torch.ones(1)})
        True
    """
    return "conv_stem.weight" in state_dict and "blocks.0.0.conv_dw.weight" in state_dict


def from_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of timm's ``mobilenetv1_*`` or ``mobilenetv2_*`` under the keys of this package's networks.

    timm numbers the blocks by stages and names the layers of a block; here the blocks are numbered through. The tensors
    stay as they are, and so does a key that belongs to neither network.

    Args:
        state_dict: names and tensors as timm has them.

    Returns:
        The same tensors in the same order, under the keys of `fastblocks.models.mobilenet_v1` or ``mobilenet_v2``.

    Example:
        >>> list(from_timm({"conv_stem.weight": torch.ones(1), "blocks.0.0.conv_dw.weight": torch.ones(1)}))
        ['features.0.0.weight', 'features.1.depthwise.0.weight']
    """
    found = [_TIMM_BLOCK.fullmatch(key) for key in state_dict]
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    inverted = {(int(match[1]), int(match[2])) for match in found if match and match[3] == "conv_pwl"}
    separable = _TIMM_SEPARABLE_V2 if inverted else _TIMM_SEPARABLE_V1
    head = f"features.{len(blocks) + 1}"
    outside = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    if inverted:
        outside |= {"conv_head": f"{head}.0", "bn2": f"{head}.1"}

    renamed: dict[str, Tensor] = {}
    for (key, tensor), match in zip(state_dict.items(), found, strict=True):
        if match:
            block = int(match[1]), int(match[2])
            layer = (_TIMM_INVERTED if block in inverted else separable).get(match[3])
            new = None if layer is None else f"features.{1 + blocks.index(block)}.{layer}.{match[4]}"
        else:
            layer, _, last = key.rpartition(".")
            new = f"{outside[layer]}.{last}" if layer in outside else None
        renamed[key if new is None else new] = tensor
    return renamed


def convert_shuffle(state_dict: Mapping[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Make a ShuffleNet checkpoint of the ``(n, g)`` shuffle one of the ``(g, n)`` shuffle: the same logits from both.

    With g groups of n channels each, one convention of the channel shuffle reshapes the channels to ``(n, g)``,
    transposes and flattens, the other, the paper's and ours, begins with ``(g, n)``; they are inverse permutations. So
    the channels between the two 1x1 convolutions are put into another order: the outputs of the first within each of
    its groups, the depthwise convolution's, and the inputs of the second within each of its groups.

    That suffices where both shuffles send equally many channels from each group to each group. It is so with 1, 2 and 3
    groups, and with more where g divides n. Elsewhere the two networks are different ones, which no order of channels
    makes equal; the standard widths with 4 and 8 groups have such units. ``shufflenet_v1(..., shuffle="ng")`` runs
    those checkpoints as they are.

    Args:
        state_dict: of `fastblocks.models.shufflenet_v1`, by its keys, trained with the ``(n, g)`` shuffle.
        groups: of the network.

    Returns:
        A new dictionary; the tensors that change are copies.

    Raises:
        ValueError: these are no ShuffleNet's keys, `groups` does not fit, or no order of channels does it.

    Example:
        >>> import fastblocks
        >>> theirs = fastblocks.models.shufflenet_v1(groups=3, num_classes=5, shuffle="ng").eval()
        >>> ours = fastblocks.models.shufflenet_v1(groups=3, num_classes=5).eval()
        >>> _ = ours.load_state_dict(convert_shuffle(theirs.state_dict(), groups=3))
        >>> x = torch.randn(1, 3, 32, 32)
        >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
        True
    """
    groups = positive("groups", groups)
    units = [match[1] for match in map(_UNIT.fullmatch, state_dict) if match]
    if not units:
        raise ValueError(
            "state_dict: expected the keys of a ShuffleNetV1, got none such as 'stage2.0.compress.0.weight'"
        )
    converted = dict(state_dict)
    for unit in units:
        channels = len(state_dict[f"{unit}.compress.0.weight"])
        if channels % groups:
            raise ValueError(f"groups: expected a divisor of the {channels} channels of {unit}.compress, got {groups}")
        # the first convolution behind the stem has one group
        first, second = _orders(unit, channels, groups, 1 if unit == "stage2.0" else groups)
        for block, order in (("compress", first), ("depthwise", second)):
            for key, tensor in state_dict.items():
                if key.startswith(f"{unit}.{block}.") and tensor.dim():
                    converted[key] = tensor[order]
        key = f"{unit}.expand.0.weight"
        each = channels // groups
        parts = zip(state_dict[key].chunk(groups), second.view(groups, each) % each, strict=True)
        converted[key] = torch.cat([part[:, order] for part, order in parts])
    return converted


def _orders(unit: str, channels: int, groups: int, first_groups: int) -> tuple[Tensor, Tensor]:
    """Where the new channels are among the old ones: before the shuffle, and behind it."""
    each = channels // groups
    ours = torch.arange(channels).view(groups, each).t().flatten()
    theirs = torch.arange(channels).view(each, groups).t().flatten()
    to = torch.arange(channels) // each
    # from which group to which group each place behind the shuffle takes its channel
    ours_way, theirs_way = (to * first_groups + source // (channels // first_groups) for source in (ours, theirs))
    ours_places, theirs_places = ours_way.argsort(stable=True), theirs_way.argsort(stable=True)
    if not torch.equal(ours_way[ours_places], theirs_way[theirs_places]):
        raise ValueError(
            f"groups: no order of channels turns one shuffle of {unit} into the other with groups of {each} channels, "
            f"got {groups}: build the network with shuffle='ng' instead"
        )
    second = torch.empty_like(ours)
    second[ours_places] = theirs_places
    first = torch.empty_like(ours)
    first[ours] = theirs[second]
    return first, second
