"""Global average pooling in training, which belongs to a network's last chain, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from one_step import lively
from torch import Tensor

import fastblocks
from fastblocks import models
from fastblocks.backends import chain_functions, reference_training
from fastblocks.backends.program import Kind, Tensors
from fastblocks.layers.again import Again
from fastblocks.layers.train import Builder

CLOSE = 2e-6
"""Relative error, norm-wise."""


def check(found: Sequence[Tensor], expected: Sequence[Tensor], note: Any = None) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, (note, i)
        assert (a.double() - b).norm() <= CLOSE * b.norm(), (note, i)


@pytest.mark.parametrize("shape", [(2, 17, 1, 1), (3, 24, 7, 7), (1, 40, 15, 11), (1, 3, 90, 70), (20, 67, 3, 5)])
def test_mean(tier: str, shape: tuple[int, int, int, int]) -> None:
    """The mean as a chain of its own."""
    builder = Builder(torch.empty(shape))
    builder.mean(0)
    x = (torch.randn(shape) + 100.0).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(*shape[:2], 1, 1)
    functions = chain_functions()
    if functions is None:
        x.requires_grad_()
        y = reference_training.chain(tuple(builder.nodes), x, Tensors((), (), (), ()))
        (found,) = torch.autograd.grad(y, x, grad)
    else:
        program = functions.make_program(tuple(node.flat() for node in builder.nodes))
        y, *saved = functions.forward(program, x, (), (), (), ())
        (found,) = functions.backward(program, grad, x, (), (), (None, *saved), (True,))
    check([y.detach()], [x.detach().double().mean((2, 3), keepdim=True)])
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
