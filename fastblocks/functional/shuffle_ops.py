"""The ops with shuffled channels for people: ShuffleNet's and ShuffleNetV2's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastblocks.functional import checks, shuffle_checks
from fastblocks.functional.dispatch import run
from fastblocks.functional.recall import recall
from fastblocks.functional.record import ConvBN


def grouped_pointwise_conv_bn_act(
    input: Tensor,
    conv: ConvBN,
    *,
    groups: int,
    shuffle: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Grouped 1x1 convolution, BatchNorm, residual, activation, and then a shuffle of the output's channels.

    The first half of ShuffleNet's unit (Zhang et al. 2017, section 3.1). The shuffle costs no pass of its own.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        conv: weight ``(K, C / groups, 1, 1)`` and the BatchNorm's vectors of length K.
        groups: of the convolution; they divide C and K.
        shuffle: groups of the shuffle, as `channel_shuffle` takes them; they divide K. 1 is no shuffle.
        activation: None, ``"relu"`` or ``"relu6"``, after the sum.
        residual: ``(N, K, H, W)``, any memory format, in the convolution's order of channels (before the shuffle), or
            None.

    Returns:
        ``(N, K, H, W)``; the memory format is channels_last if input or weight is.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
        >>> conv = ConvBN(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]).view(4, 2, 1, 1))
        >>> grouped_pointwise_conv_bn_act(x, conv, groups=2, shuffle=2).flatten().tolist()
        [1.0, 3.0, 2.0, 4.0]
    """
    given = (input, conv, groups, shuffle, activation, residual)
    if (known := recall("grouped_pointwise_conv_bn_act", *given)) is not None:
        return known
    conv = checks.record("conv", conv)
    tensors = conv[:6]
    args = (
        input,
        tensors,
        checks.eps_value("conv", conv.eps),
        checks.integer("groups", groups),
        checks.integer("shuffle", shuffle),
        activation,
        residual,
    )
    shuffle_checks.grouped_pointwise_conv_bn_act(*args)
    return run("grouped_pointwise_conv_bn_act", args, (input, *tensors, residual), given)


def shuffle_unit(
    input: Tensor,
    compress: ConvBN,
    depthwise: ConvBN,
    expand: ConvBN,
    *,
    stride: int = 1,
    groups: int = 3,
    activation: str | None = "relu",
) -> Tensor:
    """ShuffleNet's unit (Zhang et al. 2017, section 3.2, figure 2) as one op.

    The branch is: grouped 1x1 convolution with BatchNorm and activation, shuffle of its channels, k x k depthwise
    convolution with BatchNorm, grouped 1x1 convolution with BatchNorm. At stride 1 the output is
    ``act(input + branch)``; at stride 2 it is the average pooling (3 x 3, stride 2, padding 1) of the input,
    concatenated with ``act(branch)``.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        compress: weight ``(B, C / groups, 1, 1)``, or ``(B, C, 1, 1)`` where this convolution is not grouped, as in
            the first unit of ShuffleNet's stage 2.
        depthwise: weight ``(B, 1, k, k)`` with odd k; the padding is ``k // 2``.
        expand: weight ``(K, B / groups, 1, 1)``; K = C at stride 1.
        stride: of the depthwise convolution, 1 or 2.
        groups: of the two 1x1 convolutions and of the shuffle; they divide B and K.
        activation: None, ``"relu"`` or ``"relu6"``.

    Returns:
        ``(N, C, H, W)`` at stride 1; ``(N, C + K, H', W')`` at stride 2, with ``H' = (H - 1) // 2 + 1``. The memory
        format is that of the operations one after the other.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 24, 5, 5)
        >>> compress, depthwise = ConvBN(torch.ones(12, 8, 1, 1)), ConvBN(torch.ones(12, 1, 3, 3))
        >>> tuple(shuffle_unit(x, compress, depthwise, ConvBN(torch.ones(24, 4, 1, 1))).shape)
        (1, 24, 5, 5)
        >>> tuple(shuffle_unit(x, compress, depthwise, ConvBN(torch.ones(36, 4, 1, 1)), stride=2).shape)
        (1, 60, 3, 3)
    """
    given = (input, compress, depthwise, expand, stride, groups, activation)
    if (known := recall("shuffle_unit", *given)) is not None:
        return known
    compress = checks.record("compress", compress)
    depthwise = checks.record("depthwise", depthwise)
    expand = checks.record("expand", expand)
    args = (
        input,
        compress[:6],
        depthwise[:6],
        expand[:6],
        (
            checks.eps_value("compress", compress.eps),
            checks.eps_value("depthwise", depthwise.eps),
            checks.eps_value("expand", expand.eps),
        ),
        checks.integer("stride", stride),
        checks.integer("groups", groups),
        activation,
    )
    shuffle_checks.shuffle_unit(*args)
    return run("shuffle_unit", args, (input, *compress[:6], *depthwise[:6], *expand[:6]), given)


