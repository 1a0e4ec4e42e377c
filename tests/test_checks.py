"""Bad arguments: a ValueError or TypeError that names the argument, in every tier, never a crash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import record

import fastblocks
from fastblocks import functional as F
from fastblocks.functional import ConvBN

HUGE = (2**31, 2**63 - 1, 2**80)


def x(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*(size or (2, 8, 5, 6)), dtype=dtype)


def refused(name: str, call: Callable[[], Any]) -> None:
    """The call raises, and the message begins with the argument's name and says what was expected."""
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    message = str(error.value)
    assert re.match(rf"{re.escape(name)}\b", message), (name, message)
    assert "expected" in message or "more than memory" in message, message


def test_inputs(backend: str) -> None:
    dense, depthwise, pointwise = record(6, 8, 3), record(8, 1, 3), record(6, 8)
    ops: list[Callable[[Any], Any]] = [
        lambda t: F.conv_bn_act(t, dense, padding=1),
        lambda t: F.depthwise_conv_bn_act(t, depthwise, padding=1),
        lambda t: F.pointwise_conv_bn_act(t, pointwise),
        lambda t: F.inverted_residual(t, None, depthwise, pointwise),
        F.global_avg_pool,
    ]
    for op in ops:
        for wrong in (x(8, 5, 6), x(8), x(1, 2, 8, 5, 6), torch.ones(())):
            refused("input", lambda op=op, wrong=wrong: op(wrong))
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            refused("input", lambda op=op, dtype=dtype: op(x(dtype=dtype)))
        for wrong in (None, "image", [[1.0]], x().numpy(), x().to_sparse()):
            refused("input", lambda op=op, wrong=wrong: op(wrong))
    for op in ops[1:]:
        refused("input", lambda op=op: op(x(2, 8, 0, 5)))
    for op in (ops[0], ops[2]):
        refused("conv.weight", lambda op=op: op(x(2, 7, 5, 6)))
    refused("conv.weight", lambda: ops[1](x(2, 9, 5, 6)))
    refused("depthwise.weight", lambda: ops[3](x(2, 9, 5, 6)))
    refused("conv.weight", lambda: ops[0](x(2, 0, 5, 6)))
    refused("input", lambda: F.linear(x(2, 3, 4), x(5, 4)))
    refused("input", lambda: F.linear(x(2, 4, dtype=torch.int32), x(5, 4)))
    refused("weight", lambda: F.linear(x(2, 4), x(5, 3)))
    refused("weight", lambda: F.linear(x(2, 4), x(4)))
    refused("weight", lambda: F.linear(x(2, 4), x(5, 4, dtype=torch.float64)))
    refused("bias", lambda: F.linear(x(2, 4), x(5, 4), x(4)))
    refused("bias", lambda: F.linear(x(2, 4), x(5, 4), x(5, 1)))


def test_every_vector_of_every_record(backend: str) -> None:
    """One element more or less, another dtype, another device, another rank, no tensor: for every tensor."""
    names = ConvBN._fields[:6]
    cases: dict[str, tuple[ConvBN, Callable[[ConvBN], Any]]] = {
        "conv": (record(6, 8, 3, bias=True), lambda c: F.conv_bn_act(x(), c)),
        "conv ": (record(8, 1, 3, bias=True), lambda c: F.depthwise_conv_bn_act(x(), c)),
        "conv  ": (record(6, 8, bias=True), lambda c: F.pointwise_conv_bn_act(x(), c)),
        "expand": (record(16, 8, bias=True), lambda c: F.inverted_residual(x(), c, record(16, 1, 3), record(8, 16))),
        "depthwise": (
            record(16, 1, 3, bias=True),
            lambda c: F.inverted_residual(x(), record(16, 8), c, record(8, 16)),
        ),
        "project": (record(8, 16, bias=True), lambda c: F.inverted_residual(x(), record(16, 8), record(16, 1, 3), c)),
    }
    for key, (conv, call) in cases.items():
        call(conv)
        for name in names[1:]:
            argument = f"{key.strip()}.{name}"
            vector = getattr(conv, name)
            wrong: list[Any] = [vector[:-1], torch.cat([vector, vector[:1]]), vector[:1], vector[:, None], vector[:0]]
            wrong += [vector.double(), vector.long(), vector.to("meta"), vector.to_sparse(), vector.tolist(), 1.0]
            for value in wrong:
                refused(
                    argument, lambda call=call, conv=conv, name=name, value=value: call(conv._replace(**{name: value}))
                )
        weight = conv.weight
        for value in (weight.double(), weight.to("meta"), weight[0], weight[:, :, 0], weight.long(), None, weight[:0]):
            argument = f"{key.strip()}.weight"
            refused(argument, lambda call=call, conv=conv, value=value: call(conv._replace(weight=value)))
        refused(f"{key.strip()}.running_mean", lambda call=call, conv=conv: call(conv._replace(running_mean=None)))
        refused(f"{key.strip()}.running_var", lambda call=call, conv=conv: call(conv._replace(running_var=None)))
        refused(f"{key.strip()}.eps", lambda call=call, conv=conv: call(conv._replace(eps="small")))
        for value in (None, conv.weight, tuple(conv)):
            if key != "expand":
                refused(key.strip(), lambda call=call, value=value: call(value))


