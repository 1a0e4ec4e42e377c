"""What training must mean beside its numbers: BatchNorm's rules, autograd's rules, the same bits every time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from one_step import check_step, count_chains, leaves, lively, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastblocks
from fastblocks import (
    ConvBNAct,
    DepthwiseSeparableConv,
    InvertedResidual,
    MaxPool2d,
    PointwiseConvBNAct,
    Sequential,
    ShuffleUnit,
    ShuffleUnitV2,
)

LAYERS: dict[str, Callable[[], Any]] = {
    "stem": lambda: ConvBNAct(8, 8, 3, 2),
    "pointwise": lambda: PointwiseConvBNAct(8, 17),
    "inverted residual": lambda: InvertedResidual(8, 8),
    "unit": lambda: ShuffleUnit(8, 8, 1, 2),
    "unit, stride": lambda: ShuffleUnit(8, 16, 2, 2),
    "unit v2": lambda: ShuffleUnitV2(8, 8, 1),
    "unit v2, stride": lambda: ShuffleUnitV2(8, 16, 2),
    "pool amid": lambda: Sequential(ConvBNAct(8, 8, 3), MaxPool2d(3, 2, 1), PointwiseConvBNAct(8, 8)),
    "sums": lambda: Sequential(*(ShuffleUnit(8, 8, 1, 2) for _ in range(3))),
    "row": lambda: Sequential(DepthwiseSeparableConv(8, 8), InvertedResidual(8, 8), InvertedResidual(8, 12, 2)),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    return lively(LAYERS[request.param]())


def image() -> Tensor:
    return torch.randn(2, 8, 6, 7)


def norms(layer: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in layer.modules() if isinstance(module, nn.BatchNorm2d))


def results(layer: Any, x: Tensor, g: Tensor | None = None) -> list[Tensor]:
    """Everything that a step leaves behind."""
    found = step(layer, layer, x, g)
    return [found.y.detach(), *(t for t in found.grads.values() if t is not None), *found.statistics.values()]


# ------------------------------------------------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None, 0.37])
def test_momentum(backend: str, momentum: float | None) -> None:
    layer = lively(InvertedResidual(8, 8))
    for bn in norms(layer):
        bn.momentum = momentum
    for i in range(4):
        check_step(layer, image() + i, note=i)
    assert all(int(bn.num_batches_tracked) == 4 for bn in norms(layer))
    for bn in norms(layer):
        bn.reset_running_stats()
    check_step(layer, image())


def test_settings_of_batch_norm(backend: str, layer: Any) -> None:
    def changed(**values: Any) -> Any:
        other = copy.deepcopy(layer)
        for bn in norms(other):
            for name, value in values.items():
                setattr(bn, name, value)
        return other

    for values in (
        {"eps": 0.5},
        {"eps": 1e-9},
        {"weight": None, "bias": None},
        {"bias": None},
        {"weight": None},
        {"running_mean": None, "running_var": None, "num_batches_tracked": None, "track_running_stats": False},
        {"num_batches_tracked": None},
        {"num_batches_tracked": None, "momentum": None},
        {"track_running_stats": False},
    ):
        for training in (True, False):
            check_step(changed(**values).train(training), image(), note=(values, training))


def test_constructed_without_statistics(backend: str) -> None:
    """Batch statistics in eval mode too."""
    bare = InvertedResidual(8, 8, norm_layer=lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False))
    for training in (True, False):
        found = check_step(bare.train(training), image())
        assert count_chains(found) in (None, 1)


def test_frozen(backend: str, layer: Any) -> None:
    """One BatchNorm in eval mode in a layer that trains; then the whole layer, with gradients."""
    for bn in norms(layer):
        bn.eval()
        before = bn.running_mean.clone()
        check_step(layer, image())
        assert torch.equal(bn.running_mean, before)
        bn.train()
    layer.train(False)
    check_step(layer, image())
    for bn in norms(layer):
        bn.train()
        check_step(layer, image())
        bn.eval()


def test_one_value_a_channel(backend: str) -> None:
    for make in (lambda: PointwiseConvBNAct(8, 8), lambda: InvertedResidual(8, 8), lambda: ConvBNAct(8, 8, 3, 2)):
        layer = lively(make())
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            layer(torch.randn(1, 8, 1, 1))
        layer(torch.randn(2, 8, 1, 1)), layer(torch.randn(1, 8, 3, 3))
        assert layer.eval()(torch.randn(1, 8, 1, 1)).requires_grad
    row = lively(Sequential(PointwiseConvBNAct(8, 8), InvertedResidual(8, 8, 2)))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        row(torch.randn(1, 8, 2, 2))


def test_a_mean_far_from_zero(tier: str) -> None:
    """Channels with mean 1e4 and deviation 0.1, and a constant one."""
    layer = PointwiseConvBNAct(8, 8, activation_layer=None).train()
    nn.init.dirac_(layer[0].weight)
    x = 1e4 + 0.1 * torch.randn(4, 8, 16, 16)
    x[:, 3] = 1e4
    y = layer(x)
    kept = [0, 1, 2, 4, 5, 6, 7]
    double = x.double()
    mean, var = double.mean((0, 2, 3)), double.var((0, 2, 3), correction=0)
    want = (double - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    # torch rounds the mean, which at 1e4 is to a thousandth
    assert (y - want)[:, kept].abs().max() < (0.02 if tier == "reference" else 1e-3) and y.isfinite().all()
    assert y[:, 3].abs().max() < 0.5
    torch.testing.assert_close(layer[1].running_mean.double(), 0.1 * mean, rtol=1e-6, atol=0.0)
    unbiased = 0.9 + 0.1 * double.var((0, 2, 3))
    torch.testing.assert_close(layer[1].running_var.double(), unbiased, rtol=1e-5, atol=0.0)


def test_a_constant_channel(backend: str) -> None:
    layer = PointwiseConvBNAct(8, 8, activation_layer=None).train()
    nn.init.dirac_(layer[0].weight)
    x = image()
    x[:, 2] = 0.75
    check_step(layer, x, least=1e-4)
    assert (layer(x)[:, 2] - layer[1].bias[2]).abs().max() < 1e-5


@pytest.mark.parametrize("value", [1e30, -3e38, 1e-42, float("inf"), float("nan")])
def test_extreme_values(backend: str, layer: Any, value: float) -> None:
    """No crash; what is NaN in torch is NaN, in the output and the statistics."""
    plain = copy.deepcopy(layer)
    x = image()
    x[0, 1, 2, 3] = value
    y, want = layer(x), leaves(plain, x)
    y.sum().backward()
    if value != value:
        assert torch.equal(y.isnan(), want.isnan()) and y.isnan().any()
        for bn, other in zip(norms(layer), norms(plain), strict=True):
            assert torch.equal(bn.running_mean.isnan(), other.running_mean.isnan())
            assert torch.equal(bn.running_var.isnan(), other.running_var.isnan())
    if abs(value) < 1e-40:
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_nan_in_the_gradient(backend: str, layer: Any) -> None:
    """Parameters and inputs whose gradient is NaN in torch have one here."""
    plain, x = copy.deepcopy(layer), image()
    g = torch.randn_like(leaves(copy.deepcopy(layer), x)).detach()
    g[1, 2] = float("nan")
    found, want = step(layer, layer, x, g), step(plain, lambda x: leaves(plain, x), x, g)
    for name, grad in want.grads.items():
        assert torch.equal(found.grads[name].isnan(), grad.isnan()), name


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_gradients_at_the_corners(tier: str, act: Any) -> None:
    """Where the activation's input is exactly 0 or 6 the gradient is 0, as torch has it."""
    layer = PointwiseConvBNAct(1, 1, activation_layer=act).eval()
    with torch.no_grad():
        layer[0].weight.fill_(1.0)
    layer[1].eps = 0.0
    x = torch.tensor([-1.0, 0.0, 1e-6, 3.0, 5.999999, 6.0, 6.000001, 7.0]).view(1, 1, 1, 8).requires_grad_()
    y = layer(x)
    y.sum().backward()
    open_end = act is nn.ReLU
    assert x.grad.flatten().tolist() == [0, 0, 1, 1, 1, open_end, open_end, open_end]
    block = lively(ShuffleUnit(8, 8, 1, 2))
    for bn in norms(block.expand):
        nn.init.zeros_(bn.weight), nn.init.zeros_(bn.bias)
    zeros = torch.zeros(2, 8, 4, 4, requires_grad=True)
    block(zeros).sum().backward()
    assert not zeros.grad.any() and not block.expand[1].bias.grad.any()


