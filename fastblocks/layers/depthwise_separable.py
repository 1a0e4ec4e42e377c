"""MobileNet's block."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastblocks.layers.base import Fused, Op
from fastblocks.layers.conv import DepthwiseConvBNAct, Layer, PointwiseConvBNAct, block_units, positive
from fastblocks.layers.fuse import Unit, depthwise_reason, pointwise_reason

_NAMES = ("depthwise", "pointwise")


class DepthwiseSeparableConv(Fused):
    """Depthwise separable convolution (Howard et al. 2017, section 3.1), as one op where it may be.

    A 3x3 depthwise convolution filters each channel, a 1x1 convolution mixes them; each has its normalisation and
    activation. Together they cost ``1 / out_channels + 1 / 9`` of the full 3x3 convolution. The children are
    ``depthwise`` and ``pointwise``, each with the keys of a `ConvBNAct`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: pixels, of the depthwise convolution.
        norm_layer: makes a normalisation from the number of channels; None is nn.BatchNorm2d.
        activation_layer: makes an activation; None for none.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> layer = DepthwiseSeparableConv(32, 64, stride=2).eval()
        >>> tuple(layer(torch.ones(1, 32, 14, 14)).shape)
        (1, 64, 7, 7)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        norm_layer: Layer | None = None,
        activation_layer: Layer | None = nn.ReLU6,
    ) -> None:
        super().__init__()
        in_channels = positive("in_channels", in_channels)
        out_channels = positive("out_channels", out_channels)
        stride = positive("stride", stride)
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.depthwise = DepthwiseConvBNAct(
            in_channels, stride=stride, norm_layer=norm_layer, activation_layer=activation_layer
        )
        self.pointwise = PointwiseConvBNAct(in_channels, out_channels, norm_layer, activation_layer)
        self.stride = stride
        self.out_channels = out_channels

    def _containers(self) -> tuple[tuple[str, nn.Module], ...]:
        return tuple(self._modules.items())  # type: ignore[arg-type]

    def _units(self) -> tuple[Unit, ...] | str:
        if tuple(self._modules) != _NAMES:
            return "the layer has other children than it was built with"
        units: list[Unit] = []
        for name, block in self._modules.items():
            found = block_units(block, name)
            if isinstance(found, str):
                return found
            units += found
        return tuple(units)

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        depthwise, pointwise = units
        reason = depthwise_reason(depthwise) or pointwise_reason(pointwise)
        if reason is not None:
            return reason
        if depthwise.activation() != pointwise.activation():
            return "the two activations differ"
        conv: Any = depthwise.conv
        kernel, stride, padding = conv.weight.shape[2], conv.stride[0], conv.padding[0]
        eps = tuple(unit.eps() for unit in units)
        return Op(
            "depthwise_separable",
            (eps, stride, padding, depthwise.activation()),
            least=(max(1, kernel - 2 * padding),) * 2,
        )

    def _run_children(self, x: Any) -> Any:
        return self.pointwise(self.depthwise(x))
