"""Packed weights follow their weights: whatever torch counts as a change is seen by the next call."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastblocks
from fastblocks import InvertedResidual

pytestmark = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="packs belong to the native tier")


def _layer() -> InvertedResidual:
    return InvertedResidual(8, 8).eval()


def _assert_right(layer: nn.Module, x: torch.Tensor) -> None:
    expected = copy.deepcopy(layer).double()._run_children(x.double())
    with torch.no_grad():
        assert fastblocks.layers.can_fuse(layer, x)
        error = (layer(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def _step(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(1, 8, 6, 6)).square().sum().backward()
    optimizer.step()


def _replace_data(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)


def _copy_under_no_grad(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))


def _load(layer: nn.Module) -> None:
    layer.load_state_dict(_layer().state_dict())


def _set(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.set_(torch.randn_like(parameter))


def _there_and_back(layer: nn.Module) -> None:
    layer.to(torch.float64).to(torch.float32)
    _copy_under_no_grad(layer)


def _average(layer: nn.Module) -> None:
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(_layer())
    average.update_parameters(_layer())  # the first update copies, the second averages
    layer.load_state_dict(average.module.state_dict())


def _statistics(layer: nn.Module) -> None:
    layer.train()
    with torch.no_grad():
        layer(torch.randn(4, 8, 6, 6) * 3 + 1)
    layer.eval()


def _new_parameter(layer: nn.Module) -> None:
    layer.conv[2].weight = nn.Parameter(torch.randn_like(layer.conv[2].weight))


@pytest.mark.parametrize(
    "change",
    [
        _step,
        _replace_data,
        _copy_under_no_grad,
        _load,
        _set,
        _there_and_back,
        _average,
        _statistics,
        _new_parameter,
    ],
)
def test_the_next_call_sees_a_change(change: Callable[[nn.Module], None]):
    layer = _layer()
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    _assert_right(layer, x)
    before = layer(x).detach()
    change(layer)
    _assert_right(layer, x)
    assert not torch.equal(layer(x).detach(), before)


def test_edits_that_torch_does_not_count_need_refresh():
    layer = _layer()
    x = torch.randn(2, 8, 6, 6)
    _assert_right(layer, x)
    layer.conv[2].weight.data.mul_(2)
    fastblocks.refresh(layer)
    _assert_right(layer, x)


def test_a_freed_weight_whose_address_is_taken_again():
    x = torch.randn(1, 8, 6, 6)
    for _ in range(50):
        layer = _layer()
        _assert_right(layer, x)
        del layer
        gc.collect()


def test_a_weight_that_is_gone_keeps_no_pack():
    from fastblocks.backends import native

    gc.collect()
    before = native.pack_slots()
    layer = _layer()
    with torch.no_grad():
        layer(torch.randn(1, 8, 6, 6))
    assert native.pack_slots() == before + 3
    del layer
    gc.collect()
    assert native.pack_slots() == before


def test_a_classifier_that_trains_is_multiplied_by_torch():
    """A pack would be good for one step. A frozen weight is packed, whoever else trains."""
    from fastblocks.backends import native

    x, linear = torch.randn(4, 24, requires_grad=True), nn.Linear(24, 10)
    gc.collect()
    before = native.pack_slots()
    y = fastblocks.functional.linear(x, linear.weight, linear.bias)
    assert native.pack_slots() == before and torch.equal(y, linear(x))
    y.square().sum().backward()
    got = [t.grad for t in (x, linear.weight, linear.bias)]
    x.grad = linear.weight.grad = linear.bias.grad = None
    linear(x).square().sum().backward()
    assert all(map(torch.equal, got, [t.grad for t in (x, linear.weight, linear.bias)]))
    linear.weight.requires_grad_(False)
    fastblocks.functional.linear(x, linear.weight, linear.bias).sum().backward()
    assert native.pack_slots() == before + 1


def test_weights_of_inference_mode_are_never_stale():
    with torch.inference_mode():
        layer = _layer()
        x = torch.randn(1, 8, 6, 6)
        layer(x)
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        expected = layer._run_children(x)
        assert (layer(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_tensors_are_read_and_made_without_the_exchange_api():
    """A torch without DLPack's exchange API is served through tensors' methods, with the same results."""
    from fastblocks import _C
    from fastblocks.backends import native  # noqa: F401  (has set the functions)

    layer, x = _layer(), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        want = [layer(x), layer(x.to(memory_format=torch.channels_last)), layer(x[:0])]
        api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        try:
            _C.set_tensor_functions(None, torch._C._from_dlpack, torch.channels_last)
            got = [layer(x), layer(x.to(memory_format=torch.channels_last)), layer(x[:0])]
        finally:
            _C.set_tensor_functions(api, torch._C._from_dlpack, torch.channels_last)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