# -------------------------------------------------------------------------------------------------------- autograd


def test_any_subset_of_gradients(backend: str) -> None:
    """What is wanted equals what a full backward gives; the rest is None."""
    for make, every in ((lambda: PointwiseConvBNAct(8, 17), True), (lambda: InvertedResidual(8, 8), False)):
        layer = lively(make())
        x, g = image(), torch.randn_like(layer(image())).detach()
        names = ["input", *(n for n, _ in layer.named_parameters())]
        full = step(layer, layer, x, g).grads
        for flags in itertools.product((True, False), repeat=len(names)):
            if not any(flags) or (not every and sum(flags) not in (1, 2, len(names) - 1)):
                continue
            wanted = dict(zip(names, flags, strict=True))
            for name, p in layer.named_parameters():
                p.grad = None
                p.requires_grad_(wanted[name])
            source = x.clone().requires_grad_(wanted["input"])
            layer(source).backward(g)
            for name, p in (("input", source), *layer.named_parameters()):
                assert (p.grad is not None) == wanted[name], (name, wanted)
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, full[name], rtol=1e-4, atol=1e-5)


def test_no_input_gradient_and_frozen_weights(backend: str, layer: Any) -> None:
    x, wanted = image(), {}
    for index, (name, p) in enumerate(layer.named_parameters()):
        p.requires_grad_(index % 3 == 1)
        wanted[name] = index % 3 == 1
    check_step(layer, x)
    layer(x).sum().backward()
    assert {n: p.grad is not None for n, p in layer.named_parameters()} == wanted


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_statistics_without_gradients(backend: str, layer: Any, context: Any) -> None:
    plain, x = copy.deepcopy(layer), image()
    with context():
        y, want = layer(x), leaves(plain, x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    for found, expected in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_versions_of_statistics(backend: str, layer: Any) -> None:
    """A pack or a graph that depends on statistics can tell that they changed. (torch's own kernel does not say so.)"""
    before = [b._version for b in layer.buffers()]
    layer(image())
    for b, v in zip(layer.buffers(), before, strict=True):
        assert b._version > v or (b.is_floating_point() and fastblocks.current_backend() == "reference")
    layer.eval()
    before = [b._version for b in layer.buffers()]
    layer(image())
    assert [b._version for b in layer.buffers()] == before


def test_retained_graph(backend: str, layer: Any) -> None:
    x = image().requires_grad_()
    y = layer(x)
    inputs = [x, *layer.parameters()]
    g = torch.randn_like(y)
    first = torch.autograd.grad(y, inputs, g, retain_graph=True)
    second = torch.autograd.grad(y, inputs, g, retain_graph=True)
    assert all(map(torch.equal, first, second))
    y.backward(g), layer(x).backward(g)
    for p, one in zip(inputs, first, strict=True):
        torch.testing.assert_close(p.grad, 2 * one, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(g)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend: str, layer: Any, reentrant: bool) -> None:
    other, x = copy.deepcopy(layer), image()
    want = step(layer, layer, x).grads
    found = step(other, lambda x: checkpoint(other, x, use_reentrant=reentrant), x).grads
    assert all(torch.equal(found[name], grad) for name, grad in want.items())


def test_saved_tensors_may_be_moved(backend: str, layer: Any) -> None:
    """Hooks that put saved tensors elsewhere, and bring them back as others."""
    other, x = copy.deepcopy(layer), image()
    want = step(layer, layer, x).grads
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        found = step(other, other, x).grads
    assert all(torch.allclose(found[name], grad, rtol=1e-4, atol=1e-5) for name, grad in want.items())
