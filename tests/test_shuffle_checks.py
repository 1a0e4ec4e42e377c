"""Bad arguments of the shuffles, the pools and the blocks: as in test_checks.py, which tests the other ops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import record
from test_checks import HUGE, refused, x
from torch import Tensor

from fastblocks import functional as F
from fastblocks.functional import ConvBN

NOT_GROUPS = (0, -1, 3, 5, 16, *HUGE)
NO_INT = (None, "2", 1.0, True, (2, 2), torch.relu)
WRONG_IMAGES = (x(8, 5, 6), x(8), x(1, 2, 8, 5, 6), torch.ones(()), x(2, 8, 0, 6), x(2, 8, 5, 0))
NO_IMAGES = (None, "image", [[1.0]], x().numpy(), x().to_sparse(), x().long(), x().bool(), x(dtype=torch.complex64))


def one_op_each() -> dict[str, Callable[[Any], Any]]:
    """The ops as functions of their input alone, with 8 channels."""
    d, half, whole, small = record(8, 1, 3), record(8, 4), record(8, 8), record(4, 1, 3)
    four = record(4, 4)
    return {
        "grouped": lambda t: F.grouped_pointwise_conv_bn_act(t, half, groups=2),
        "separable": lambda t: F.depthwise_separable(t, d, whole),
        "unit": lambda t: F.shuffle_unit(t, half, d, half, groups=2),
        "unit of stride 2": lambda t: F.shuffle_unit(t, whole, d, half, groups=2, stride=2),
        "unit v2": lambda t: F.shuffle_unit_v2(t, four, small, four),
        "unit v2 of stride 2": lambda t: F.shuffle_unit_v2(
            t, whole, d, whole, left_depthwise=d, left_pointwise=whole, stride=2
        ),
        "shuffle": lambda t: F.channel_shuffle(t, 2),
        "split": F.channel_shuffle_split,
        "max pool": lambda t: F.max_pool2d(t, 3, 2, 1),
        "average pool": lambda t: F.avg_pool2d(t, 3, 2, 1),
    }


@pytest.mark.parametrize("name", list(one_op_each()))
def test_inputs(backend: str, name: str) -> None:
    op = one_op_each()[name]
    op(x())
    for wrong in (*WRONG_IMAGES, *NO_IMAGES):
        refused("input", lambda wrong=wrong: op(wrong))


def test_inputs_of_two(backend: str) -> None:
    F.cat_shuffle_split(x(), x(2, 4, 5, 6))
    for wrong in (*WRONG_IMAGES, *NO_IMAGES, x(2, 0, 5, 6)):
        refused("a", lambda wrong=wrong: F.cat_shuffle_split(wrong, x()))
    for wrong in (*WRONG_IMAGES, *NO_IMAGES, x(2, 0, 5, 6), x(2, 8, 5, 7), x(2, 8, 4, 6), x(1, 8, 5, 6), x(2, 7, 5, 6)):
        refused("b", lambda wrong=wrong: F.cat_shuffle_split(x(), wrong))
    for wrong in (x().double(), x().half(), x().to("meta")):
        refused("b", lambda wrong=wrong: F.cat_shuffle_split(x(), wrong))
    for wrong in (0, -2, 3, 5, 32, *HUGE, *NO_INT):
        refused("groups", lambda wrong=wrong: F.cat_shuffle_split(x(), x(), wrong))
    assert len(F.cat_shuffle_split(x(), x(), 16)) == 2


def test_groups(backend: str) -> None:
    half, d = record(8, 4), record(8, 1, 3)
    for wrong in (*NOT_GROUPS, *NO_INT):
        refused("groups", lambda wrong=wrong: F.channel_shuffle(x(), wrong))
        refused("groups", lambda wrong=wrong: F.channel_shuffle_split(x(), wrong))
        refused("groups", lambda wrong=wrong: F.grouped_pointwise_conv_bn_act(x(), half, groups=wrong))
        refused("shuffle", lambda wrong=wrong: F.grouped_pointwise_conv_bn_act(x(), half, groups=2, shuffle=wrong))
        refused("groups", lambda wrong=wrong: F.shuffle_unit(x(), half, d, half, groups=wrong))
        refused("groups", lambda wrong=wrong: F.shuffle_unit(x(), record(8, 8), d, half, groups=wrong))
    with pytest.raises(ValueError, match=r"^groups: expected a divisor of the input's channels, 8, got 3$"):
        F.channel_shuffle(x(), 3)
    refused("input", lambda: F.channel_shuffle(x(2, 0, 5, 6), 1))
    for channels in (1, 3, 7):
        refused("input", lambda channels=channels: F.channel_shuffle_split(x(2, channels, 5, 6), 1))
    with pytest.raises(ValueError, match=r"^input: expected an even number of channels to split, got 7: shape"):
        F.channel_shuffle_split(x(2, 7, 5, 6), 1)
    # the convolution's outputs must be in groups too, and so must the bottleneck
    refused("conv.weight", lambda: F.grouped_pointwise_conv_bn_act(x(), record(7, 4), groups=2))
    refused("compress.weight", lambda: F.shuffle_unit(x(), record(7, 4), record(7, 1, 3), record(8, 4), groups=2))
    refused("groups", lambda: F.shuffle_unit(x(), record(7, 8), record(7, 1, 3), record(8, 4), groups=2))
    refused("expand.weight", lambda: F.shuffle_unit(x(), half, d, record(7, 4), groups=2, stride=2))


def test_weights_that_do_not_match(backend: str) -> None:
    half, d, whole = record(8, 4), record(8, 1, 3), record(8, 8)
    for wrong in (record(8, 8), record(8, 3), record(8, 4, 3), record(8, 4, (1, 3))):
        refused("conv.weight", lambda wrong=wrong: F.grouped_pointwise_conv_bn_act(x(), wrong, groups=2))
    for wrong in (record(7, 1, 3), record(9, 1, 3), record(8, 2, 3), record(8, 1, (3, 5))):
        refused("depthwise.weight", lambda wrong=wrong: F.depthwise_separable(x(), wrong, whole))
        refused("depthwise.weight", lambda wrong=wrong: F.shuffle_unit(x(), half, wrong, half, groups=2))
        refused("depthwise.weight", lambda wrong=wrong: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, wrong, whole))
    for wrong in (record(8, 7), record(8, 9), record(8, 8, 3)):
        refused("pointwise.weight", lambda wrong=wrong: F.depthwise_separable(x(), d, wrong))
        refused("pointwise1.weight", lambda wrong=wrong: F.shuffle_unit_v2(x(2, 16, 5, 6), wrong, d, whole))
        refused("pointwise2.weight", lambda wrong=wrong: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, d, wrong))
    for wrong in (record(8, 3), record(8, 5), record(8, 4, 3), record(8, 2)):
        refused("compress.weight", lambda wrong=wrong: F.shuffle_unit(x(), wrong, d, half, groups=2))
    for wrong in (record(8, 3), record(8, 8), record(8, 4, 3), record(6, 4), record(10, 4)):
        refused("expand.weight", lambda wrong=wrong: F.shuffle_unit(x(), half, d, wrong, groups=2))
    # both halves have equally many channels
    for wrong in (record(7, 8), record(9, 8)):
        refused("pointwise2.weight", lambda wrong=wrong: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, d, wrong))
    lefts: dict[str, Any] = {"left_depthwise": d, "left_pointwise": whole, "stride": 2}
    refused("pointwise2.weight", lambda: F.shuffle_unit_v2(x(), whole, d, record(6, 8), **lefts))
    for name, wrong in (("left_depthwise", record(4, 1, 3)), ("left_pointwise", record(8, 4))):
        refused(
            f"{name}.weight",
            lambda name=name, wrong=wrong: F.shuffle_unit_v2(x(), whole, d, whole, **{**lefts, name: wrong}),
        )
    # only odd kernels keep the size
    even = record(8, 1, 2)
    refused("depthwise.weight", lambda: F.shuffle_unit(x(), half, even, half, groups=2))
    refused("depthwise.weight", lambda: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, even, whole))
    refused(
        "left_depthwise.weight", lambda: F.shuffle_unit_v2(x(), whole, d, whole, **{**lefts, "left_depthwise": even})
    )


def test_branches_of_v2(backend: str) -> None:
    d, whole = record(8, 1, 3), record(8, 8)
    refused("left_depthwise", lambda: F.shuffle_unit_v2(x(), whole, d, whole, stride=2))
    refused("left_pointwise", lambda: F.shuffle_unit_v2(x(), whole, d, whole, stride=2, left_depthwise=d))
    refused("left_depthwise", lambda: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, d, whole, left_depthwise=d))
    refused("left_pointwise", lambda: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, d, whole, left_pointwise=whole))
    for channels in (1, 15, 17):
        refused("input", lambda channels=channels: F.shuffle_unit_v2(x(2, channels, 5, 6), whole, d, whole))
    refused("pointwise1.weight", lambda: F.shuffle_unit_v2(x(2, 18, 5, 6), whole, d, whole))


def test_every_vector_of_every_record(backend: str) -> None:
    """One element more or less, another dtype, another rank, no tensor: for every tensor of every record."""
    half, whole, d, small, four = record(8, 4), record(8, 8), record(8, 1, 3), record(4, 1, 3), record(4, 4)
    left: dict[str, Any] = {"left_depthwise": d, "left_pointwise": whole, "stride": 2}

    def both(**changes: Any) -> Tensor:
        given: dict[str, Any] = {"pointwise1": whole, "depthwise": d, "pointwise2": whole, **left, **changes}
        return F.shuffle_unit_v2(x(), given.pop("pointwise1"), given.pop("depthwise"), given.pop("pointwise2"), **given)

    cases: list[tuple[str, ConvBN, Callable[[Any], Any]]] = [
        ("conv", half, lambda c: F.grouped_pointwise_conv_bn_act(x(), c, groups=2)),
        ("depthwise", d, lambda c: F.depthwise_separable(x(), c, whole)),
        ("pointwise", whole, lambda c: F.depthwise_separable(x(), d, c)),
        ("compress", half, lambda c: F.shuffle_unit(x(), c, d, half, groups=2)),
        ("depthwise", d, lambda c: F.shuffle_unit(x(), half, c, half, groups=2)),
        ("expand", half, lambda c: F.shuffle_unit(x(), half, d, c, groups=2)),
        ("pointwise1", four, lambda c: F.shuffle_unit_v2(x(), c, small, four)),
        ("depthwise", small, lambda c: F.shuffle_unit_v2(x(), four, c, four)),
        ("pointwise2", four, lambda c: F.shuffle_unit_v2(x(), four, small, c)),
        ("left_depthwise", d, lambda c: both(left_depthwise=c)),
        ("left_pointwise", whole, lambda c: both(left_pointwise=c)),
        ("pointwise2", whole, lambda c: both(pointwise2=c)),
    ]
    for name, conv, call in cases:
        bias = torch.ones(conv.weight.shape[0])
        full = conv._replace(bias=bias)
        call(full)
        for field in ConvBN._fields[1:6]:
            vector = getattr(full, field)
            for wrong in (vector[:-1], torch.cat([vector, vector[:1]]), vector[:, None], vector.double(), 1.0):
                changed = full._replace(**{field: wrong})
                refused(f"{name}.{field}", lambda changed=changed, call=call: call(changed))
        wrongs: tuple[Any, ...] = (full.weight.double(), full.weight[0], full.weight[:0], full.weight.to("meta"), None)
        for field, wrong in (*(("weight", w) for w in wrongs), ("running_mean", None), ("eps", "small")):
            changed = full._replace(**{field: wrong})
            refused(f"{name}.{field}", lambda changed=changed, call=call: call(changed))
        for wrong in (full.weight, tuple(full), None):
            refused(name, lambda wrong=wrong, call=call: call(wrong))


def test_numbers_of_the_blocks(backend: str) -> None:
    half, whole, d = record(8, 4), record(8, 8), record(8, 1, 3)
    for wrong in (0, -1, 3, *HUGE, *NO_INT):
        refused("stride", lambda wrong=wrong: F.shuffle_unit(x(), half, d, half, groups=2, stride=wrong))
        refused("stride", lambda wrong=wrong: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, d, whole, stride=wrong))
        if wrong != 3:
            refused("stride", lambda wrong=wrong: F.depthwise_separable(x(), d, whole, stride=wrong))
    for wrong in (-1, *HUGE, (1, 1), 0.5, "same"):
        refused("padding", lambda wrong=wrong: F.depthwise_separable(x(), d, whole, padding=wrong))
    refused("padding", lambda: F.depthwise_separable(x(), d, whole, padding=2**30))
    refused("input", lambda: F.depthwise_separable(x(2, 8, 2, 6), d, whole, padding=0))
    for wrong in ("gelu", "RELU", 1, torch.relu):
        refused("activation", lambda wrong=wrong: F.depthwise_separable(x(), d, whole, activation=wrong))
        refused("activation", lambda wrong=wrong: F.shuffle_unit(x(), half, d, half, groups=2, activation=wrong))
        refused("activation", lambda wrong=wrong: F.shuffle_unit_v2(x(2, 16, 5, 6), whole, d, whole, activation=wrong))
        refused(
            "activation",
            lambda wrong=wrong: F.grouped_pointwise_conv_bn_act(x(), half, groups=2, activation=wrong),
        )


def test_residuals(backend: str) -> None:
    conv = record(6, 4)
    good = x(2, 6, 5, 6)
    F.grouped_pointwise_conv_bn_act(x(), conv, groups=2, residual=good)
    wrongs: tuple[Any, ...] = (x(), x(2, 6, 5, 5), x(1, 6, 5, 6), x(6, 5, 6), good.double(), good.long(), 1.0)
    for wrong in (*wrongs, good.to("meta"), good.to_sparse()):
        refused(
            "residual",
            lambda wrong=wrong: F.grouped_pointwise_conv_bn_act(x(), conv, groups=2, shuffle=2, residual=wrong),
        )


@pytest.mark.parametrize("op", [F.max_pool2d, F.avg_pool2d])
def test_numbers_of_pools(backend: str, op: Any) -> None:
    for wrong in (0, -1, (3, 0), (1, 2, 3), (), 1.5, "3", None, True, *HUGE, (2**20 + 1, 3)):
        refused("kernel_size", lambda wrong=wrong: op(x(), wrong))
    for wrong in (0, -1, (1, 0), (1, 2, 3), (), 1.5, "2", True, *HUGE, (1, 2**31)):
        refused("stride", lambda wrong=wrong: op(x(), 3, wrong))
    # at most half of the kernel, each in its own direction
    for wrong in (-1, (0, -1), 2, (1, 2), 3, (1, 2, 3), 0.5, None, False, *HUGE):
        refused("padding", lambda wrong=wrong: op(x(), 3, 2, wrong))
    refused("padding", lambda: op(x(), (2, 5), 1, (2, 1)))
    for kernel, padding in ((6, 0), ((5, 7), 0), (9, 1), ((2, 9), (1, 1))):
        refused("input", lambda kernel=kernel, padding=padding: op(x(), kernel, 1, padding))
    refused("input", lambda: op(x(2, 0, 5, 6), 3))
    assert op(x(), 5, 2**31 - 1).shape == (2, 8, 1, 1)
    assert op(x(), (5, 6), 1, (2, 3)).shape == (2, 8, 5, 7)
    assert op(x(), 2**20, 2**31 - 1, 2**19).shape == (2, 8, 1, 1)


def test_ops_check_too(backend: str) -> None:
    """What torch.ops reaches without the functions in front is checked as well."""
    ops = torch.ops.fastblocks
    half, whole, d = (list(r[:6]) for r in (record(8, 4), record(8, 8), record(8, 1, 3)))
    refused("groups", lambda: ops.channel_shuffle(x(), 0))
    refused("groups", lambda: ops.channel_shuffle_split(x(), 3))
    refused("groups", lambda: ops.cat_shuffle_split(x(), x(), -16))
    refused("input", lambda: ops.channel_shuffle_split(x(2, 7, 5, 6), 7))
    refused("conv", lambda: ops.grouped_pointwise_conv_bn_act(x(), half[:5], 1e-5, 2, 1, None, None))
    refused("groups", lambda: ops.grouped_pointwise_conv_bn_act(x(), half, 1e-5, 0, 1, None, None))
    refused("shuffle", lambda: ops.grouped_pointwise_conv_bn_act(x(), half, 1e-5, 2, 0, None, None))
    refused("eps", lambda: ops.depthwise_separable(x(), d, whole, [1e-5], 1, 1, None))
    refused("eps", lambda: ops.shuffle_unit(x(), half, d, half, [1e-5] * 2, 1, 2, None))
    refused("compress", lambda: ops.shuffle_unit(x(), [], d, half, [1e-5] * 3, 1, 2, None))
    refused("expand", lambda: ops.shuffle_unit(x(), half, d, [], [1e-5] * 3, 1, 2, None))
    v2: tuple[Any, ...] = ([], [], whole, d, whole)
    refused("eps", lambda: ops.shuffle_unit_v2(x(2, 16, 5, 6), *v2, [1e-5] * 3, 1, None))
    refused("left_depthwise", lambda: ops.shuffle_unit_v2(x(), *v2, [1e-5] * 5, 2, None))
    refused("depthwise", lambda: ops.shuffle_unit_v2(x(2, 16, 5, 6), [], [], whole, [], whole, [1e-5] * 5, 1, None))
    for pool in (ops.max_pool2d, ops.avg_pool2d):
        refused("stride", lambda pool=pool: pool(x(), [3, 3], [0, 1], [1, 1]))
        refused("padding", lambda pool=pool: pool(x(), [3, 3], [1, 1], [1, 2]))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_absurd_numbers_leave_the_process_alive(backend: str) -> None:
    program = """
