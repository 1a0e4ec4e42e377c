"""The layers: torchvision's children, keys and outputs; training, copies, loops."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import block, children, image, settled
from torch import nn

from fastblocks import ConvBNAct, DepthwiseConvBNAct, InvertedResidual, PointwiseConvBNAct
from fastblocks.layers import can_fuse, why_not_fuse
from fastblocks.layers.head import Classifier

LAYERS: dict[str, Callable[[], Any]] = {
    "conv": lambda: ConvBNAct(8, 6),
    "stride": lambda: ConvBNAct(8, 6, 3, 2),
    "five": lambda: ConvBNAct(8, 6, 5, dilation=2),
    "relu": lambda: ConvBNAct(8, 6, activation_layer=nn.ReLU),
    "linear": lambda: ConvBNAct(8, 6, activation_layer=None),
    "identity": lambda: ConvBNAct(8, 6, activation_layer=nn.Identity),
    "bias": lambda: ConvBNAct(8, 6, bias=True),
    "no norm": lambda: ConvBNAct(8, 6, norm_layer=None),
    "not affine": lambda: ConvBNAct(8, 6, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False)),
    "rectangle": lambda: ConvBNAct(8, 6, (3, 5), (2, 1), (0, 2)),
    "pointwise": lambda: PointwiseConvBNAct(8, 24),
    "pointwise, stride": lambda: ConvBNAct(8, 24, 1, 2),
    "pointwise, groups": lambda: ConvBNAct(8, 24, 1, groups=4),
    "depthwise": lambda: DepthwiseConvBNAct(8),
    "depthwise five": lambda: DepthwiseConvBNAct(8, 5, 2),
    "block": lambda: InvertedResidual(8, 8),
    "block, stride": lambda: InvertedResidual(8, 8, 2),
    "block, wider": lambda: InvertedResidual(8, 12),
    "block, no expansion": lambda: InvertedResidual(8, 8, expand_ratio=1),
    "block, fraction": lambda: InvertedResidual(8, 8, expand_ratio=1.4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_output_is_that_of_the_children(tier: str, name: str, fused: list[str]) -> None:
    layer = settled(LAYERS[name]())
    nchw = image()
    for x in (nchw, nchw.contiguous(memory_format=torch.channels_last), nchw[:0], torch.randn(1, 8, 9, 4)):
        assert can_fuse(layer, x), why_not_fuse(layer, x)
        with torch.no_grad():
            want = children(layer, x)
            for _ in range(3):
                torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert len(fused) == 12


@pytest.mark.parametrize("name", LAYERS)
def test_training_is_that_of_the_children(backend: str, name: str, fused: list[str]) -> None:
    layer = LAYERS[name]()
    other = copy.deepcopy(layer)
    x = image()
    for run, module in ((layer, layer), (lambda t: children(other, t), other)):
        module.train()
        run(x).pow(2).sum().backward()
    near = {"rtol": 1e-4 * bool(fused), "atol": 1e-4 * bool(fused)}
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, **near)
    for p, q in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(p, q, **near)
    # without BatchNorm nothing depends on the mode, and the op's gradients are torch's
    if name == "no norm":
        assert fused and "chain" not in fused
    else:
        assert fused == ["chain"] * (backend != "reference" and name != "bias")


def test_torchvisions_children_keys_and_attributes() -> None:
    pytest.importorskip("torchvision", reason="torchvision is what the layers are compared with")
    from torchvision.models.mobilenetv2 import InvertedResidual as Theirs
    from torchvision.ops.misc import Conv2dNormActivation

    for ours, theirs in (
        (ConvBNAct(8, 6, 5, 2), Conv2dNormActivation(8, 6, 5, 2, activation_layer=nn.ReLU6)),
        (ConvBNAct(8, 6, dilation=2), Conv2dNormActivation(8, 6, dilation=2, activation_layer=nn.ReLU6)),
        (ConvBNAct(8, 6, norm_layer=None), Conv2dNormActivation(8, 6, norm_layer=None, activation_layer=nn.ReLU6)),
        (DepthwiseConvBNAct(8), Conv2dNormActivation(8, 8, groups=8, activation_layer=nn.ReLU6)),
        (PointwiseConvBNAct(8, 6), Conv2dNormActivation(8, 6, 1, activation_layer=nn.ReLU6)),
        *((InvertedResidual(8, c, s, t), Theirs(8, c, s, t)) for c in (8, 12) for s in (1, 2) for t in (1, 6)),
    ):
        names = [(n, type(m)) for n, m in ours.named_modules() if not isinstance(m, (ConvBNAct, InvertedResidual))]
        assert names == [
            (n, type(m)) for n, m in theirs.named_modules() if not isinstance(m, (Conv2dNormActivation, Theirs))
        ]
        for a, b in zip(ours.modules(), theirs.modules(), strict=True):
            assert type(a) is not type(b) or a.extra_repr() == b.extra_repr()
        mine, other = ours.state_dict(), theirs.state_dict()
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in other.items()}
        assert ours.out_channels == theirs.out_channels
        if isinstance(theirs, Theirs):
            assert (ours.stride, ours.use_res_connect, ours._is_cn) == (
                theirs.stride,
                theirs.use_res_connect,
                theirs._is_cn,
            )
        theirs = settled(theirs)
        ours.eval().load_state_dict(theirs.state_dict())
        x = image()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ as a module


def test_frozen_batch_norm_counts_by_itself(backend: str, fused: list[str]) -> None:
    """A block in training mode whose BatchNorms are frozen runs as an op, statistics untouched."""
    layer, x = block().train(), image()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), children(layer, x), rtol=1e-5, atol=1e-5)
    assert fused == ["inverted_residual"]
    layer(x).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.eval().conv[3].train()
    fused.clear()
    layer(x)
    assert not torch.equal(layer.conv[3].running_mean, before["conv.3.running_mean"])
    assert "inverted_residual" not in fused


@pytest.mark.parametrize("name", ["conv", "block"])
def test_copies(backend: str, name: str) -> None:
    """deepcopy, pickle and torch.save of a layer that has been used; the copy is independent."""
    layer, x = settled(LAYERS[name]()), image()
    with torch.no_grad():
        want = layer(x)
        layer(x)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(other) is type(layer) and torch.equal(other(x), want) and can_fuse(other, x)
            for p in other.parameters():
                p.mul_(2)
            assert not torch.equal(other(x), want) and torch.equal(layer(x), want)
        shared = copy.copy(layer)
        assert torch.equal(shared(x), want)


def test_weights_change_between_calls_of_a_training_loop(backend: str) -> None:
    """Train a step, evaluate, again: evaluation never sees old weights."""
    layer, x = InvertedResidual(8, 8), image()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        layer.train()
        optimizer.zero_grad()
        layer(x).pow(2).mean().backward()
        optimizer.step()
        layer.eval()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), children(layer, x), rtol=1e-5, atol=1e-5)


def test_slices() -> None:
    """As of any nn.Sequential: for features in front of an activation or a classifier."""
    x = image()
    layer, head = settled(ConvBNAct(8, 6)), Classifier(8, 4).eval()
    with torch.no_grad():
        assert torch.equal(layer[:2](x), layer[1](layer[0](x))) and layer[-1] is layer[2]
        assert torch.equal(head[:-1](x), x) and list(head[1:].state_dict()) == ["1.weight", "1.bias"]