def test_every_dimension_of_every_weight(backend: str) -> None:
    def grown(weight: torch.Tensor, dim: int, by: int) -> torch.Tensor:
        return (
            torch.cat([weight, weight.narrow(dim, 0, 1)], dim)
            if by > 0
            else weight.narrow(dim, 0, weight.shape[dim] - 1)
        )

    e, d, p = record(16, 8), record(16, 1, 3), record(8, 16)
    for by in (1, -1):
        for dim in range(4):
            for i in range(3):
                records = [e, d, p]
                weight = records[i].weight
                if by < 0 and weight.shape[dim] == 1:
                    continue
                records[i] = records[i]._replace(weight=grown(weight, dim, by))
                with pytest.raises(ValueError, match=r"^(expand|depthwise|project|residual)"):
                    F.inverted_residual(x(), *records, residual=True)
    refused("conv.weight", lambda: F.pointwise_conv_bn_act(x(), record(6, 8, 3)))
    refused("depthwise.weight", lambda: F.inverted_residual(x(), None, record(8, 1, (3, 5)), record(6, 8)))


def test_numbers(backend: str) -> None:
    dense, depthwise, pointwise = record(6, 8, 3), record(8, 1, 3), record(6, 8)
    for op, conv in ((F.conv_bn_act, dense), (F.depthwise_conv_bn_act, depthwise)):
        for name, wrong in (
            ("stride", (-1, 0, (1, 0), (1, 2, 3), (), 1.5, "2", None, True, *HUGE, (1, 2**31))),
            ("padding", (-1, (0, -1), (1, 2, 3), 0.5, "same", None, False, *HUGE, (2**63 - 1, 1))),
            ("dilation", (-1, 0, (0, 1), [1], 1.5, None, *HUGE)),
        ):
            for value in wrong:
                refused(name, lambda op=op, conv=conv, name=name, value=value: op(x(), conv, **{name: value}))
        for value in ("gelu", "RELU", 1, torch.relu):
            refused("activation", lambda op=op, conv=conv, value=value: op(x(), conv, activation=value))
        refused("padding", lambda op=op, conv=conv: op(x(), conv, padding=2**30))
        refused("padding", lambda op=op, conv=conv: op(x(), conv, padding=2**29))
        refused("input", lambda op=op, conv=conv: op(x(2, 8, 2, 6), conv))
        refused("input", lambda op=op, conv=conv: op(x(), conv, dilation=2**31 - 1))
        refused("input", lambda op=op, conv=conv: op(x(), conv, dilation=3))
        assert op(x(), conv, stride=2**31 - 1).shape[2:] == (1, 1)
    for name, wrong in (("stride", (-1, 0, (1, 1), 1.5, *HUGE)), ("padding", (-1, (1, 1), 0.5, *HUGE))):
        for value in wrong:
            refused(
                name,
                lambda name=name, value=value: F.inverted_residual(x(), None, depthwise, pointwise, **{name: value}),
            )
    refused("activation", lambda: F.inverted_residual(x(), None, depthwise, pointwise, activation="tanh"))


def test_residuals(backend: str) -> None:
    conv = record(8, 8)
    for wrong in (x(2, 7, 5, 6), x(2, 8, 5, 5), x(1, 8, 5, 6), x(8, 5, 6), x(2, 8, 5, 6, 1)):
        refused("residual", lambda wrong=wrong: F.pointwise_conv_bn_act(x(), conv, residual=wrong))
    for wrong in (x().double(), x().long(), x().to("meta"), 1.0, x().to_sparse()):
        refused("residual", lambda wrong=wrong: F.pointwise_conv_bn_act(x(), conv, residual=wrong))
    d = record(8, 1, 3)
    refused("residual", lambda: F.inverted_residual(x(), None, d, record(6, 8), residual=True))
    refused("residual", lambda: F.inverted_residual(x(), None, d, conv, stride=2, residual=True))
    refused("residual", lambda: F.inverted_residual(x(), None, d, conv, padding=0, residual=True))


