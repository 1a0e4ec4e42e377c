"""Calls of ops as functions that are remembered: whatever could make the next one differ is seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastblocks
from fastblocks import functional as F
from fastblocks.backends import counts
from fastblocks.functional import ConvBN, dispatch, guards
from fastblocks.functional import recall as memory

pytestmark = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="only the native tier's calls are")


def record(channels: int = 8, depth: int = 4, kernel: int = 1) -> ConvBN:
    weight = torch.randn(channels, depth, kernel, kernel)
    vectors = torch.randn(channels), torch.rand(channels) + 0.5, torch.rand(channels) + 0.5, torch.randn(channels)
    return ConvBN(weight, None, *vectors)


def grouped(x: Tensor, conv: ConvBN, **options: Any) -> Tensor:
    return F.grouped_pointwise_conv_bn_act(x, conv, **{"groups": 2, "shuffle": 2, "activation": "relu", **options})


def expected(x: Tensor, conv: ConvBN, **options: Any) -> Tensor:
    with fastblocks.use_backend("reference"):
        return grouped(x, conv, **options)


def calls(run: Callable[[], Any]) -> int:
    """How many calls passed the checks meanwhile, and were remembered."""
    with mock.patch.object(dispatch, "remember", wraps=dispatch.remember) as remembered:
        run()
    return remembered.call_count


@pytest.fixture(params=["torch's guards", "guards in Python"])
def warm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ConvBN]:
    """A call that is remembered."""
    width = 7  # other sizes are another call
    if request.param == "guards in Python":
        monkeypatch.setattr(guards, "_TensorGuards", None)
        width = 6
    x, conv = torch.randn(2, 8, 5, width), record()
    grouped(x, conv)
    assert calls(lambda: grouped(x, conv)) == 0
    return x, conv


def test_another_call_that_looks_the_same(warm: tuple[Tensor, ConvBN]) -> None:
    for _ in range(3):
        x, conv = torch.randn_like(warm[0]), record()
        assert calls(lambda x=x, conv=conv: torch.testing.assert_close(grouped(x, conv), expected(x, conv))) == 0


def test_every_op() -> None:
    x, wide = torch.randn(1, 8, 9, 9), record(16, 8)
    depthwise, project = record(16, 1, 3), record(8, 16)
    unit = record(8, 4), record(8, 1, 3), record(8, 4)
    halves = record(4, 4), record(4, 1, 3), record(4, 4)
    ops: dict[str, Callable[[], Any]] = {
        "conv_bn_act": lambda: F.conv_bn_act(x, record(6, 8, 3), stride=2, padding=(1, 1), activation="relu6"),
        "pointwise_conv_bn_act": lambda: F.pointwise_conv_bn_act(x, record(8, 8), residual=x.clone()),
        "depthwise_conv_bn_act": lambda: F.depthwise_conv_bn_act(x, record(8, 1, 5), padding=2),
        "inverted_residual": lambda: F.inverted_residual(x, wide, depthwise, project, residual=True),
        "depthwise_separable": lambda: F.depthwise_separable(x, record(8, 1, 3), record(4, 8), stride=2),
        "grouped_pointwise_conv_bn_act": lambda: grouped(x, record()),
        "shuffle_unit": lambda: F.shuffle_unit(x, *unit, groups=2),
        "shuffle_unit_v2": lambda: F.shuffle_unit_v2(x, *halves),
        "max_pool2d": lambda: F.max_pool2d(x, 3, 2, padding=1),
        "avg_pool2d": lambda: F.avg_pool2d(x, 3),
        "global_avg_pool": lambda: F.global_avg_pool(x),
        "linear": lambda: F.linear(x[:, :, 0, 0].contiguous(), torch.ones(3, 8)),
        "channel_shuffle": lambda: F.channel_shuffle(x, 4),
        "channel_shuffle_split": lambda: F.channel_shuffle_split(x),
        "cat_shuffle_split": lambda: F.cat_shuffle_split(x, x.clone(), 4),
    }
    for name, run in ops.items():
        torch.manual_seed(0)
        first = run()
        torch.manual_seed(0)
        assert calls(run) == 0, name
        torch.manual_seed(0)
        torch.testing.assert_close(run(), first, rtol=0, atol=0)


def test_the_checks_come_again(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm
    wrong: list[tuple[Any, ConvBN, dict[str, Any]]] = [
        (x[:, :7], conv, {}),
        (x[0], conv, {}),
        (x.int(), conv, {}),
        (x, conv._replace(weight=conv.weight[:7]), {}),
        (x, conv._replace(bn_bias=torch.ones(9)), {}),
        (x, conv._replace(running_var=None), {}),
        (x, conv, {"groups": 3}),
        (x, conv, {"groups": True}),
        (x, conv, {"shuffle": 0}),
        (x, conv, {"activation": "tanh"}),
        (x, conv, {"residual": x[:, :, :4]}),
    ]
    for other, its_conv, options in wrong:
        with pytest.raises((ValueError, TypeError)):
            grouped(other, its_conv, **options)
    with pytest.raises(TypeError, match="conv: expected a ConvBN"):
        F.grouped_pointwise_conv_bn_act(x, tuple(conv), groups=2, shuffle=2, activation="relu")  # type: ignore[arg-type]


def test_numbers_are_compared(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm
    for options in ({"activation": None}, {"activation": "relu6"}, {"shuffle": 4}, {"groups": 2, "shuffle": 1}):
        torch.testing.assert_close(grouped(x, conv, **options), expected(x, conv, **options))
    for eps in (0.25, 1, 1.0):
        other = conv._replace(eps=eps)
        torch.testing.assert_close(grouped(x, other), expected(x, other))


def test_layouts_are_compared(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm
    pixels = x.contiguous(memory_format=torch.channels_last)
    spaced = torch.randn(16)[::2]
    others = [
        (pixels, conv),
        (torch.randn(2, 12, 5, 7)[:, 2:10], conv),
        (x.transpose(2, 3), conv),
        (x, conv._replace(bn_bias=spaced)),
        (torch._neg_view(x), conv),
        (x, conv._replace(weight=torch._neg_view(conv.weight))),
        (x, conv._replace(bn_weight=torch._neg_view(conv.bn_weight))),
    ]
    for other, its_conv in others:
        for _ in range(2):
            y, wanted = grouped(other, its_conv), expected(other, its_conv)
            torch.testing.assert_close(y, wanted)
            assert y.stride() == wanted.stride()


def test_one_tensor_in_two_places() -> None:
    x = torch.randn(1, 8, 4, 4)
    conv = record(8, 4)
    assert calls(lambda: [grouped(x, conv, residual=x) for _ in range(2)]) == 2
    other = torch.randn(1, 8, 4, 4)
    for residual in (other, x, other):
        torch.testing.assert_close(grouped(x, conv, residual=residual), expected(x, conv, residual=residual))


def test_a_tensor_for_a_truth_value() -> None:
    x, depthwise, project = torch.randn(1, 8, 5, 5), record(8, 1, 3), record(8, 8)
    for residual in (torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)):
        y = F.inverted_residual(x, None, depthwise, project, residual=residual)  # type: ignore[arg-type]
        with fastblocks.use_backend("reference"):
            wanted = F.inverted_residual(x, None, depthwise, project, residual=bool(residual))
        torch.testing.assert_close(y, wanted)
    narrow = record(4, 8)
    F.inverted_residual(x, None, depthwise, narrow, residual=torch.tensor(0.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^residual"):
        F.inverted_residual(x, None, depthwise, narrow, residual=torch.tensor(1.0))  # type: ignore[arg-type]
    for _ in range(2):
        F.inverted_residual(x, None, depthwise, project, residual=(x,))  # type: ignore[arg-type]


def test_lists_of_numbers() -> None:
    x = torch.randn(1, 2, 9, 9)
    for _ in range(2):
        for kernel in ([2, 3], [3, 2], (2, 3), [2, 2]):
            with fastblocks.use_backend("reference"):
                wanted = F.max_pool2d(x, kernel)
            assert torch.equal(F.max_pool2d(x, kernel), wanted)
    assert calls(lambda: F.max_pool2d(x, [2, 3])) == 0
    with pytest.raises(ValueError, match="kernel_size"):
        F.max_pool2d(x, [2, 3, 2])


def test_gradients(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm
    weight = conv.weight.clone().requires_grad_()
    trained = conv._replace(weight=weight)
    for _ in range(2):
        with torch.no_grad():
            assert not grouped(x, trained).requires_grad
        y = grouped(x, trained)
        assert y.requires_grad
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        (wanted,) = torch.autograd.grad(expected(x, trained).sum(), weight)
        torch.testing.assert_close(gradient, wanted)
    assert grouped(x.clone().requires_grad_(), conv).requires_grad


def test_forward_derivatives(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(grouped(dual, conv)).tangent
        torch.testing.assert_close(tangent, forward_ad.unpack_dual(expected(dual, conv)).tangent)


def test_transforms(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm
    torch.testing.assert_close(
        torch.func.vmap(lambda a: grouped(a, conv))(x[None].repeat(3, 1, 1, 1, 1))[2], grouped(x, conv)
    )
    wanted = torch.func.grad(lambda a: expected(a, conv).sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda a: grouped(a, conv).sum())(x), wanted)


def test_who_looks_on(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm
    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode in (Functions, Dispatch):
        seen.clear()
        with mode():
            grouped(x, conv)
        assert any("grouped_pointwise_conv_bn_act" in name for name in seen), mode
    with torch.profiler.profile() as profile:
        grouped(x, conv)
    assert "fastblocks::grouped_pointwise_conv_bn_act" in {event.key for event in profile.key_averages()}
    for device in ("cpu", "cuda"):
        with mock.patch.object(memory, "counts") as counted:
            torch.set_autocast_enabled(device, True)
            try:
                grouped(x, conv)
            finally:
                torch.set_autocast_enabled(device, False)
        assert not counted.mock_calls, device  # nothing was recalled
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped(x, conv).dtype is expected(x, conv).dtype
    F.channel_shuffle(x, 2)
    traced = torch.jit.trace(lambda a: F.channel_shuffle(a, 2), x)
    assert torch.equal(traced(x + 1), F.channel_shuffle(x + 1, 2))


def test_other_tensors(warm: tuple[Tensor, ConvBN]) -> None:
    x, conv = warm

    class Other(Tensor):
        pass

    assert type(grouped(x.as_subclass(Other), conv)) is Other
    double = ConvBN(*(None if t is None else t.double() for t in conv[:6]))
    assert grouped(x.double(), double).dtype is torch.float64
    assert grouped(x.to("meta"), ConvBN(*(None if t is None else t.to("meta") for t in conv[:6]))).is_meta
    with torch.inference_mode():
        torch.testing.assert_close(grouped(x, conv), expected(x, conv))
        torch.testing.assert_close(grouped(x + 1, conv), expected(x + 1, conv))
    compiled = torch.compile(lambda a: grouped(a, conv), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), grouped(x, conv))


def test_tiers(warm: tuple[Tensor, ConvBN], monkeypatch: pytest.MonkeyPatch) -> None:
    x, conv = warm

    def counted(tier: str) -> int:
        return int(counts.snapshot()["calls"]["grouped_pointwise_conv_bn_act"].get(tier, 0))

    for tier in ("reference", "native"):
        with fastblocks.use_backend(tier):
            before = counted(tier)
            assert calls(lambda: grouped(x, conv)) == 0
            assert counted(tier) == before + 1
    monkeypatch.setattr(memory, "_recall", None)
    assert calls(lambda: grouped(x, conv)) == 1


def test_nothing_is_kept_alive() -> None:
    conv = record(10, 5)
    x = torch.randn(1, 10, 3, 3)
    for _ in range(2):
        grouped(x, conv)
    dead = [weakref.ref(x), weakref.ref(conv.weight)]
    del x, conv
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


def test_more_calls_than_are_remembered() -> None:
    conv = record(4, 2)
    for width in range(1, 1100):
        x = torch.ones(1, 4, 1, width)
        assert F.grouped_pointwise_conv_bn_act(x, conv, groups=2).shape == (1, 4, 1, width)
    x = torch.randn(1, 4, 1, 1099)
    assert calls(lambda: F.grouped_pointwise_conv_bn_act(x, conv, groups=2)) == 0
