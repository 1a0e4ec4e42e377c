"""The end of a network in training: pooling that belongs to the last chain, and the classifier, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_step import lively
from torch import Tensor, nn

import fastblocks
from fastblocks import functional, models
from fastblocks.backends import chain_functions
from fastblocks.backends.program import Kind
from fastblocks.layers.again import Again
from fastblocks.layers.head import Classifier
from fastblocks.layers.train import Builder

SIZES = [(16, 1024, 1000), (1, 1280, 10), (4, 8, 3), (3, 10, 7), (65, 131, 33), (130, 464, 10), (7, 1, 1), (5, 17, 4)]
CLOSE = 2e-6
"""Relative error of a vector of sums of up to 1280 products, norm-wise."""


def leaves(*sizes: Sequence[int]) -> list[Tensor]:
    return [torch.randn(*size, requires_grad=True) for size in sizes]


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def check(found: Sequence[Tensor], expected: Sequence[Tensor], note: Any = None) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, (note, i)
        assert (a.double() - b).norm() <= CLOSE * b.norm(), (note, i)


# ------------------------------------------------------------------------------------------------------- classifier


@pytest.mark.parametrize("sizes", SIZES)
def test_linear(tier: str, sizes: tuple[int, int, int]) -> None:
    rows, fan, out = sizes
    tensors = leaves((rows, fan), (out, fan), (out,))
    grad = torch.randn(rows, out)
    for count in (3, 2):
        truth = doubles(tensors[:count])
        y, expected = functional.linear(*tensors[:count]), F.linear(*truth)
        check([y], [expected.detach()], count)
        found = torch.autograd.grad(y, tensors[:count], grad)
        check(found, torch.autograd.grad(expected, truth, grad.double()), count)


def test_linear_by_the_tier_itself() -> None:
    """Where the weight trains, the native tier's kernels run and not torch's."""
    with fastblocks.use_backend("native"):
        y = functional.linear(*leaves((2, 3), (4, 3), (4,)))
        assert type(y.grad_fn).__name__ == "LinearBackward"
        assert chain_functions().linear is not None


def test_linear_computes_what_is_needed(tier: str) -> None:
    x, weight, bias = leaves((6, 40), (9, 40), (9,))
    grad = torch.randn(6, 9)
    for wanted in ((True, True, False), (False, True, True), (False, True, False), (True, False, True)):
        tensors = [t.detach().requires_grad_(need) for t, need in zip((x, weight, bias), wanted, strict=True)]
        truth = doubles(tensors)
        functional.linear(*tensors).backward(grad)
        F.linear(*truth).backward(grad.double())
        for a, b in zip(tensors, truth, strict=True):
            assert (a.grad is None) == (b.grad is None), wanted
        check([t.grad for t in tensors if t.grad is not None], [t.grad for t in truth if t.grad is not None], wanted)


def test_linear_layouts(tier: str) -> None:
    """Inputs, weights and gradients that are views of something else."""
    base = torch.randn(12, 50)
    for x in (base[:, 3:20], base[::2, :17], torch.randn(17, 6).t(), torch.randn(1, 17).expand(5, 17)):
        for weight in (torch.randn(9, 17), torch.randn(17, 9).t(), torch.randn(9, 30)[:, :17]):
            for grad in (torch.randn(len(x), 9), torch.randn(9, len(x)).t(), torch.ones(()).expand(len(x), 9)):
                tensors = [t.detach().requires_grad_() for t in (x, weight, torch.randn(9))]
                truth = doubles(tensors)
                found = torch.autograd.grad(functional.linear(*tensors), tensors, grad)
                check(found, torch.autograd.grad(F.linear(*truth), truth, grad.double()))


def test_linear_without_rows(backend: str) -> None:
    x, weight, bias = leaves((0, 5), (4, 5), (4,))
    functional.linear(x, weight, bias).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 5)
    assert weight.grad is not None and not weight.grad.any()


def test_linear_twice(backend: str) -> None:
    """Derivatives of derivatives."""
    tensors = leaves((3, 5), (4, 5), (4,))

    def penalty(tensors: Sequence[Tensor], linear: Any) -> Tensor:
        y = linear(*tensors)
        grads = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        total: Tensor = sum((g.square().sum() for g in grads), torch.zeros((), dtype=y.dtype))
        return total

    truth = doubles(tensors)
    found = torch.autograd.grad(penalty(tensors, functional.linear), tensors)
    check(found, torch.autograd.grad(penalty(truth, F.linear), truth))


def test_classifier_in_training(backend: str) -> None:
    """The dropout that torch would have drawn, and then the layer."""
    classifier = Classifier(40, 7, dropout=0.5)
    x = torch.randn(16, 40, requires_grad=True)
    torch.manual_seed(3)
    found = torch.autograd.grad(classifier(x).sum(), [x, *classifier.parameters()])
    torch.manual_seed(3)
    plain = nn.Sequential(*classifier.children())
    for a, b in zip(found, torch.autograd.grad(plain(x).sum(), [x, *plain.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("shape", [(2, 17, 1, 1), (3, 24, 7, 7), (1, 40, 15, 11), (1, 3, 90, 70), (20, 67, 3, 5)])
def test_mean(tier: str, shape: tuple[int, int, int, int]) -> None:
    """The mean as a chain of its own."""
    functions = chain_functions()
    if functions is None:
        pytest.skip("the reference has no functions for chains")
    builder = Builder(torch.empty(shape))
    builder.mean(0)
    program = functions.make_program(tuple(node.flat() for node in builder.nodes))
    x = (torch.randn(shape) + 100.0).contiguous(memory_format=torch.channels_last)
    y, *saved = functions.forward(program, x, (), (), (), ())
    check([y], [x.double().mean((2, 3), keepdim=True)])
    grad = torch.randn(y.shape)
    (found,) = functions.backward(program, grad, x, (), (), (None, *saved), (True,))
    check([found], [(grad.double() / (shape[2] * shape[3])).expand(shape)])


def last_kinds(model: Any) -> list[int]:
    known = model.__dict__["_pooled_training"]
    assert isinstance(known, Again)
    return [chain.program[-1].kind for chain in known.chains]


@pytest.mark.parametrize(
    "name", ["mobilenet_v1_x0_25", "mobilenet_v2_x0_75", "shufflenet_v1_g3_x0_5", "shufflenet_v2_x0_5"]
)
def test_pooling_ends_the_last_chain(name: str) -> None:
    """Of a network in training; what is called by itself, the trunk, does not pool."""
    with fastblocks.use_backend("native"):
        model: Any = lively(models.create(name, num_classes=5))
        x = torch.randn(2, 3, 64, 64)
        for _ in range(3):
            model(x).sum().backward()
        kinds = last_kinds(model)
        assert kinds[-1] == Kind.MEAN and Kind.MEAN not in kinds[:-1]
        trunk = model.trunk(x)
        assert trunk.shape[2:] == (2, 2)
        assert last_kinds(model) == kinds


def test_two_networks_share_the_pooling() -> None:
    """Each remembers its chains, whatever the other does."""
    with fastblocks.use_backend("native"):
        networks: list[Any] = [lively(models.create("shufflenet_v2_x0_5", num_classes=5)) for _ in range(2)]
        x = torch.randn(2, 3, 32, 32)
        for _ in range(3):
            for network in networks:
                network(x).sum().backward()
        known = [network.__dict__["_pooled_training"] for network in networks]
        assert all(again(x) is not None for again in known)
