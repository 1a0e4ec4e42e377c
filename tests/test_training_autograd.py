"""Layers in training as parts of autograd: edits in place, second derivatives, batches of gradients, threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from one_step import check_step, leaves, lively
from test_training_semantics import LAYERS, image, results
from torch import Tensor

import fastblocks
from fastblocks import (
    ConvBNAct,
    InvertedResidual,
    MaxPool2d,
    PointwiseConvBNAct,
    Sequential,
    ShuffleUnit,
    ShuffleUnitV2,
)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    return lively(LAYERS[request.param]())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_weights_edited_between_forward_and_backward(backend: str, layer: Any) -> None:
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            continue
        y = layer(image().requires_grad_())
        with torch.no_grad():
            p.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    x = image()
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_output_edited_between_forward_and_backward(backend: str, layer: Any) -> None:
    """torch's error where the output is saved; where it is not, the gradients are those without the edit."""
    other, x = copy.deepcopy(layer), image()
    want = layer(x)
    want.sum().backward()
    y = other(x)
    y.mul_(1)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        for a, b in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_statistics_edited_between_forward_and_backward(backend: str, layer: Any) -> None:
    """A second forward updates them; the graph of the first does not care."""
    x = image().requires_grad_()
    want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    first = layer(x)
    layer(x + 1)
    for found, expected in zip(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()]), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(backend: str, layer: Any, training: bool) -> None:
    """Gradients of gradients, against float64; or a RuntimeError that says that there are none."""
    layer.train(training)
    x = image()
    found = []
    for model, run in ((layer, layer), (copy.deepcopy(layer).double(), None), (copy.deepcopy(layer), None)):
        source = x.to(next(model.parameters()).dtype).requires_grad_()
        y = run(source) if run is not None else leaves(model, source)
        # the plain sum of squares behind a BatchNorm is a constant, nearly
        weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)
        grads = torch.autograd.grad((y.sin() * weights).sum(), [source, *model.parameters()], create_graph=True)
        penalty = sum((g.square().sum() for g in grads[:3]), torch.zeros(()))
        found.append(torch.autograd.grad(penalty, [source, *model.parameters()], allow_unused=True))
    largest = max(truth.norm().item() for truth in found[1] if truth is not None)
    for ours, truth, torchs in zip(*found, strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None:
            scale = max(1e-9, truth.norm().item(), 1e-3 * largest)
            allowed = max(1e-3, 10 * (torchs - truth).norm().item() / scale)
            assert (ours - truth).norm().item() / scale <= allowed


def test_gradient_penalty(backend: str) -> None:
    """First and second derivatives in one backward."""
    layer = lively(InvertedResidual(8, 8))
    plain = copy.deepcopy(layer)
    x = image()
    for run in (layer, lambda x: leaves(plain, x)):
        source = x.clone().requires_grad_()
        y = run(source)
        (g,) = torch.autograd.grad(y.sum(), source, create_graph=True)
        (y.square().mean() + (g.norm() - 1).square()).backward()
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_batches_of_gradients(backend: str, layer: Any) -> None:
    """What torch calls is_grads_batched; as many backwards give the same."""
    x = image().requires_grad_()
    y = layer(x)
    seeds = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True, retain_graph=True)
    for seed, grad in zip(seeds, found, strict=True):
        (want,) = torch.autograd.grad(y, x, seed, retain_graph=True)
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wanted", [True, False])
def test_forward_mode(backend: str, layer: Any, wanted: bool) -> None:
    """Dual numbers go through the children, whether a backward may come or not."""
    layer.requires_grad_(wanted)
    plain, x, tangent = copy.deepcopy(layer), image(), image()
    found = []
    for run in (layer, lambda x: leaves(plain, x)):
        with torch.autograd.forward_ad.dual_level():
            y = run(torch.autograd.forward_ad.make_dual(x, tangent))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_negated_and_undefined_gradients(backend: str, layer: Any) -> None:
    """A gradient with the negative bit, and an output of which nothing is used."""
    x = image().requires_grad_()
    y = layer(x)
    z = torch.randn(*y.shape, dtype=torch.complex64).conj().imag
    assert z.is_neg()
    (found,) = torch.autograd.grad(y, x, z, retain_graph=True)
    (want,) = torch.autograd.grad(y, x, z.resolve_neg(), retain_graph=True)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    (nothing,) = torch.autograd.grad((y * 0).sum(), x)
    assert not nothing.any()


