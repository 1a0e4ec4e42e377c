"""The networks in torch's functions, written from the papers: what the networks of this package are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as tF
from conftest import settled
from torch import Tensor, nn


def lively(model: nn.Module) -> Any:
    """In eval mode, with weights that keep activations and gradients of a sensible size."""
    for module in settled(model).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.05)
    return model


class Plain:
    """torch's functions on the tensors of a state_dict; the layers are called by their names in it."""

    def __init__(self, state_dict: dict[str, Tensor], shuffle: str = "gn") -> None:
        self.tensors = {k: v.double() if v.is_floating_point() else v for k, v in state_dict.items()}
        self.other = shuffle == "ng"

    def conv(
        self, x: Tensor, name: str, stride: int = 1, groups: int = 1, act: Callable[..., Tensor] | None = None
    ) -> Tensor:
        conv, bn = name, name.rpartition(".")[0] + f".{int(name.rpartition('.')[2]) + 1}"
        weight = self.tensors[f"{conv}.weight"]
        x = tF.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        parts = (self.tensors[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = tF.batch_norm(x, *parts)
        return x if act is None else act(x)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return tF.linear(x.mean((2, 3)), self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        n, c, h, w = x.shape
        shape = (c // groups, groups) if self.other else (groups, c // groups)
        return x.reshape(n, *shape, h, w).transpose(1, 2).reshape(n, c, h, w)

    def mobilenet_v1(self, x: Tensor, act: Callable[..., Tensor] = tF.relu6) -> Tensor:
        x = self.conv(x, "features.0.0", 2, act=act)
        for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), 1):
            x = self.conv(x, f"features.{i}.depthwise.0", stride, x.shape[1], act)
            x = self.conv(x, f"features.{i}.pointwise.0", act=act)
        return self.linear(x, "classifier.1")

    def mobilenet_v2(self, x: Tensor) -> Tensor:
        x = self.conv(x, "features.0.0", 2, act=tF.relu6)
        for i, stride in enumerate((1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1), 1):
            y = x if i == 1 else self.conv(x, f"features.{i}.conv.0.0", act=tF.relu6)
            last = 1 if i == 1 else 2
            y = self.conv(y, f"features.{i}.conv.{last - 1}.0", stride, y.shape[1], tF.relu6)
            y = self.conv(y, f"features.{i}.conv.{last}")
            x = x + y if stride == 1 and x.shape == y.shape else y
        return self.linear(self.conv(x, "features.18.0", act=tF.relu6), "classifier.1")

    def shufflenet_v1(self, x: Tensor, groups: int) -> Tensor:
        x = tF.max_pool2d(self.conv(x, "conv1.0", 2, act=torch.relu), 3, 2, 1)
        for stage, repeats in ((2, 4), (3, 8), (4, 4)):
            for i in range(repeats):
                name = f"stage{stage}.{i}"
                first = (stage, i) == (2, 0)
                y = self.conv(x, f"{name}.compress.0", groups=1 if first else groups, act=torch.relu)
                y = self.shuffle(y, groups)
                y = self.conv(y, f"{name}.depthwise.0", 1 if i else 2, y.shape[1])
                y = self.conv(y, f"{name}.expand.0", groups=groups)
                x = torch.relu(x + y) if i else torch.cat((tF.avg_pool2d(x, 3, 2, 1), torch.relu(y)), 1)
        return self.linear(x, "fc")

    def shufflenet_v2(self, x: Tensor) -> Tensor:
        x = tF.max_pool2d(self.conv(x, "conv1.0", 2, act=torch.relu), 3, 2, 1)
        for stage, repeats in ((2, 4), (3, 8), (4, 4)):
            for i in range(repeats):
                name = f"stage{stage}.{i}"
                if i:
                    left, right = x.chunk(2, 1)
                else:
                    left = self.conv(x, f"{name}.branch1.0", 2, x.shape[1])
                    left, right = self.conv(left, f"{name}.branch1.2", act=torch.relu), x
                right = self.conv(right, f"{name}.branch2.0", act=torch.relu)
                right = self.conv(right, f"{name}.branch2.3", 1 if i else 2, right.shape[1])
                right = self.conv(right, f"{name}.branch2.5", act=torch.relu)
                x = self.shuffle(torch.cat((left, right), 1), 2)
        return self.linear(self.conv(x, "conv5.0", act=torch.relu), "fc")


def plainly(name: str, model: nn.Module, x: Tensor, shuffle: str = "gn") -> Tensor:
    """The logits of the plain network of this name with the model's weights, in float64."""
    network = Plain(model.state_dict(), shuffle)
    function = getattr(network, "_".join(name.split("_")[:2]))
    groups = (int(name.split("_g")[1].split("_")[0]),) if "_g" in name else ()
    with torch.no_grad():
        logits: Tensor = function(x.double(), *groups)
    return logits


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
