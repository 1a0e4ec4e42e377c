"""MobileNetV2 in plain torch modules: what the timings compare with, and nothing of fastblocks in it.

Layer for layer what torchvision runs, under torchvision's state_dict keys (Sandler et al., MobileNetV2, 2018, table 2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["StockMobileNetV2", "has_stock", "stock_model"]

STRIDE_TWO = (2, 4, 7, 14)  # the blocks, counted from 1, that halve the picture


class StockMobileNetV2(nn.Module):
    """The network whose weights `state_dict` holds; widths and the number of classes are read off its shapes."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, len(state_dict["features.0.0.weight"]), 3, stride=2)]
        while (prefix := f"features.{len(layers)}.conv") + ".0.0.weight" in state_dict:
            layers.append(_Block(state_dict, prefix, stride=2 if len(layers) in STRIDE_TWO else 1))
        out_channels, in_channels = state_dict[f"features.{len(layers)}.0.weight"].shape[:2]
        layers.append(_conv_bn_relu6(in_channels, out_channels, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(out_channels, len(state_dict["classifier.1.bias"])))
        self.load_state_dict(state_dict)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class _Block(nn.Module):
    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        first = state_dict[f"{prefix}.0.0.weight"]
        expands = first.shape[-1] == 1
        hidden = len(first)
        project = state_dict[f"{prefix}.{1 + expands}.weight"]
        in_channels = first.shape[1] if expands else hidden
        layers = [_conv_bn_relu6(in_channels, hidden, 1)] if expands else []
        layers += [_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, len(project), 1, bias=False), nn.BatchNorm2d(len(project)))
        self.skip = stride == 1 and in_channels == len(project)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))


def has_stock(name: str) -> bool:
    """Whether `stock_model` knows the network."""
    return name.startswith("mobilenet_v2")


def stock_model(
    state_dict: Mapping[str, Tensor], memory_format: torch.memory_format = torch.contiguous_format
) -> nn.Module:
    """Build the plain network with these weights, in eval mode and in the given layout."""
    return StockMobileNetV2(state_dict).eval().to(memory_format=memory_format)