import itertools, torch
from fastblocks import functional as F
survived = 0
x = torch.ones(1, 4, 6, 6)
absurd = (-1, 0, 2**30, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)
one, three = F.ConvBN(torch.ones(4, 4, 1, 1)), F.ConvBN(torch.ones(4, 1, 3, 3))
calls = [
    lambda v: F.max_pool2d(x, v), lambda v: F.max_pool2d(x, 3, v), lambda v: F.max_pool2d(x, 3, 1, v),
    lambda v: F.max_pool2d(x, v, 1, v // 2), lambda v: F.avg_pool2d(x, v), lambda v: F.avg_pool2d(x, 3, v),
    lambda v: F.avg_pool2d(x, 3, 1, v), lambda v: F.avg_pool2d(x, (3, v), (1, v), (1, v // 2)),
    lambda v: F.channel_shuffle(x, v), lambda v: F.channel_shuffle_split(x, v), lambda v: F.cat_shuffle_split(x, x, v),
    lambda v: F.grouped_pointwise_conv_bn_act(x, one, groups=v),
    lambda v: F.grouped_pointwise_conv_bn_act(x, one, groups=1, shuffle=v),
    lambda v: F.depthwise_separable(x, three, one, stride=v), lambda v: F.depthwise_separable(x, three, one, padding=v),
    lambda v: F.shuffle_unit(x, one, three, one, groups=v), lambda v: F.shuffle_unit(x, one, three, one, stride=v),
]
for call, value in itertools.product(calls, absurd):
    try:
        call(value)
    except (ValueError, TypeError) as error:
        assert "expected" in str(error) or "more than memory" in str(error), error
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
    assert done.returncode == 0 and done.stdout.strip() == str(17 * 8), done.stderr
