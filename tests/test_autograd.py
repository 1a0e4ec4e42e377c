"""Gradients: gradcheck in float64, float32 against float64 truth, second derivatives, every subset of inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import record, settled
from torch import Tensor

import fastblocks
from fastblocks import functional as F
from fastblocks.functional import ConvBN

Call = Callable[..., Tensor]


def shuffle_cases() -> dict[str, tuple[Call, list[Tensor]]]:
    """The ops of ShuffleNet and ShuffleNetV2, and the pools, as `cases` has them."""
    grouped, whole = record(6, 2), record(6, 4)
    compress, depthwise = record(4, 2), record(4, 1, 3)
    left = (record(4, 1, 3), record(3, 4))

    def bare(weight: Tensor, like: ConvBN) -> ConvBN:
        return ConvBN(weight, None, *(v.to(weight.dtype) for v in like[2:6]), like.eps)

    def joined(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return F.grouped_pointwise_conv_bn_act(x, bare(w, grouped), groups=2, shuffle=3, activation="relu", residual=r)

    def separable(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.depthwise_separable(x, bare(a, depthwise), bare(b, whole), stride=2, activation="relu")

    def unit(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return F.shuffle_unit(x, bare(a, compress), bare(b, depthwise), ConvBN(c), groups=2)

    def pooled(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return F.shuffle_unit(x, ConvBN(a), bare(b, depthwise), ConvBN(c), groups=2, stride=2)

    def unit_v2(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return F.shuffle_unit_v2(x, ConvBN(a), bare(b, depthwise), ConvBN(c))

    def both_branches(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
        lefts = {"left_depthwise": bare(d, left[0]), "left_pointwise": bare(e, left[1])}
        return F.shuffle_unit_v2(x, ConvBN(a), bare(b, depthwise), ConvBN(c), stride=2, **lefts)

    def halves(x: Tensor) -> Tensor:
        left, right = F.channel_shuffle_split(x, 3)
        return left.sin() * right

    def cat_halves(a: Tensor, b: Tensor) -> Tensor:
        left, right = F.cat_shuffle_split(a, b, 4)
        return left.sin() * right

    image, six = torch.randn(2, 4, 4, 3), torch.randn(2, 6, 4, 3)
    a, c = compress.weight, torch.randn(4, 2, 1, 1)
    return {
        "grouped": (joined, [image, grouped.weight, six]),
        "separable": (separable, [image, depthwise.weight, whole.weight]),
        "unit": (unit, [image, a, depthwise.weight, c]),
        "unit of stride 2": (pooled, [image, torch.randn(4, 4, 1, 1), depthwise.weight, torch.randn(2, 2, 1, 1)]),
        "unit v2": (unit_v2, [image, torch.randn(4, 2, 1, 1), depthwise.weight, torch.randn(2, 4, 1, 1)]),
        "unit v2 of stride 2": (
            both_branches,
            [
                image,
                torch.randn(4, 4, 1, 1),
                depthwise.weight,
                torch.randn(3, 4, 1, 1),
                left[0].weight,
                left[1].weight,
            ],
        ),
        "shuffle": (lambda x: F.channel_shuffle(x, 3), [six]),
        "shuffle and split": (halves, [six]),
        "cat, shuffle and split": (cat_halves, [torch.randn(2, 5, 3, 2), torch.randn(2, 3, 3, 2)]),
        "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [torch.randperm(120).view(2, 3, 5, 4) / 10]),
        "average pool": (lambda x: F.avg_pool2d(x, (3, 2), 1, 1), [image]),
    }


def cases() -> dict[str, tuple[Call, list[Tensor]]]:
    """Ops as functions of tensors alone, with small float32 tensors. Activations are kept away from their kinks."""

    def conv(op: Call, weight: Tensor, vectors: list[Tensor], **kwargs: Any) -> tuple[Call, list[Tensor]]:
        def call(x: Tensor, w: Tensor, b: Tensor, g: Tensor, s: Tensor) -> Tensor:
            mean, var = (v.to(x.dtype) for v in vectors)
            return op(x, ConvBN(w, b, mean, var, g, s, 1e-3), **kwargs)

        k = weight.shape[0]
        return call, [torch.randn(2, 3, 5, 4), weight, torch.randn(k), torch.randn(k), torch.randn(k)]

    d, p, s = record(3, 1, 3), record(4, 3), record(4, 3, 3)
    e, ed, ep = record(6, 3), record(6, 1, 3), record(3, 6)
    weights = [e.weight, ed.weight, ep.weight]

    def residual_block(x: Tensor, a: Tensor, b: Tensor, c: Tensor, scale: Tensor) -> Tensor:
        records = [ConvBN(w, None, *(v.to(x.dtype) for v in r[2:6]), r.eps) for w, r in ((a, e), (b, ed), (c, ep))]
        records[1] = records[1]._replace(bn_weight=scale)
        return F.inverted_residual(x, *records, residual=True)

    def joined(x: Tensor, w: Tensor) -> Tensor:
        return F.pointwise_conv_bn_act(x, ConvBN(w), residual=x, activation="relu")

    return {
        "conv": conv(F.conv_bn_act, s.weight, [s.running_mean, s.running_var], padding=1, stride=2, activation="relu6"),
        "depthwise": conv(F.depthwise_conv_bn_act, d.weight, [d.running_mean, d.running_var], padding=1),
        "pointwise": conv(F.pointwise_conv_bn_act, p.weight, [p.running_mean, p.running_var], activation="relu"),
        "input as residual": (joined, [torch.randn(2, 3, 4, 4), torch.randn(3, 3, 1, 1)]),
        "inverted residual": (residual_block, [torch.randn(1, 3, 4, 4), *weights, torch.randn(6)]),
        "pool": (F.global_avg_pool, [torch.randn(2, 3, 4, 5)]),
        "linear": (F.linear, [torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)]),
        **shuffle_cases(),
    }


NAMES = list(cases())


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(backend: str, name: str) -> None:
    call, tensors = cases()[name]
    doubles = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, doubles)
    assert torch.autograd.gradgradcheck(call, doubles)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_registered_op(name: str) -> None:
    """In float64 the functions leave the registered ops out; their derivative is checked here."""
    call, tensors = cases()[name]
    doubles = [t.double().requires_grad_() for t in tensors]
    calls = []

    def through_ops(name: str, args: tuple[Any, ...], tensors: Any, given: Any = ()) -> Any:
        calls.append(name)
        return getattr(torch.ops.fastblocks, name)(*(list(a) if isinstance(a, tuple) else a for a in args))

    with pytest.MonkeyPatch.context() as patch:
        for module in ("ops", "shuffle_ops", "dispatch"):
            patch.setattr(f"fastblocks.functional.{module}.run", through_ops)
        assert torch.autograd.gradcheck(call, doubles)
        assert torch.autograd.gradgradcheck(call, doubles)
    assert calls


@pytest.mark.parametrize("name", NAMES)
def test_float32_gradients_and_every_subset(tier: str, name: str) -> None:
    call, tensors = cases()[name]
    doubles = [t.double().requires_grad_() for t in tensors]
    y = call(*doubles)
    weight = torch.randn(y.shape)
    truth = torch.autograd.grad((y * weight.double()).sum(), doubles)
    for wanted in itertools.product((True, False), repeat=len(tensors)):
        inputs = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        y = call(*inputs)
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        (y * weight).sum().backward()
        for t, w, g in zip(inputs, wanted, truth, strict=True):
            if not w:
                assert t.grad is None
                continue
            assert t.grad is not None and t.grad.shape == t.shape
            torch.testing.assert_close(t.grad.double(), g, rtol=1e-4, atol=1e-5)


def test_second_derivatives_in_float32(backend: str) -> None:
    for name in NAMES:
        call, tensors = cases()[name]
        results = []
        for dtype in (torch.float32, torch.float64):
            inputs = [t.to(dtype).clone().requires_grad_() for t in tensors]
            grads = torch.autograd.grad(call(*inputs).pow(2).sum(), inputs, create_graph=True)
            total = sum(g.pow(2).sum() for g in grads)
            results.append(torch.autograd.grad(total, inputs))
        for found, truth in zip(*results, strict=True):
            scale = truth.abs().max().item()
            torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-4 * (1 + scale))


def test_gradient_at_the_ends_of_relu6(backend: str) -> None:
    """Zero at 0 and at 6, as torch has it."""
    for activation, want in (("relu6", [0, 0, 1, 0, 0]), ("relu", [0, 0, 1, 1, 1])):
        x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0]).view(1, 1, 1, 5).requires_grad_()
        F.pointwise_conv_bn_act(x, ConvBN(torch.ones(1, 1, 1, 1)), activation=activation).sum().backward()
        assert x.grad is not None and x.grad.flatten().tolist() == want


def test_retained_graphs_and_changed_tensors(backend: str) -> None:
    call, (x, w) = cases()["input as residual"]
    x.requires_grad_()
    y = call(x, w)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * first)
    y = call(x, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_expanded_and_of_empty(backend: str) -> None:
    call, tensors = cases()["pointwise"]
    inputs = [t.clone().requires_grad_() for t in tensors]
    call(*inputs).sum().backward()  # a gradient with strides of 0
    empty = [torch.empty(0, 3, 5, 4).requires_grad_(), *(t.clone().requires_grad_() for t in tensors[1:])]
    y = call(*empty)
    y.sum().backward()
    for t in empty:
        assert t.grad is not None and not t.grad.any() and t.grad.shape == t.shape


def test_shuffles_keep_no_tensor(backend: str) -> None:
    """Their derivative needs none: an input may change, or be freed, before backward."""
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    image = x * 1
    y = F.channel_shuffle(image, 2)
    left, right = F.channel_shuffle_split(image, 2)
    more = F.cat_shuffle_split(image, image, 3)
    with torch.no_grad():
        image.zero_()
    (y + torch.cat([left, 2 * right], 1) + more[0]).sum().backward()
    # one of y, one or two of the halves, and what fell into the first half of the joined channels
    joined = torch.nn.ChannelShuffle(3)(torch.arange(12.0).view(1, 12, 1, 1)).flatten()[:6].long()
    want = torch.nn.ChannelShuffle(3)(torch.tensor([2.0, 2, 2, 3, 3, 3]).view(1, 6, 1, 1)).flatten()
    want += torch.bincount(joined % 6, minlength=6)
    assert x.grad is not None and torch.equal(x.grad, want.view(1, 6, 1, 1).expand(2, 6, 3, 3))


def test_backward_of_shuffles_runs_the_tiers_shuffle(fused: list[str]) -> None:
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    outputs = [F.channel_shuffle(x, 2), *F.channel_shuffle_split(x), *F.cat_shuffle_split(x, x)]
    if fastblocks.current_backend() == "reference":
        pytest.skip("in the reference torch differentiates")
    before = len(fused)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert fused[before:] == ["channel_shuffle"] * 3


def test_one_half_alone(backend: str) -> None:
    """The gradient of a half that nobody uses is zero; so it is with batches of gradients."""
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    left, right = F.channel_shuffle_split(x)
    (grad,) = torch.autograd.grad(right.sum(), x, retain_graph=True)
    assert grad[0, :, 0, 0].tolist() == [0, 1, 0, 1]
    seeds = torch.eye(8).view(8, 1, 2, 2, 2)
    (grads,) = torch.autograd.grad(left, x, seeds, is_grads_batched=True)
    for seed, found in zip(seeds, grads, strict=True):
        y = torch.cat([seed, torch.zeros_like(seed)], 1)
        assert torch.equal(torch.nn.ChannelShuffle(2)(y), found)


@pytest.mark.parametrize("kind", ["conv", "depthwise", "block", "block without expansion"])
def test_layers_in_eval_mode(tier: str, kind: str) -> None:
    """The gradients of a fused layer, against the same layer in float64."""
    layer = settled(
        {
            "conv": lambda: fastblocks.ConvBNAct(8, 8, stride=2),
            "depthwise": lambda: fastblocks.DepthwiseConvBNAct(8),
            "block": lambda: fastblocks.InvertedResidual(8, 8),
            "block without expansion": lambda: fastblocks.InvertedResidual(8, 8, expand_ratio=1),
        }[kind]()
    )
    x = torch.randn(2, 8, 6, 6)
    results = []
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        layer.zero_grad()
        image = x.clone().to(dtype).requires_grad_()
        layer(image).pow(2).sum().backward()
        results.append([image.grad, *(p.grad for p in layer.parameters())])
    for found, truth in zip(*results, strict=True):
        scale = truth.abs().max().item()
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5 * (1 + scale))


def test_frozen_layers_train_what_is_left(backend: str) -> None:
    """A frozen block passes gradients through and gets none; one with a free bias gets that one."""
    layer = settled(fastblocks.InvertedResidual(8, 8)).requires_grad_(False)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for _ in range(3):
        layer(x).sum().backward()
    assert x.grad is not None and x.grad.any() and all(p.grad is None for p in layer.parameters())
    layer.conv[3].bias.requires_grad_()
    layer(x.detach()).sum().backward()
    assert torch.equal(layer.conv[3].bias.grad, torch.full((8,), 72.0))
