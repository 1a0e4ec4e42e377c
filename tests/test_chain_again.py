"""A chain that runs its calls of the last time again: whatever changes in between is seen."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import settled
from torch import Tensor, nn

import fastblocks
from fastblocks import ConvBNAct, InvertedResidual, Sequential

native = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="chains belong to the native tier")


def network() -> Any:
    return settled(
        Sequential(ConvBNAct(3, 12, stride=2), InvertedResidual(12, 8, expand_ratio=1), InvertedResidual(8, 8))
    )


def one_by_one(layers: Any, x: Tensor) -> Tensor:
    """By torch alone."""
    with fastblocks.use_backend("reference"):
        for layer in layers:
            x = layer(x)
    return x


def stem(layers: Any) -> Any:
    return layers[0][0]


def norm(layers: Any) -> Any:
    return layers[0][1]


def last(layers: Any) -> Any:
    return layers[2].conv[2]


def exchange_module(layers: Any) -> None:
    layers[2] = settled(InvertedResidual(8, 8))


def other_statistics(layers: Any) -> None:
    norm(layers).running_mean = torch.full((12,), 0.5)


def larger_eps(layers: Any) -> None:
    norm(layers).eps = 0.25


def hook(layers: Any) -> None:
    layers[1].register_forward_hook(lambda module, args, output: output + 1.0)


def inner_hook(layers: Any) -> None:
    norm(layers).register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def other_forward(layers: Any) -> None:
    layers[1].forward = lambda x: torch.ones(1, 8, *x.shape[2:])


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def other_class(layers: Any) -> None:
    norm(layers).__class__ = Doubled


EDITS: dict[str, Callable[[Any], object]] = {
    "weight in place": lambda layers: stem(layers).weight.mul_(-1.0),
    "another parameter": lambda layers: setattr(stem(layers), "weight", nn.Parameter(torch.ones(12, 3, 3, 3))),
    "other data": lambda layers: setattr(last(layers).weight, "data", torch.ones_like(last(layers).weight)),
    "a new bias": lambda layers: setattr(last(layers), "bias", nn.Parameter(torch.ones(8))),
    "statistics in place": lambda layers: norm(layers).running_var.fill_(4.0),
    "statistics through data": lambda layers: norm(layers).running_mean.data.fill_(1.0),
    "other statistics": other_statistics,
    "norm without weight": lambda layers: setattr(norm(layers), "weight", None),
    "eps": larger_eps,
    "stride": lambda layers: setattr(stem(layers), "stride", (1, 1)),
    "activation": lambda layers: layers[0].__setitem__(2, nn.Identity()),
    "a layer": exchange_module,
    "a layer less": lambda layers: layers.__delitem__(2),
    "hook": hook,
    "inner hook": inner_hook,
    "forward": other_forward,
    "class": other_class,
    "state": lambda layers: layers.load_state_dict(network().state_dict()),
    "state assigned": lambda layers: layers.load_state_dict(network().state_dict(), assign=True),
    "nothing": lambda layers: None,
}


def edited(layers: Any, edit: str) -> None:
    torch.manual_seed(1)
    EDITS[edit](layers)


@native
@pytest.mark.parametrize("edit", EDITS)
def test_sees_an_edit(tier: str, edit: str) -> None:
    layers, x = network(), torch.randn(1, 3, 33, 30)
    with torch.no_grad():
        same, other = one_by_one(layers, x), copy.deepcopy(layers)
        edited(other, edit)
        want = one_by_one(other, x)
        assert (edit == "nothing") == (want.shape == same.shape and torch.equal(want, same))
        for _ in range(4):
            torch.testing.assert_close(layers(x), same)
        edited(layers, edit)
        for _ in range(4):
            torch.testing.assert_close(layers(x), want)


@native
def test_sees_double_precision_and_back(tier: str) -> None:
    layers, x = network(), torch.randn(1, 3, 33, 30)
    with torch.no_grad():
        want = [layers(x) for _ in range(3)][-1]
        layers.double()
        got = layers(x.double())
        assert got.dtype is torch.float64
        torch.testing.assert_close(got.float(), want)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            layers(x)
        layers.float()
        for _ in range(3):
            torch.testing.assert_close(layers(x), want)


@native
def test_sees_an_address_that_comes_back(tier: str) -> None:
    """With other numbers and the same version: the pack in between is another's."""
    layers, x = network(), torch.randn(1, 3, 33, 30)
    weight, y = last(layers).weight, torch.randn(1, 8, 17, 15).contiguous(memory_format=torch.channels_last)
    first, other = torch.ones_like(weight), torch.zeros_like(weight)
    with torch.no_grad():
        weight.data = first
        [layers(x) for _ in range(3)]
        weight.data = other
        layers[2](y)
        first.fill_(2.0)
        weight.data = first
        for _ in range(3):
            torch.testing.assert_close(layers(x), one_by_one(layers, x))


