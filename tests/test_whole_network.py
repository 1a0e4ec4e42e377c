"""The networks from image to logits in one go: the same numbers as part by part, and nothing overlooked."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import settled
from torch import Tensor, nn

import fastblocks
from fastblocks.layers.head import global_avg_pool

NAMES = ("mobilenet_v1_x0_25", "mobilenet_v2", "shufflenet_v1_g3_x0_5", "shufflenet_v2_x0_5")


def network(name: str) -> nn.Module:
    return settled(fastblocks.models.create(name, num_classes=10))


def parts(model: nn.Module, x: Tensor) -> Tensor:
    """Trunk, pooling and classifier, each called by itself."""
    classifier = model.classifier if hasattr(model, "classifier") else model.fc
    trunk = model.features(x) if hasattr(model, "features") else model.trunk(x)
    return classifier(global_avg_pool(trunk))


def in_one_go(model: nn.Module) -> bool:
    return model.__dict__.get("_network") is not None


@pytest.fixture(autouse=True)
def native_and_no_grad():
    if fastblocks.current_backend() != "native":
        pytest.skip("chains belong to the native tier")
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_its_parts(name: str, tier: str) -> None:
    model = network(name)
    for batch, side in ((1, 64), (3, 32), (1, 96), (0, 32)):
        x = torch.randn(batch, 3, side, side)
        want = parts(model, x)
        for _ in range(3):
            got = model(x)
            assert torch.equal(got, want)
            assert got.shape == (batch, 10) and got.is_contiguous()
    assert in_one_go(model) == tier.startswith("native")


@pytest.mark.parametrize("name", ["mobilenet_v1", "shufflenet_v2_x1_0"])
def test_images_run_apart_from_each_other(name: str) -> None:
    """More threads than cores, each with its own images: none writes where another, far behind, still reads."""
    model = network(name)
    x = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    former = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = model(x)
        for threads in (3, 4, 6):
            torch.set_num_threads(threads)
            assert all(torch.equal(model(x), want) for _ in range(60))
    finally:
        torch.set_num_threads(former)


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_give_what_one_gives(name: str) -> None:
    """Items are cut by the number of threads; what each computes is not."""
    model, x = network(name), torch.randn(1, 3, 64, 64)
    former = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([model(x) for _ in range(3)][-1])
    finally:
        torch.set_num_threads(former)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", NAMES)
def test_against_float64(name: str) -> None:
    model, x = network(name), torch.randn(2, 3, 64, 64)
    truth = copy.deepcopy(model).double()(x.double())
    for _ in range(3):
        got = model(x)
    assert in_one_go(model)
    assert (got - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_hook_on_any_part_is_called() -> None:
    for part in ("classifier", "classifier.1", "features", "features.3", "features.3.conv.0.0"):
        model, x = network("mobilenet_v2"), torch.randn(1, 3, 64, 64)
        want = [model(x) for _ in range(3)][-1]
        assert in_one_go(model)
        seen: list[str] = []
        handle = model.get_submodule(part).register_forward_hook(lambda *_, name=part, seen=seen: seen.append(name))
        for _ in range(2):
            assert torch.allclose(model(x), want, rtol=0, atol=1e-5 * want.abs().max().item())
        assert seen == [part, part]
        handle.remove()
        assert torch.equal([model(x) for _ in range(2)][-1], want)
        assert seen == [part, part]


def test_another_classifier_is_used() -> None:
    model, x = network("shufflenet_v2_x0_5"), torch.randn(1, 3, 64, 64)
    features = [global_avg_pool(model.trunk(x)) for _ in range(2)][-1]
    for _ in range(3):
        model(x)
    model.fc.weight.mul_(2)
    assert torch.equal(model(x), model.fc(features))
    model.fc = nn.Linear(1024, 7)
    for _ in range(2):
        assert torch.allclose(model(x), model.fc(features), rtol=1e-5, atol=1e-6)
    model.fc = nn.Identity()
    for _ in range(2):
        assert torch.equal(model(x), features)


def test_a_patched_forward_is_used() -> None:
    model, x = network("shufflenet_v2_x0_5"), torch.randn(1, 3, 64, 64)
    for _ in range(3):
        model(x)
    model.fc.forward = lambda v: v[:, :2]
    assert model(x).shape == (1, 2)


def test_dropout_in_training_mode_is_applied() -> None:
    model, x = network("mobilenet_v2"), torch.randn(1, 3, 64, 64)
    for _ in range(3):
        model(x)
    model.classifier[0].p = 1.0
    model.classifier[0].train()
    assert torch.equal(model(x)[0], model.classifier[1].bias)


def test_with_gradients_it_steps_aside_and_stays_good() -> None:
    model, x = network("mobilenet_v2"), torch.randn(1, 3, 64, 64)
    want = [model(x) for _ in range(3)][-1]
    before = model.__dict__["_network"]
    with torch.enable_grad():
        logits = model(x)
        assert logits.requires_grad
        logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.__dict__["_network"] is before
    assert torch.equal(model(x), want)


def test_inputs_that_do_not_fit_are_refused_as_ever() -> None:
    model = network("mobilenet_v2")
    for _ in range(3):
        model(torch.randn(1, 3, 32, 32))
    for wrong in (torch.randn(1, 4, 32, 32), torch.randn(3, 32), torch.ones(1, 3, 32, 32, dtype=torch.int32)):
        with pytest.raises((ValueError, TypeError), match="input"):
            model(wrong)


def test_copies_and_pickles_begin_anew() -> None:
    model, x = network("mobilenet_v2"), torch.randn(1, 3, 64, 64)
    want = [model(x) for _ in range(3)][-1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not in_one_go(other)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal([other(x) for _ in range(3)][-1], torch.zeros(1, 10))
    assert torch.equal(model(x), want)
