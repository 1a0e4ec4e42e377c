"""The ops for people: friendly arguments, checked once, differentiable, any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastblocks.functional import checks
from fastblocks.functional.dispatch import run
from fastblocks.functional.recall import recall
from fastblocks.functional.record import ConvBN

Pair = int | Sequence[int]


def _half(depthwise: ConvBN) -> int:
    """Half of a kernel: it keeps height and width at stride 1. Any number where the checks refuse the weight."""
    weight = depthwise.weight
    return weight.shape[2] // 2 if isinstance(weight, Tensor) and weight.dim() == 4 else 0


def conv_bn_act(
    input: Tensor,
    conv: ConvBN,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation: str | None = None,
) -> Tensor:
    """Dense convolution (groups = 1), BatchNorm with running statistics, activation.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        conv: weight ``(K, C, kh, kw)`` and the BatchNorm's vectors of length K.
        stride: pixels, one int or two (height, width).
        padding: pixels of zeros on each side, one int or two.
        dilation: pixels between the taps, one int or two.
        activation: None, ``"relu"`` or ``"relu6"``.

    Returns:
        ``(N, K, H', W')`` with ``H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1``. The memory format is
        channels_last if the input or the weight is channels_last, as torch has it.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> x, w = torch.ones(1, 3, 4, 4), torch.ones(8, 3, 3, 3)
        >>> y = conv_bn_act(x, ConvBN(w), stride=2, padding=1, activation="relu6")
        >>> tuple(y.shape), y.max().item()
        ((1, 8, 2, 2), 6.0)
    """
    given = (input, conv, stride, padding, dilation, activation)
    if (known := recall("conv_bn_act", *given)) is not None:
        return known
    conv = checks.record("conv", conv)
    tensors = conv[:6]
    args = (
        input,
        tensors,
        checks.eps_value("conv", conv.eps),
        checks.pair("stride", stride),
        checks.pair("padding", padding),
        checks.pair("dilation", dilation),
        activation,
    )
    checks.conv_bn_act(*args)
    return run("conv_bn_act", args, (input, *tensors), given)


def pointwise_conv_bn_act(
    input: Tensor, conv: ConvBN, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """1x1 convolution with stride 1, BatchNorm, residual, activation: ``act(bn(conv(input)) + residual)``.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        conv: weight ``(K, C, 1, 1)`` and the BatchNorm's vectors of length K.
        activation: None, ``"relu"`` or ``"relu6"``, after the sum.
        residual: ``(N, K, H, W)``, any memory format, or None.

    Returns:
        ``(N, K, H, W)``; the memory format is channels_last if input or weight is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 3, 2, 2)
        >>> pointwise_conv_bn_act(x, ConvBN(torch.ones(3, 3, 1, 1)), residual=x).unique().item()
        4.0
    """
    given = (input, conv, activation, residual)
    if (known := recall("pointwise_conv_bn_act", *given)) is not None:
        return known
    conv = checks.record("conv", conv)
    tensors = conv[:6]
    args = (input, tensors, checks.eps_value("conv", conv.eps), activation, residual)
    checks.pointwise_conv_bn_act(*args)
    return run("pointwise_conv_bn_act", args, (input, *tensors, residual), given)


def depthwise_conv_bn_act(
    input: Tensor,
    conv: ConvBN,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution (one filter a channel), BatchNorm with running statistics, activation.

    The first half of MobileNet's depthwise separable convolution (Howard et al. 2017, section 3.1).

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        conv: weight ``(C, 1, kh, kw)`` and the BatchNorm's vectors of length C.
        stride: pixels, one int or two (height, width).
        padding: pixels of zeros on each side, one int or two.
        dilation: pixels between the taps, one int or two.
        activation: None, ``"relu"`` or ``"relu6"``.

    Returns:
        ``(N, C, H', W')``, sizes and memory format as `conv_bn_act` has them.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> y = depthwise_conv_bn_act(torch.ones(1, 2, 3, 3), ConvBN(torch.ones(2, 1, 3, 3)), padding=1)
        >>> y[0, 0].tolist()
        [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    given = (input, conv, stride, padding, dilation, activation)
    if (known := recall("depthwise_conv_bn_act", *given)) is not None:
        return known
    conv = checks.record("conv", conv)
    tensors = conv[:6]
    args = (
        input,
        tensors,
        checks.eps_value("conv", conv.eps),
        checks.pair("stride", stride),
        checks.pair("padding", padding),
        checks.pair("dilation", dilation),
        activation,
    )
    checks.depthwise_conv_bn_act(*args)
    return run("depthwise_conv_bn_act", args, (input, *tensors), given)


def inverted_residual(
    input: Tensor,
    expand: ConvBN | None,
    depthwise: ConvBN,
    project: ConvBN,
    *,
    stride: int = 1,
    padding: int | None = None,
    activation: str | None = "relu6",
    residual: bool = False,
) -> Tensor:
    """MobileNetV2's block (Sandler et al. 2018, section 3.3) as one op; the expanded tensor need not exist in memory.

    1x1 expansion and k x k depthwise convolution, each with BatchNorm and activation, then a linear 1x1 projection
    with BatchNorm, then the sum with the input.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        expand: weight ``(E, C, 1, 1)``, or None where the block does not expand (E = C).
        depthwise: weight ``(E, 1, k, k)``.
        project: weight ``(K, E, 1, 1)``.
        stride: of the depthwise convolution, in pixels.
        padding: of the depthwise convolution, in pixels; None is ``k // 2``.
        activation: None, ``"relu"`` or ``"relu6"``; after expand and depthwise, never after project.
        residual: whether the input is added to the output, which must have its shape then.

    Returns:
        ``(N, K, H', W')``; the memory format is that of the three convolutions one after the other.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 4, 5, 5)
        >>> tuple(inverted_residual(x, None, ConvBN(torch.ones(4, 1, 3, 3)), ConvBN(torch.ones(8, 4, 1, 1))).shape)
        (1, 8, 5, 5)
    """
    given = (input, expand, depthwise, project, stride, padding, activation, residual)
    if (known := recall("inverted_residual", *given)) is not None:
        return known
    wide: tuple[Any, ...] = ()
    eps = 1e-5
    if expand is not None:
        expand = checks.record("expand", expand)
        wide, eps = expand[:6], checks.eps_value("expand", expand.eps)
    depthwise = checks.record("depthwise", depthwise)
    project = checks.record("project", project)
    if padding is None:
        padding = _half(depthwise)
    args = (
        input,
        wide,
        depthwise[:6],
        project[:6],
        (eps, checks.eps_value("depthwise", depthwise.eps), checks.eps_value("project", project.eps)),
        checks.integer("stride", stride),
        checks.integer("padding", padding),
        activation,
        bool(residual),
    )
    checks.inverted_residual(*args)
    return run("inverted_residual", args, (input, *wide, *depthwise[:6], *project[:6]), given)


def depthwise_separable(
    input: Tensor,
    depthwise: ConvBN,
    pointwise: ConvBN,
    *,
    stride: int = 1,
    padding: int | None = None,
    activation: str | None = "relu6",
) -> Tensor:
    """MobileNet's block (Howard et al. 2017, section 3.1) as one op: depthwise convolution, then 1x1 convolution.

    Each is followed by BatchNorm and activation. The tensor between the two need not exist in memory.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        depthwise: weight ``(C, 1, k, k)``.
        pointwise: weight ``(K, C, 1, 1)``.
        stride: of the depthwise convolution, in pixels.
        padding: of the depthwise convolution, in pixels; None is ``k // 2``.
        activation: None, ``"relu"`` or ``"relu6"``, after both.

    Returns:
        ``(N, K, H', W')``; the memory format is that of the two convolutions one after the other.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 4, 5, 5)
        >>> y = depthwise_separable(x, ConvBN(torch.ones(4, 1, 3, 3)), ConvBN(torch.ones(8, 4, 1, 1)), stride=2)
        >>> tuple(y.shape), y.max().item()
        ((1, 8, 3, 3), 6.0)
    """
    given = (input, depthwise, pointwise, stride, padding, activation)
    if (known := recall("depthwise_separable", *given)) is not None:
        return known
    depthwise = checks.record("depthwise", depthwise)
    pointwise = checks.record("pointwise", pointwise)
    args = (
        input,
        depthwise[:6],
        pointwise[:6],
        (checks.eps_value("depthwise", depthwise.eps), checks.eps_value("pointwise", pointwise.eps)),
        checks.integer("stride", stride),
        _half(depthwise) if padding is None else checks.integer("padding", padding),
        activation,
    )
    checks.depthwise_separable(*args)
    return run("depthwise_separable", args, (input, *depthwise[:6], *pointwise[:6]), given)


def _pool2d(name: str, input: Tensor, kernel_size: Pair, stride: Pair | None, padding: Pair) -> Tensor:
    given = (input, kernel_size, stride, padding)
    if (known := recall(name, *given)) is not None:
        return known
    kernel = checks.pair("kernel_size", kernel_size)
    step = kernel if stride is None else checks.pair("stride", stride)
    args = (input, kernel, step, checks.pair("padding", padding))
    checks.pool2d(*args)
    return run(name, args, (input,), given)


def max_pool2d(input: Tensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Largest value in each place of a window.

    What lies outside of the map does not take part. A NaN anywhere under the window makes a NaN.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        kernel_size: pixels of the window, one int or two (height, width).
        stride: pixels, one int or two; None is `kernel_size`.
        padding: pixels on each side, at most half of `kernel_size`; one int or two.

    Returns:
        ``(N, C, H', W')`` in the input's memory format, with ``H' = (H + 2 padding - kernel_size) // stride + 1``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 3, stride=2, padding=1).tolist()
        [[[[5.0, 7.0], [13.0, 15.0]]]]
    """
    return _pool2d("max_pool2d", input, kernel_size, stride, padding)