@native
def test_training_in_between(tier: str) -> None:
    layers, x = network(), torch.randn(2, 3, 33, 30)
    with torch.no_grad():
        [layers(x) for _ in range(3)]
    layers.train()
    with torch.no_grad():
        layers(x)
    layers.eval()
    with torch.no_grad():
        torch.testing.assert_close(layers(x), one_by_one(layers, x))
    assert layers(x).requires_grad
    with torch.no_grad():
        assert not layers(x).requires_grad


@native
def test_other_numbers_sizes_and_formats(tier: str) -> None:
    layers = network()
    with torch.no_grad():
        for size in ((1, 3, 33, 30), (1, 3, 33, 30), (2, 3, 16, 16), (2, 3, 16, 16), (0, 3, 16, 16), (0, 3, 16, 16)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                inputs = [torch.randn(size).contiguous(memory_format=memory_format) for _ in range(3)]
                for x, got in [(x, layers(x)) for x in inputs]:
                    torch.testing.assert_close(got, one_by_one(layers, x))
        whole = torch.randn(1, 6, 20, 40)
        for view in (whole[:, 3:], whole[:, :3, :, ::2], whole[:, ::2], whole.transpose(2, 3)[:, :3]):
            for got in [layers(view) for _ in range(3)]:
                torch.testing.assert_close(got, one_by_one(layers, view))


@native
def test_wrong_inputs(tier: str) -> None:
    layers, x = network(), torch.randn(1, 3, 33, 30)
    with torch.no_grad():
        want = [layers(x) for _ in range(3)][-1]
        for wrong in (torch.randn(1, 4, 33, 30), torch.randn(33, 30), torch.ones(1, 3, 33, 30, dtype=torch.int32)):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                layers(wrong)
            assert torch.equal(layers(x), want)


@native
def test_holds_no_input_and_no_layer(tier: str) -> None:
    layers = network()
    with torch.no_grad():
        x = torch.randn(1, 3, 33, 30)
        [layers(x) for _ in range(3)]
        alive = weakref.ref(x)
        del x
        assert alive() is None
        weight = weakref.ref(stem(layers).weight)
        stem(layers).weight = nn.Parameter(torch.ones(12, 3, 3, 3))
        assert weight() is None
        model = weakref.ref(layers)
        del layers
        gc.collect()
        assert model() is None


@native
def test_refresh(tier: str) -> None:
    """An edit through .data changes no version: refresh() tells of it."""
    layers, x = network(), torch.randn(1, 3, 33, 30)
    with torch.no_grad():
        [layers(x) for _ in range(3)]
        last(layers).weight.data.mul_(-2.0)
        fastblocks.refresh(layers)
        got = [layers(x) for _ in range(3)]
        for each in got:
            torch.testing.assert_close(each, one_by_one(layers, x))


@native
def test_many_python_threads(tier: str) -> None:
    layers = network()
    inputs = [torch.randn(1, 3, 33, 30) for _ in range(4)]
    with torch.no_grad():
        want = [layers(x).clone() for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(layers(inputs[i]), want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@native
def test_instruction_sets_in_turn() -> None:
    native_tier = pytest.importorskip("fastblocks.backends.native")
    layers, x = network(), torch.randn(1, 3, 33, 30)
    with torch.no_grad():
        want = one_by_one(layers, x)
        for level in 2 * native_tier.isa_levels():
            with native_tier.use_isa(level):
                for _ in range(3):
                    torch.testing.assert_close(layers(x), want)
