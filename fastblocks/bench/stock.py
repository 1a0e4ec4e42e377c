"""The networks in plain torch modules: what the timings compare with, and nothing of fastblocks in it.

Widths, groups and the number of classes are read off a state_dict, whose keys are those of `fastblocks.models`. For
MobileNetV2 and ShuffleNetV2 these are torchvision's, and so are the layers (Sandler et al. 2018, table 2; Ma et al.
2018, table 5). MobileNet is after Howard et al. 2017, table 1, with ReLU6, ShuffleNet after Zhang et al. 2017, table 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["stock_model"]

Weights = Mapping[str, Tensor]

V1_STRIDE_TWO = (2, 4, 6, 12)  # the blocks of MobileNet, counted from 1, that halve the picture
V2_STRIDE_TWO = (2, 4, 7, 14)  # those of MobileNetV2
STAGES = ("stage2", "stage3", "stage4")  # of both ShuffleNets


def stock_model(state_dict: Weights, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """Build the plain network with these weights, in eval mode and in the given layout."""
    if "conv5.0.weight" in state_dict:
        network: nn.Module = _ShuffleNet(state_dict, _UnitV2)
    elif "conv1.0.weight" in state_dict:
        network = _ShuffleNet(state_dict, _Unit)
    elif "features.1.depthwise.0.weight" in state_dict:
        network = _MobileNet(state_dict, _separable, V1_STRIDE_TWO)
    else:
        network = _MobileNet(state_dict, _InvertedResidual, V2_STRIDE_TWO)
    network.load_state_dict(state_dict)
    return network.eval().to(memory_format=memory_format)


def _below(state_dict: Weights, prefix: str) -> dict[str, Tensor]:
    """The entries below a child, by the names that they have in it."""
    return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}


def _conv_bn(
    weight: Tensor, activation: type[nn.Module] | None, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    """Convolution, BatchNorm and activation for a weight of this shape."""
    out_channels, fan, k, _ = weight.shape
    conv = nn.Conv2d(fan * groups, out_channels, k, stride, k // 2, groups=groups, bias=False)
    act = () if activation is None else (activation(inplace=True),)
    return (conv, nn.BatchNorm2d(out_channels), *act)


def _linear(state_dict: Weights, name: str) -> nn.Linear:
    classes, features = state_dict[f"{name}.weight"].shape
    return nn.Linear(features, classes, bias=f"{name}.bias" in state_dict)


# --- MobileNet and MobileNetV2


class _MobileNet(nn.Module):
    def __init__(
        self, state_dict: Weights, block: Callable[[Weights, int], nn.Module], strides_two: tuple[int, ...]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*_conv_bn(state_dict["features.0.0.weight"], nn.ReLU6, 2))]
        while entries := _below(state_dict, f"features.{len(layers)}."):
            if "0.weight" in entries:
                layers.append(nn.Sequential(*_conv_bn(entries["0.weight"], nn.ReLU6)))
            else:
                layers.append(block(entries, 2 if len(layers) in strides_two else 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), _linear(state_dict, "classifier.1"))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def _separable(entries: Weights, stride: int) -> nn.Module:
    depthwise, pointwise = entries["depthwise.0.weight"], entries["pointwise.0.weight"]
    block = nn.Sequential()
    block.add_module("depthwise", nn.Sequential(*_conv_bn(depthwise, nn.ReLU6, stride, groups=len(depthwise))))
    block.add_module("pointwise", nn.Sequential(*_conv_bn(pointwise, nn.ReLU6)))
    return block


class _InvertedResidual(nn.Module):
    def __init__(self, entries: Weights, stride: int) -> None:
        super().__init__()
        first = entries["conv.0.0.weight"]
        expands = first.shape[-1] == 1
        hidden = len(first)
        depthwise, project = entries[f"conv.{int(expands)}.0.weight"], entries[f"conv.{1 + expands}.weight"]
        layers: list[nn.Module] = [nn.Sequential(*_conv_bn(first, nn.ReLU6))] if expands else []
        layers.append(nn.Sequential(*_conv_bn(depthwise, nn.ReLU6, stride, groups=hidden)))
        self.conv = nn.Sequential(*layers, *_conv_bn(project, None))
        self.skip = stride == 1 and (first.shape[1] if expands else hidden) == len(project)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


# --- ShuffleNet and ShuffleNetV2


class _ShuffleNet(nn.Module):
    def __init__(self, state_dict: Weights, unit: Callable[[Weights, int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_bn(state_dict["conv1.0.weight"], nn.ReLU, 2))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2, self.stage3, self.stage4 = (_stage(_below(state_dict, f"{stage}."), unit) for stage in STAGES)
        last = state_dict.get("conv5.0.weight")
        self.conv5 = nn.Identity() if last is None else nn.Sequential(*_conv_bn(last, nn.ReLU))
        self.fc = _linear(state_dict, "fc")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(x.mean([2, 3]))


def _stage(entries: Weights, unit: Callable[[Weights, int], nn.Module]) -> nn.Sequential:
    units: list[nn.Module] = []
    while below := _below(entries, f"{len(units)}."):
        units.append(unit(below, 1 if units else 2))
    return nn.Sequential(*units)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    n, channels, height, width = x.shape
    x = x.view(n, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(n, channels, height, width)


class _Unit(nn.Module):
    def __init__(self, entries: Weights, stride: int) -> None:
        super().__init__()
        compress, depthwise, expand = (entries[f"{name}.0.weight"] for name in ("compress", "depthwise", "expand"))
        self.groups = len(compress) // expand.shape[1]
        # at stride 2, what the branch lacks of four bottlenecks is the input's
        in_channels = len(expand) if stride == 1 else 4 * len(compress) - len(expand)
        self.compress = nn.Sequential(*_conv_bn(compress, nn.ReLU, groups=in_channels // compress.shape[1]))
        self.depthwise = nn.Sequential(*_conv_bn(depthwise, None, stride, groups=len(depthwise)))
        self.expand = nn.Sequential(*_conv_bn(expand, None, groups=self.groups))
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(_shuffle(self.compress(x), self.groups)))
        if self.pool is None:
            return nn.functional.relu_(x + y)
        return torch.cat((self.pool(x), nn.functional.relu_(y)), 1)


class _UnitV2(nn.Module):
    def __init__(self, entries: Weights, stride: int) -> None:
        super().__init__()
        left: list[nn.Module] = []
        if stride == 2:
            first = entries["branch1.0.weight"]
            left = [*_conv_bn(first, None, 2, groups=len(first)), *_conv_bn(entries["branch1.2.weight"], nn.ReLU)]
        depthwise = entries["branch2.3.weight"]
        self.branch1 = nn.Sequential(*left)
        self.branch2 = nn.Sequential(
            *_conv_bn(entries["branch2.0.weight"], nn.ReLU),
            *_conv_bn(depthwise, None, stride, groups=len(depthwise)),
            *_conv_bn(entries["branch2.5.weight"], nn.ReLU),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.stride == 1 else (self.branch1(x), x)
        return _shuffle(torch.cat((left, self.branch2(right)), 1), 2)