def shuffle_unit_v2(
    input: Tensor,
    pointwise1: ConvBN,
    depthwise: ConvBN,
    pointwise2: ConvBN,
    *,
    left_depthwise: ConvBN | None = None,
    left_pointwise: ConvBN | None = None,
    stride: int = 1,
    activation: str | None = "relu",
) -> Tensor:
    """ShuffleNetV2's unit (Ma et al. 2018, section 3.2, figure 3 c and d) as one op.

    The right branch is: 1x1 convolution with BatchNorm and activation, k x k depthwise convolution with BatchNorm, 1x1
    convolution with BatchNorm and activation. At stride 1 it takes the second half of the channels, and the first half
    passes by. At stride 2 it takes all of them, and so does a left branch of a depthwise convolution with BatchNorm and
    a 1x1 convolution with BatchNorm and activation. The two are concatenated, and shuffled in two groups.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last; C is even at stride 1.
        pointwise1: weight ``(B, C / 2, 1, 1)``, at stride 2 ``(B, C, 1, 1)``.
        depthwise: weight ``(B, 1, k, k)`` with odd k; the padding is ``k // 2``.
        pointwise2: weight ``(K, B, 1, 1)``; K = C / 2 at stride 1.
        left_depthwise: at stride 2, weight ``(C, 1, k, k)`` with odd k; else None.
        left_pointwise: at stride 2, weight ``(K, C, 1, 1)``; else None.
        stride: of the depthwise convolutions, 1 or 2.
        activation: None, ``"relu"`` or ``"relu6"``.

    Returns:
        ``(N, 2 K, H', W')`` with ``H' = (H - 1) // stride + 1``; the memory format is that of the operations one after
        the other.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> one, three = ConvBN(torch.ones(2, 2, 1, 1)), ConvBN(torch.ones(2, 1, 3, 3))
        >>> x = torch.ones(1, 4, 5, 5)
        >>> shuffle_unit_v2(x, one, three, one)[0, :, 2, 2].tolist()
        [1.0, 36.0, 1.0, 36.0]
    """
    given = (input, pointwise1, depthwise, pointwise2, left_depthwise, left_pointwise, stride, activation)
    if (known := recall("shuffle_unit_v2", *given)) is not None:
        return known
    found: dict[str, ConvBN | None] = {
        "left_depthwise": left_depthwise,
        "left_pointwise": left_pointwise,
        "pointwise1": pointwise1,
        "depthwise": depthwise,
        "pointwise2": pointwise2,
    }
    records: list[tuple[Any, ...]] = []
    eps: list[float] = []
    for name, conv in found.items():
        if conv is None and name.startswith("left"):
            records.append(())
            eps.append(1e-5)
        else:
            conv = checks.record(name, conv)
            records.append(conv[:6])
            eps.append(checks.eps_value(name, conv.eps))
    args: tuple[Any, ...] = (input, *records, tuple(eps), checks.integer("stride", stride), activation)
    shuffle_checks.shuffle_unit_v2(*args)
    return run("shuffle_unit_v2", args, (input, *(tensor for record in records for tensor in record)), given)


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Shuffle of channels between groups (Zhang et al. 2017, section 3.1), as ``torch.nn.ChannelShuffle``.

    The channels ``(groups, C / groups)`` are transposed: channel ``i * (C / groups) + j`` becomes channel
    ``j * groups + i``. The inverse is the shuffle with ``C / groups`` groups.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last.
        groups: they divide C.

    Returns:
        ``(N, C, H, W)`` in the input's memory format, never a view.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> channel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), 2).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """
    given = (input, groups)
    if (known := recall("channel_shuffle", *given)) is not None:
        return known
    args = (input, checks.integer("groups", groups))
    shuffle_checks.channel_shuffle(*args)
    return run("channel_shuffle", args, (input,), given)


def channel_shuffle_split(input: Tensor, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Shuffle of channels, then a split into two halves, in one pass.

    Args:
        input: ``(N, C, H, W)``, NCHW or channels_last; C is even.
        groups: they divide C.

    Returns:
        Two tensors ``(N, C / 2, H, W)`` in the input's memory format, each in memory of its own.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> left, right = channel_shuffle_split(torch.arange(8.0).view(1, 8, 1, 1))
        >>> left.flatten().tolist(), right.flatten().tolist()
        ([0.0, 4.0, 1.0, 5.0], [2.0, 6.0, 3.0, 7.0])
    """
    given = (input, groups)
    if (known := recall("channel_shuffle_split", *given)) is not None:
        return known
    args = (input, checks.integer("groups", groups))
    shuffle_checks.channel_shuffle_split(*args)
    return run("channel_shuffle_split", args, (input,), given)


def cat_shuffle_split(a: Tensor, b: Tensor, groups: int = 2) -> tuple[Tensor, Tensor]:
    """`channel_shuffle_split` of the concatenation of two tensors, which need not exist in memory.

    What stands between two of ShuffleNetV2's units: the halves of one are joined and shuffled, and split for the next
    (Ma et al. 2018, section 3.2).

    Args:
        a: ``(N, A, H, W)``, NCHW or channels_last.
        b: ``(N, B, H, W)``; A + B is even.
        groups: they divide A + B.

    Returns:
        Two tensors ``(N, (A + B) / 2, H, W)``, each in memory of its own; channels_last if both inputs are.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> a, b = torch.arange(8.0).view(2, 1, 4, 1, 1)
        >>> left, right = cat_shuffle_split(a, b)
        >>> left.flatten().tolist(), right.flatten().tolist()
        ([0.0, 4.0, 1.0, 5.0], [2.0, 6.0, 3.0, 7.0])
    """
    given = (a, b, groups)
    if (known := recall("cat_shuffle_split", *given)) is not None:
        return known
    args = (a, b, checks.integer("groups", groups))
    shuffle_checks.cat_shuffle_split(*args)
    return run("cat_shuffle_split", args, (a, b), given)