def test_hooks_on_tensors(backend: str, layer: Any) -> None:
    """Hooks on parameters, on the input and on the output, and torch's check for NaN."""
    x = image().requires_grad_()
    seen: list[str] = []
    handles = [p.register_hook(lambda g, n=n: seen.append(n)) for n, p in layer.named_parameters()]
    x.register_hook(lambda g: 2 * g)
    with torch.autograd.set_detect_anomaly(True):
        y = layer(x)
        y.register_hook(lambda g: 3 * g)
        y.sum().backward()
    assert sorted(seen) == sorted(n for n, _ in layer.named_parameters())
    for handle in handles:
        handle.remove()
    again = x.detach().requires_grad_()
    layer(again).sum().backward()
    torch.testing.assert_close(x.grad, 6 * again.grad, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_at_any_number_of_threads(tier: str, threads: None, name: str) -> None:
    """Output, gradients and statistics; and from run to run.

    The numba tier's products are torch's, which may depend on the number of threads: there, from run to run alone.
    """
    if tier == "reference":
        pytest.skip("torch's own results may depend on threads")
    layer = lively(LAYERS[name]())
    x = torch.randn(4, 8, 23, 21)
    g = torch.randn_like(copy.deepcopy(layer)(x)).detach()
    want: dict[int, list[Tensor]] = {}
    for count in (1, 2, 3, 4, 1, 2):
        torch.set_num_threads(count)
        found = results(copy.deepcopy(layer), x, g)
        like = want.setdefault(count if tier == "numba" else 0, found)
        assert all(map(torch.equal, found, like)), count


def test_same_bits_beside_other_threads(threads: None) -> None:
    """Two Python threads, each training a layer of its own."""
    import threading

    torch.set_num_threads(2)
    layers = [lively(InvertedResidual(8, 8)) for _ in range(2)]
    images = [torch.randn(2, 8, 15, 15) for _ in range(2)]
    want = [results(copy.deepcopy(layer), x) for layer, x in zip(layers, images, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not all(map(torch.equal, results(copy.deepcopy(layers[i]), images[i]), want[i])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_recycled_memory(backend: str) -> None:
    """Many steps of changing sizes; an older graph's tensors stay as they are while newer ones come and go."""
    makers: list[Callable[[], Any]] = [
        lambda: ConvBNAct(8, 8, 3, 2),
        lambda: PointwiseConvBNAct(8, 8),
        lambda: ShuffleUnit(8, 8, 1, 2),
        lambda: ShuffleUnitV2(8, 8, 1),
        lambda: Sequential(InvertedResidual(8, 8), MaxPool2d(2), InvertedResidual(8, 8)),
    ]
    kept: list[tuple[Any, Tensor, Tensor, Tensor]] = []
    for i in range(25):
        layer = lively(makers[i % len(makers)]())
        x = torch.randn(1 + i % 3, 8, 4 + i % 7, 5 + i % 5)
        y = layer(x.requires_grad_())
        kept.append((layer, x, y, y.detach().clone()))
        if i % 4 == 3:
            fastblocks.empty_cache()
    for layer, x, y, copied in kept:
        assert torch.equal(y, copied)
        other = copy.deepcopy(layer)
        y.square().sum().backward()
        again = x.detach().requires_grad_()
        other(again).square().sum().backward()
        torch.testing.assert_close(x.grad, again.grad, rtol=1e-3, atol=1e-3)


def test_larger_maps(tier: str) -> None:
    """Maps whose tensors are cut into many items."""
    row = lively(Sequential(ConvBNAct(3, 16, 3, 2), InvertedResidual(16, 24, 2), InvertedResidual(24, 24)))
    check_step(row, torch.randn(2, 3, 96, 90), least=1e-4)
    check_step(lively(ShuffleUnitV2(24, 48, 2)), torch.randn(2, 24, 45, 40), least=1e-4)
