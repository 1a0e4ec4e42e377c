"""A network in training remembers its chains: that it does, and that no change passes unseen."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastblocks
from fastblocks.layers import train
from fastblocks.layers.again import Again

pytestmark = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="the extension compares")


def network() -> Any:
    torch.manual_seed(1)
    blocks = fastblocks.Sequential(
        fastblocks.ShuffleUnit(16, 16, groups=2, stride=1), fastblocks.InvertedResidual(16, 24, stride=2)
    )
    return fastblocks.Sequential(
        fastblocks.ConvBNAct(3, 16, stride=2), fastblocks.InvertedResidual(16, 16), blocks
    ).train()


def image(size: int = 18) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, size, size, generator=generator).to(memory_format=torch.channels_last)


def step(layers: Any, x: torch.Tensor) -> list[torch.Tensor | None]:
    """Output and gradients, and what a step leaves in the network."""
    layers.zero_grad()
    y = layers(x)
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in layers.parameters()), *layers.buffers()]


def remembered(layers: Any) -> bool:
    return isinstance(layers.__dict__.get("_training"), Again)


def trained(x: torch.Tensor) -> Any:
    layers = network()
    for _ in range(3):
        step(layers, x)
    assert remembered(layers)
    return layers


def assert_same(got: list[torch.Tensor | None], want: list[torch.Tensor | None]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_remembered_from_the_third_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = trained(image()), image()
    want = step(copy.deepcopy(layers), x)

    def never(*_: Any) -> Any:
        raise AssertionError("the layers are described again")

    monkeypatch.setattr(train, "chain_of", never)
    assert_same(step(layers, x), want)


def _hook(layers: Any) -> None:
    layers[1].conv[1][0].register_forward_hook(lambda module, args, y: 2 * y)


def _layer_hook(layers: Any) -> None:
    layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _container_hook(layers: Any) -> None:
    layers[2].register_forward_hook(lambda module, args, y: 2 * y)


def _backward_hook(layers: Any) -> None:
    layers[1].conv[1][0].register_full_backward_hook(lambda module, into, out: (2 * into[0],))


def _patched(layers: Any) -> None:
    layers[1].conv[3].forward = lambda y: 2 * y


def _weight(layers: Any) -> None:
    layers[1].conv[2].weight = nn.Parameter(torch.randn(16, 96, 1, 1))


def _frozen_weight(layers: Any) -> None:
    layers[1].conv[2].weight.requires_grad_(False)


def _frozen_norm(layers: Any) -> None:
    layers[1].conv[3].eval()


def _momentum(layers: Any) -> None:
    layers[0][1].momentum = 0.7


def _cumulative(layers: Any) -> None:
    layers[0][1].momentum = None


def _eps(layers: Any) -> None:
    layers[0][1].eps = 0.1


def _no_tracking(layers: Any) -> None:
    layers[0][1].track_running_stats = False


def _no_statistics(layers: Any) -> None:
    layers[0][1].running_mean = layers[0][1].running_var = None


def _no_count(layers: Any) -> None:
    layers[0][1].num_batches_tracked = None


def _no_affine(layers: Any) -> None:
    layers[0][1].bias = None


def _bias(layers: Any) -> None:
    layers[1].conv[2].bias = nn.Parameter(torch.randn(16))


def _stride(layers: Any) -> None:
    layers[2][1].conv[1][0].stride = (1, 1)


def _dilation(layers: Any) -> None:
    layers[0][0].dilation = (2, 2)


def _no_residual(layers: Any) -> None:
    layers[1].use_res_connect = False


def _activation(layers: Any) -> None:
    layers[1].conv[0][2] = nn.Identity()


def _shuffle(layers: Any) -> None:
    layers[2][0].shuffle.groups = 4


def _layer(layers: Any) -> None:
    layers[1] = fastblocks.InvertedResidual(16, 16)


def _inner_layer(layers: Any) -> None:
    layers[2][0] = fastblocks.InvertedResidual(16, 16)


def _shorter(layers: Any) -> None:
    del layers[2][1]


def _values(layers: Any) -> None:
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(0.5)


def _evaluated(layers: Any) -> None:
    layers.eval()


CHANGES = [
    _hook, _layer_hook, _container_hook, _backward_hook, _patched, _weight, _frozen_weight, _frozen_norm, _momentum,
    _cumulative, _eps, _no_tracking, _no_statistics, _no_count, _no_affine, _bias, _stride, _dilation, _no_residual,
    _activation, _shuffle, _layer, _inner_layer, _shorter, _values, _evaluated,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(change: Callable[[Any], None]) -> None:
    layers, x = trained(image()), image()
    before = step(copy.deepcopy(layers), x)
    torch.manual_seed(3)
    change(layers)
    fresh = copy.deepcopy(layers)
    assert not remembered(fresh)
    want = step(fresh, x)
    assert_same(step(layers, x), want)
    # a change that makes no difference would prove nothing
    assert len(before) != len(want) or not all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(before, want, strict=True)
    )


INPUTS = {
    "size": lambda x: image(16),
    "batch": lambda x: x[:2],
    "nchw": lambda x: x.contiguous(),
    "gradient": lambda x: x.clone(memory_format=torch.channels_last).requires_grad_(),
}


@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs(name: str) -> None:
    layers = trained(image())
    fresh = copy.deepcopy(layers)
    x, same = INPUTS[name](image()), INPUTS[name](image())
    assert_same(step(layers, x), step(fresh, same))
    assert (x.grad is None) == (same.grad is None)
    assert x.grad is None or torch.equal(x.grad, same.grad)
    assert layers(x).stride() == fresh(x).stride()


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "reference": lambda: fastblocks.use_backend("reference"),
    "profiler": torch.autograd.profiler.profile,
    "forward derivatives": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name: str) -> None:
    layers, x = trained(image()), image()
    fresh = copy.deepcopy(layers)
    with CONTEXTS[name]():
        want = step(fresh, x)
    with CONTEXTS[name]():
        got = step(layers, x)
    assert got[0].dtype == want[0].dtype
    assert_same(got, want)


def test_global_hooks() -> None:
    layers, x = trained(image()), image()
    calls: list[type] = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, y: calls.append(type(module))):
        layers(x)
    assert calls.count(nn.Conv2d) == sum(isinstance(module, nn.Conv2d) for module in layers.modules())


def test_inputs_by_turns_are_not_remembered() -> None:
    layers, fresh = network(), network()
    for size in (16, 18, 16, 18, 16):
        assert_same(step(layers, image(size)), step(copy.deepcopy(fresh), image(size)))
        step(fresh, image(size))
        assert not remembered(layers)


def test_set_to_the_same_value_it_stays() -> None:
    layers, x = trained(image()), image()
    known = layers.__dict__["_training"]
    layers.train()
    step(layers, x)
    assert layers.__dict__["_training"] is known


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda layers: pickle.loads(pickle.dumps(layers))])
def test_copies_do_not_remember(copied: Callable[[Any], Any]) -> None:
    layers = trained(image())
    twin = copied(layers)
    assert not remembered(twin) and remembered(layers)
    assert_same(step(copy.deepcopy(twin), image()), step(layers, image()))


def test_it_keeps_nothing_alive() -> None:
    layers = trained(image())
    gone = [weakref.ref(module) for module in layers.modules()]
    del layers
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_a_shared_weight_is_not_remembered() -> None:
    layers = network()
    layers[2][0] = layers[1]
    for _ in range(4):
        step(layers, image())
    assert not remembered(layers)
