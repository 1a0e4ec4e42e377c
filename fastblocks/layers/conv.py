"""Convolution, BatchNorm and activation as one layer."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastblocks.functional import checks
from fastblocks.layers.base import Fused, Op
from fastblocks.layers.fuse import Unit, groups_reason, is_depthwise, is_pointwise

Layer = Callable[..., nn.Module]
Pair = int | Sequence[int]


def positive(name: str, value: Any) -> int:
    """An int of at least 1, else a ValueError or TypeError that names the argument."""
    number = checks.integer(name, value)
    if not 1 <= number <= checks.LIMIT:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")
    return number


def _pair(name: str, value: Any, least: int = 1) -> tuple[int, int]:
    both = checks.pair(name, value)
    if not all(least <= number <= checks.LIMIT for number in both):
        raise ValueError(f"{name}: expected values of at least {least}, got {value!r}")
    return both


def _activation(layer: Layer) -> nn.Module:
    """The activation, in place where it can be."""
    try:
        known = inspect.signature(layer).parameters
    except (TypeError, ValueError):
        return layer()
    return layer(inplace=True) if "inplace" in known else layer()


class ConvBNAct(Fused, nn.Sequential):
    """Convolution, normalisation, activation, as one op where it may be.

    The children are those of torchvision's ``Conv2dNormActivation``: ``"0"`` an nn.Conv2d, ``"1"`` the normalisation,
    ``"2"`` the activation; so are the ``state_dict`` keys. In eval mode, on float32 CPU tensors, they run as one op;
    in training mode, and wherever anything looks into the children, they run as they are.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: pixels, one int or two (height, width).
        stride: pixels, one int or two.
        padding: pixels of zeros on each side; None keeps the size at stride 1 for odd kernels.
        dilation: pixels between the taps, one int or two.
        groups: groups of the convolution; equal to `in_channels` for a depthwise convolution.
        norm_layer: makes the normalisation from the number of channels; None for none.
        activation_layer: makes the activation; None for none.
        bias: whether the convolution has a bias; None: only where it has no normalisation.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> layer = ConvBNAct(3, 8, stride=2).eval()
        >>> tuple(layer(torch.ones(1, 3, 32, 32)).shape)
        (1, 8, 16, 16)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        norm_layer: Layer | None = nn.BatchNorm2d,
        activation_layer: Layer | None = nn.ReLU6,
        bias: bool | None = None,
    ) -> None:
        in_channels = positive("in_channels", in_channels)
        out_channels = positive("out_channels", out_channels)
        groups = positive("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"groups: expected a divisor of {name} = {channels}, got {groups}")
        kernel = _pair("kernel_size", kernel_size)
        spread = _pair("dilation", dilation)
        if padding is None:
            padding = tuple((k - 1) // 2 * d for k, d in zip(kernel, spread, strict=True))
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            _pair("stride", stride),
            _pair("padding", padding, least=0),
            dilation=spread,
            groups=groups,
            bias=norm_layer is None if bias is None else bool(bias),
        )
        children: list[nn.Module] = [conv]
        if norm_layer is not None:
            children.append(norm_layer(out_channels))
        if activation_layer is not None:
            children.append(_activation(activation_layer))
        super().__init__(*children)
        self.out_channels = out_channels

    def __getitem__(self, idx: Any) -> Any:
        # a slice of an nn.Sequential is made by its class from the children, which this class is not made from
        return sliced(self, idx) if isinstance(idx, slice) else super().__getitem__(idx)

    def _units(self) -> tuple[Unit, ...] | str:
        return units_of(self, "")

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        unit = units[0]
        conv: Any = unit.conv
        eps = unit.eps()
        if is_pointwise(conv):
            return Op("pointwise_conv_bn_act", (eps, unit.activation(), None))
        if conv.groups != 1 and not is_depthwise(conv):
            if not is_pointwise(conv, grouped=True):
                return groups_reason(unit)
            return Op("grouped_pointwise_conv_bn_act", (eps, conv.groups, 1, unit.activation(), None))
        name = "depthwise_conv_bn_act" if is_depthwise(conv) else "conv_bn_act"
        last = (eps, conv.stride, conv.padding, conv.dilation, unit.activation())
        size = conv.weight.shape[2:]
        height, width = (
            max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(size, conv.dilation, conv.padding, strict=True)
        )
        return Op(name, last, least=(height, width))

    def _run_children(self, x: Any) -> Any:
        return nn.Sequential.forward(self, x)


def sliced(layer: nn.Sequential, idx: slice) -> nn.Sequential:
    """Some of the children, sharing them, in a plain nn.Sequential."""
    return nn.Sequential(OrderedDict(list(layer._modules.items())[idx]))  # type: ignore[arg-type]


def units_of(layer: nn.Sequential, name: str) -> tuple[Unit, ...] | str:
    """The one convolution of a `ConvBNAct`, its normalisation and activation; or why there is none."""
    children = list(layer._modules.values())
    if not children or len(children) > 3 or any(child is None for child in children):
        return f"{name or 'the layer'} has {len(children)} children"
    conv: Any
    conv, *rest = children
    bn = act = None
    if rest and isinstance(rest[0], nn.modules.batchnorm._NormBase):
        bn = rest.pop(0)
    if rest:
        act = rest.pop(0)
    if rest:
        return f"{name or 'the layer'} has a {type(act).__name__} where a normalisation is expected"
    return (Unit(name, conv, bn, act),)


def block_units(block: nn.Module | None, name: str) -> tuple[Unit, ...] | str:
    """The one convolution of a layer's child that should be a `ConvBNAct`; or why there is none."""
    if not isinstance(block, ConvBNAct) or type(block).forward is not ConvBNAct.forward:
        return f"{name} is a {type(block).__name__}, not a ConvBNAct"
    return units_of(block, name)


class PointwiseConvBNAct(ConvBNAct):
    """1x1 convolution, normalisation, activation.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        norm_layer: makes the normalisation from the number of channels; None for none.
        activation_layer: makes the activation; None for none.
        bias: whether the convolution has a bias; None: only where it has no normalisation.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``.

    Example:
        >>> import torch
        >>> tuple(PointwiseConvBNAct(8, 24).eval()(torch.ones(1, 8, 4, 4)).shape)
        (1, 24, 4, 4)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_layer: Layer | None = nn.BatchNorm2d,
        activation_layer: Layer | None = nn.ReLU6,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, 1, norm_layer=norm_layer, activation_layer=activation_layer, bias=bias
        )


class DepthwiseConvBNAct(ConvBNAct):
    """Depthwise convolution (one filter a channel), normalisation, activation.

    Args:
        channels: channels of the input and of the output.
        kernel_size: pixels, one int or two (height, width).
        stride: pixels, one int or two.
        padding: pixels of zeros on each side; None keeps the size at stride 1 for odd kernels.
        dilation: pixels between the taps, one int or two.
        norm_layer: makes the normalisation from the number of channels; None for none.
        activation_layer: makes the activation; None for none.
        bias: whether the convolution has a bias; None: only where it has no normalisation.

    Shape:
        ``(N, channels, H, W)`` to ``(N, channels, H', W')``.

    Example:
        >>> import torch
        >>> tuple(DepthwiseConvBNAct(8, stride=2).eval()(torch.ones(1, 8, 4, 4)).shape)
        (1, 8, 2, 2)
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | None = None,
        dilation: Pair = 1,
        norm_layer: Layer | None = nn.BatchNorm2d,
        activation_layer: Layer | None = nn.ReLU6,
        bias: bool | None = None,
    ) -> None:
        channels = positive("channels", channels)
        super().__init__(
            channels, channels, kernel_size, stride, padding, dilation, channels, norm_layer, activation_layer, bias
        )