def test_ops_check_too(backend: str) -> None:
    """What torch.ops reaches without the functions in front is checked as well."""
    conv = list(record(6, 8, 3)[:6])
    op = torch.ops.fastblocks.conv_bn_act
    one, zero = [1, 1], [0, 0]
    assert op(x(), conv, 1e-5, one, zero, one, None).shape == (2, 6, 3, 4)
    refused("conv.weight", lambda: op(x(2, 7, 5, 6), conv, 1e-5, one, zero, one, None))
    refused("conv", lambda: op(x(), conv[:5], 1e-5, one, zero, one, None))
    refused("stride", lambda: op(x(), conv, 1e-5, zero, zero, one, None))
    refused("activation", lambda: op(x(), conv, 1e-5, one, zero, one, "gelu"))
    refused("input", lambda: torch.ops.fastblocks.global_avg_pool(torch.ones(3)))
    args = [x(), [], list(record(8, 1, 3)[:6]), list(record(8, 8)[:6]), [1e-5], 1, 1, "relu6", True]
    refused("eps", lambda: torch.ops.fastblocks.inverted_residual(*args))


def test_layers_refuse_bad_arguments() -> None:
    C, R = fastblocks.ConvBNAct, fastblocks.InvertedResidual
    for name, value in (
        *(("in_channels", v) for v in (0, -1, 1.5, "3", None, True, *HUGE)),
        *(("out_channels", v) for v in (0, -8, None)),
        *(("kernel_size", v) for v in (0, (3, 0), (1, 2, 3), -3, 2.0)),
        *(("stride", v) for v in (0, -1, *HUGE)),
        *(("padding", v) for v in (-1, (1, -1), *HUGE)),
        *(("dilation", v) for v in (0, *HUGE)),
        *(("groups", v) for v in (0, 3, -1, 16, *HUGE)),
    ):
        arguments: dict[str, Any] = {"in_channels": 8, "out_channels": 8, name: value}
        refused(name, lambda arguments=arguments: C(**arguments))
    for name, value in (
        *(("in_channels", v) for v in (0, -1, 1.5)),
        ("out_channels", 0),
        *(("stride", v) for v in (0, 3, -1, (1, 1))),
        *(("expand_ratio", v) for v in (0, -6, "6", 0.01, float("nan"), float("inf"))),
    ):
        arguments = {"in_channels": 8, "out_channels": 8, name: value}
        refused(name, lambda arguments=arguments: R(**arguments))
    refused("channels", lambda: fastblocks.DepthwiseConvBNAct(0))
    refused("width_mult", lambda: fastblocks.models.mobilenet_v2(width_mult=0))
    refused("num_classes", lambda: fastblocks.models.mobilenet_v2(num_classes=0))
    refused("weights", lambda: fastblocks.models.mobilenet_v2(weights=1))


@pytest.mark.parametrize("training", [True, False])
def test_layers_refuse_bad_inputs(backend: str, training: bool) -> None:
    """Whether the op or the children would run."""
    for layer in (
        fastblocks.ConvBNAct(8, 6),
        fastblocks.PointwiseConvBNAct(8, 6),
        fastblocks.DepthwiseConvBNAct(8),
        fastblocks.InvertedResidual(8, 8),
        fastblocks.InvertedResidual(8, 8, expand_ratio=1),
    ):
        layer.train(training)
        for good in range(2):
            for wrong in (x(8, 5, 6), x(2, 7, 5, 6), x(2, 9, 5, 6), x(dtype=torch.int64), x(dtype=torch.bool)):
                # once before anything was run, once after
                with pytest.raises((ValueError, TypeError)) as error:
                    layer(wrong)
                assert "expected" in str(error.value)
            if not good:
                layer(x())
                layer(x())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_absurd_numbers_leave_the_process_alive(backend: str) -> None:
    program = """
import itertools, torch
from fastblocks import functional as F
survived = 0
x = torch.ones(1, 4, 6, 6)
ops = ((torch.ones(4, 4, 3, 3), F.conv_bn_act), (torch.ones(4, 1, 3, 3), F.depthwise_conv_bn_act))
absurd = (-1, 0, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)
for (weight, op), name, value in itertools.product(ops, ("padding", "stride", "dilation"), absurd):
    try:
        op(x, F.ConvBN(weight), **{name: value})
    except (ValueError, TypeError) as error:
        assert name in str(error) or "input" in str(error), error
    survived += 1
print(survived)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "FASTBLOCKS_BACKEND": backend, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0 and done.stdout.strip() == "42", done.stderr
