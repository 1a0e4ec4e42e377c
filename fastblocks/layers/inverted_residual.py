"""MobileNetV2's block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastblocks.layers.base import Fused, Op
from fastblocks.layers.conv import DepthwiseConvBNAct, PointwiseConvBNAct, block_units, positive
from fastblocks.layers.fuse import Unit, depthwise_reason, pointwise_reason
from fastblocks.layers.train import Builder


class InvertedResidual(Fused):
    """Inverted residual with linear bottleneck (Sandler et al. 2018, section 3.3), as one op where it may be.

    1x1 expansion and 3x3 depthwise convolution, each with normalisation and ReLU6, a linear 1x1 projection with
    normalisation; plus the input where stride is 1 and the numbers of channels agree. Children, attributes and
    ``state_dict`` keys are those of torchvision's block.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2, of the depthwise convolution.
        expand_ratio: the expanded tensor has ``round(in_channels * expand_ratio)`` channels; with 1 there is none.
        norm_layer: makes a normalisation from the number of channels; None is nn.BatchNorm2d.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> block = InvertedResidual(32, 32, stride=1, expand_ratio=6).eval()
        >>> tuple(block(torch.ones(1, 32, 14, 14)).shape)
        (1, 32, 14, 14)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 6,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        in_channels = positive("in_channels", in_channels)
        out_channels = positive("out_channels", out_channels)
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
        if isinstance(expand_ratio, bool) or not isinstance(expand_ratio, (int, float)):
            raise TypeError(f"expand_ratio: expected a number, got {type(expand_ratio).__name__} {expand_ratio!r}")
        if not 0 < expand_ratio < float("inf") or round(in_channels * expand_ratio) < 1:
            raise ValueError(f"expand_ratio: expected a number that leaves a channel or more, got {expand_ratio!r}")
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        hidden = round(in_channels * expand_ratio)
        children: list[nn.Module] = []
        if expand_ratio != 1:
            children.append(PointwiseConvBNAct(in_channels, hidden, norm_layer=norm_layer))
        children += [
            DepthwiseConvBNAct(hidden, stride=stride, norm_layer=norm_layer),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            norm_layer(out_channels),
        ]
        self.conv = nn.Sequential(*children)
        self.stride = stride
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.out_channels = out_channels
        self._is_cn = stride > 1

    def _containers(self) -> tuple[tuple[str, nn.Module], ...]:
        conv: Any = self._modules["conv"]
        blocks = list(conv._modules.items())[:-2]
        return (("conv", conv), *((f"conv.{name}", block) for name, block in blocks))

    def _units(self) -> tuple[Unit, ...] | str:
        conv: Any = self._modules.get("conv")
        if type(conv) is not nn.Sequential:
            return f"conv is a {type(conv).__name__}, not an nn.Sequential"
        children = list(conv._modules.items())
        if len(self._modules) != 1 or len(children) not in (3, 4):
            return "the layer has other children than it was built with"
        *blocks, (_, project), (_, bn) = children
        units: list[Unit] = []
        for name, block in blocks:
            found = block_units(block, f"conv.{name}")
            if isinstance(found, str):
                return found
            units += found
        if project is None or bn is None:
            return "the layer has other children than it was built with"
        return (*units, Unit(f"conv.{len(children) - 2}", project, bn, None))

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        *expand, depthwise, project = units
        reason = depthwise_reason(depthwise)
        for unit in (*expand, project):
            reason = reason or pointwise_reason(unit)
        if reason is not None:
            return reason
        conv: Any = depthwise.conv
        kernel, stride, padding = conv.weight.shape[2], conv.stride[0], conv.padding[0]
        activation = depthwise.activation()
        if expand and expand[0].activation() != activation:
            return "the two activations differ"
        residual = bool(self.use_res_connect)
        first: Any = units[0].conv
        last: Any = project.conv
        same = first.weight.shape[1] * first.groups == last.weight.shape[0]
        if residual and (stride != 1 or 2 * padding != kernel - 1 or not same):
            return "the output has another shape than the input that it is added to"
        eps = [1e-5, *(unit.eps() for unit in units)][-3:]
        return Op(
            "inverted_residual",
            (tuple(eps), stride, padding, activation, residual),
            first=() if expand else ((),),
            least=(max(1, kernel - 2 * padding),) * 2,
        )

    def _describe(self, builder: Builder, value: int, units: tuple[Unit, ...]) -> int:
        result = super()._describe(builder, value, units)
        return builder.add(value, result, None) if self.use_res_connect else result

    def _run_children(self, x: Any) -> Any:
        y = self.conv(x)
        return x + y if self.use_res_connect else y