def avg_pool2d(input: Tensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Mean in each place of a window; what lies outside of the map counts as zeros.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        kernel_size: pixels of the window, one int or two (height, width).
        stride: pixels, one int or two; None is `kernel_size`.
        padding: pixels on each side, at most half of `kernel_size`; one int or two.

    Returns:
        ``(N, C, H', W')`` in the input's memory format, sizes as `max_pool2d` has them.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> avg_pool2d(torch.full((1, 1, 3, 3), 9.0), 3, stride=2, padding=1).tolist()
        [[[[4.0, 4.0], [4.0, 4.0]]]]
    """
    return _pool2d("avg_pool2d", input, kernel_size, stride, padding)


def global_avg_pool(input: Tensor) -> Tensor:
    """Mean over height and width.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.

    Returns:
        ``(N, C, 1, 1)``.

    Raises:
        ValueError, TypeError: the input does not fit.

    Example:
        >>> import torch
        >>> global_avg_pool(torch.arange(4.0).view(1, 1, 2, 2)).item()
        1.5
    """
    given = (input,)
    if (known := recall("global_avg_pool", *given)) is not None:
        return known
    checks.global_avg_pool(input)
    return run("global_avg_pool", (input,), (input,), given)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fully connected layer: ``input @ weight.T + bias``.

    Args:
        input: ``(N, C)``.
        weight: ``(K, C)``.
        bias: ``(K,)`` or None.

    Returns:
        ``(N, K)``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> linear(torch.ones(1, 3), torch.ones(2, 3), torch.zeros(2)).tolist()
        [[3.0, 3.0]]
    """
    given = (input, weight, bias)
    if (known := recall("linear", *given)) is not None:
        return known
    checks.linear(input, weight, bias)
    return run("linear", (input, weight, bias), (input, weight, bias), given)
