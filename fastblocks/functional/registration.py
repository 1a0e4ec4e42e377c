"""The ops as torch knows them: schemas, kernels, shapes for tracing, derivatives, multiply-adds.

``torch.ops.fastblocks.<name>`` is the way through torch's dispatcher, which compile, export, profilers and autograd
see. The kernels check their arguments again, since anyone may call an op directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from fastblocks.backends import counts, reference, state
from fastblocks.functional import autograd
from fastblocks.functional.checks import CHECKS
from fastblocks.functional.flops import FLOPS
from fastblocks.functional.plain import dense, fallback_reason
from fastblocks.functional.shapes import FAKES

SCHEMAS = {
    "conv_bn_act": "(Tensor input, Tensor?[] conv, float eps, int[2] stride, int[2] padding, int[2] dilation, "
    "str? activation) -> Tensor",
    "pointwise_conv_bn_act": "(Tensor input, Tensor?[] conv, float eps, str? activation, Tensor? residual) -> Tensor",
    "depthwise_conv_bn_act": "(Tensor input, Tensor?[] conv, float eps, int[2] stride, int[2] padding, "
    "int[2] dilation, str? activation) -> Tensor",
    "inverted_residual": "(Tensor input, Tensor?[] expand, Tensor?[] depthwise, Tensor?[] project, float[] eps, "
    "int stride, int padding, str? activation, bool residual) -> Tensor",
    "grouped_pointwise_conv_bn_act": "(Tensor input, Tensor?[] conv, float eps, int groups, int shuffle, "
    "str? activation, Tensor? residual) -> Tensor",
    "depthwise_separable": "(Tensor input, Tensor?[] depthwise, Tensor?[] pointwise, float[] eps, int stride, "
    "int padding, str? activation) -> Tensor",
    "shuffle_unit": "(Tensor input, Tensor?[] compress, Tensor?[] depthwise, Tensor?[] expand, float[] eps, "
    "int stride, int groups, str? activation) -> Tensor",
    "shuffle_unit_v2": "(Tensor input, Tensor?[] left_depthwise, Tensor?[] left_pointwise, Tensor?[] pointwise1, "
    "Tensor?[] depthwise, Tensor?[] pointwise2, float[] eps, int stride, str? activation) -> Tensor",
    "channel_shuffle": "(Tensor input, int groups) -> Tensor",
    "channel_shuffle_split": "(Tensor input, int groups) -> (Tensor, Tensor)",
    "cat_shuffle_split": "(Tensor a, Tensor b, int groups) -> (Tensor, Tensor)",
    "max_pool2d": "(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor",
    "avg_pool2d": "(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor",
    "global_avg_pool": "(Tensor input) -> Tensor",
    "linear": "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
}
"""The op schemas; tiers have functions of the same names and arguments."""

library = torch.library.Library("fastblocks", "DEF")


def _restrided(y: Tensor, promised: Tensor) -> Tensor:
    if y.stride() == promised.stride():
        return y
    return torch.empty_strided(y.shape, promised.stride(), dtype=y.dtype, device=y.device).copy_(y)


def _kernel(name: str, compiled: bool) -> Callable[..., Any]:
    check, fake, plain = CHECKS[name], FAKES[name], reference.TABLE[name]

    def run(*args: Any) -> Any:
        check(*args)
        table = state.compiled
        if compiled and table is not None and args[0].dtype is torch.float32:
            if state.name == "native":
                counts.called(name, "native")
            return table[name](*dense(args))
        if table is not None:
            counts.fell_back(name, fallback_reason(args[0]) or "the input is no plain tensor")
        counts.called(name, "reference")
        with torch.autocast(args[0].device.type, enabled=False):
            y = plain(*args)
        # torch's convolutions choose the format by dtype as well; what was promised to tracers is one rule
        promised = fake(*(pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args)))
        if isinstance(y, Tensor):
            return _restrided(y, promised)
        return tuple(map(_restrided, y, promised))

    run.__name__ = run.__qualname__ = name
    return run


def _register() -> dict[str, Callable[..., Any]]:
    ops: dict[str, Callable[..., Any]] = {}
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _kernel(name, compiled=True), "CPU")
        library.impl(name, _kernel(name, compiled=False), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastblocks::{name}", FAKES[name], lib=library)
        library.impl(name, autograd.kernel(name), "Autograd", with_keyset=True)
        packet = getattr(torch.ops.fastblocks, name)
        ops[name] = packet.default
        if name in FLOPS:
            register_flop_formula(packet)(FLOPS[name])
    return ops


OPS = _register()
"""The overloads to call, looked up once."""
