"""The ops as torch knows them: schemas, kernels, shapes for tracing, derivatives, multiply-adds.

``torch.ops.fastblocks.<name>`` is the way through torch's dispatcher, which compile, export, profilers and autograd
see. The kernels check their arguments again, since anyone may call an op directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from fastblocks.backends import reference, state
from fastblocks.backends.layout import output_memory_format
from fastblocks.functional import autograd
from fastblocks.functional.checks import CHECKS
from fastblocks.functional.plain import dense

SCHEMAS = {
    "conv_bn_act": "(Tensor input, Tensor?[] conv, float eps, int[2] stride, int[2] padding, int[2] dilation, "
    "str? activation) -> Tensor",
    "pointwise_conv_bn_act": "(Tensor input, Tensor?[] conv, float eps, str? activation, Tensor? residual) -> Tensor",
    "depthwise_conv_bn_act": "(Tensor input, Tensor?[] conv, float eps, int[2] stride, int[2] padding, "
    "int[2] dilation, str? activation) -> Tensor",
    "inverted_residual": "(Tensor input, Tensor?[] expand, Tensor?[] depthwise, Tensor?[] project, float[] eps, "
    "int stride, int padding, str? activation, bool residual) -> Tensor",
    "global_avg_pool": "(Tensor input) -> Tensor",
    "linear": "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
}
"""The op schemas; tiers have functions of the same names and arguments."""

library = torch.library.Library("fastblocks", "DEF")


# ---------------------------------------------------------------------------------------------- shapes for tracing


def _spatial(size: Any, kernel: Any, stride: int, padding: int, dilation: int) -> Any:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _empty(input: Tensor, weight: Tensor, out: Any, height: Any, width: Any) -> Tensor:
    return torch.empty(
        (input.shape[0], out, height, width),
        dtype=input.dtype,
        device=input.device,
        memory_format=output_memory_format(input, weight),
    )


def _fake_conv(
    input: Tensor,
    conv: Sequence[Any],
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    weight = conv[0]
    h, w = (_spatial(input.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return _empty(input, weight, weight.shape[0], h, w)


def _fake_pointwise(
    input: Tensor, conv: Sequence[Any], eps: float, activation: str | None, residual: Tensor | None
) -> Tensor:
    return _empty(input, conv[0], conv[0].shape[0], input.shape[2], input.shape[3])


def _fake_inverted_residual(
    input: Tensor,
    expand: Sequence[Any],
    depthwise: Sequence[Any],
    project: Sequence[Any],
    eps: Sequence[float],
    stride: int,
    padding: int,
    activation: str | None,
    residual: bool,
) -> Tensor:
    # each of the convolutions hands its format on to the next
    y = input
    if expand:
        y = _fake_pointwise(y, expand, 0.0, None, None)
    y = _fake_conv(y, depthwise, 0.0, (stride, stride), (padding, padding), (1, 1), None)
    return _fake_pointwise(y, project, 0.0, None, None)


def _fake_global_avg_pool(input: Tensor) -> Tensor:
    return reference.global_avg_pool(input)


def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((input.shape[0], weight.shape[0]), dtype=input.dtype, device=input.device)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "conv_bn_act": _fake_conv,
    "pointwise_conv_bn_act": _fake_pointwise,
    "depthwise_conv_bn_act": _fake_conv,
    "inverted_residual": _fake_inverted_residual,
    "global_avg_pool": _fake_global_avg_pool,
    "linear": _fake_linear,
}


# -------------------------------------------------------------------------------------------------------- kernels


def _kernel(name: str, native: bool) -> Callable[..., Tensor]:
    check, fake, plain = CHECKS[name], _FAKES[name], reference.TABLE[name]

    def run(*args: Any) -> Tensor:
        check(*args)
        table = state.native
        if native and table is not None and args[0].dtype is torch.float32:
            return table[name](*dense(args))
        with torch.autocast(args[0].device.type, enabled=False):
            y = plain(*args)
        # torch's convolutions choose the format by dtype as well; what was promised to tracers is one rule
        promised = fake(*(pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args)))
        if y.stride() != promised.stride():
            y = torch.empty_strided(y.shape, promised.stride(), dtype=y.dtype, device=y.device).copy_(y)
        return y

    run.__name__ = run.__qualname__ = name
    return run


# ------------------------------------------------------------------------------------------------------ multiply-adds


def _conv_flops(x: Sequence[int], weight: Sequence[int], out: Sequence[int]) -> int:
    total = 2
    for size in (*out, *weight[1:]):
        total *= size
    return total


def _flops_conv(x: Any, conv: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _conv_flops(x, conv[0], out_shape)


def _flops_inverted_residual(
    x: Any, expand: Any, depthwise: Any, project: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    n, _, h, w = x
    total = _conv_flops(x, depthwise[0], (n, depthwise[0][0], *out_shape[2:])) + _conv_flops(x, project[0], out_shape)
    return total + (_conv_flops(x, expand[0], (n, expand[0][0], h, w)) if expand else 0)


def _flops_linear(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


_FLOPS: dict[str, Callable[..., int]] = {
    "conv_bn_act": _flops_conv,
    "pointwise_conv_bn_act": _flops_conv,
    "depthwise_conv_bn_act": _flops_conv,
    "inverted_residual": _flops_inverted_residual,
    "linear": _flops_linear,
}


def _register() -> dict[str, Callable[..., Tensor]]:
    ops: dict[str, Callable[..., Tensor]] = {}
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _kernel(name, native=True), "CPU")
        library.impl(name, _kernel(name, native=False), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastblocks::{name}", _FAKES[name], lib=library)
        library.impl(name, autograd.kernel(name), "Autograd", with_keyset=True)
        packet = getattr(torch.ops.fastblocks, name)
        ops[name] = packet.default
        if name in _FLOPS:
            register_flop_formula(packet)(_FLOPS[name])
    return ops


OPS = _register()
"""The overloads to call, looked up once."""
