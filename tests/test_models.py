"""MobileNetV2: the paper's counts, torchvision's keys, values and training step. The rest is in test_networks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_close, settled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastblocks
from fastblocks import models

VARIANTS = {
    "mobilenet_v2": (1.0, 3_504_872, 300.77),
    "mobilenet_v2_x0_75": (0.75, 2_636_424, 209.07),
    "mobilenet_v2_x1_4": (1.4, 6_108_776, 582.20),
}


def theirs(width: float = 1.0, **kwargs: Any) -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is what the networks are compared with")
    model: nn.Module = torchvision.models.mobilenet_v2(width_mult=width, **kwargs)
    return model


def lively(model: nn.Module) -> nn.Module:
    """In eval mode, with weights that keep activations and gradients of a sensible size."""
    for module in settled(model).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.05)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiply_adds(backend: str, name: str) -> None:
    width, parameters, million = VARIANTS[name]
    model = models.create(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e6, 2) == million
    if backend == "reference":
        same = models.mobilenet_v2(width_mult=width)
        assert [p.shape for p in same.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
def test_keys_and_shapes_are_torchvisions(width: float) -> None:
    with torch.device("meta"):
        ours, other = models.mobilenet_v2(width_mult=width).state_dict(), theirs(width).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in other.items()}
    assert list(ours) == list(other)


def test_depth_and_fixed_ends() -> None:
    """Rounded up, in all stages but the first and the last; the stem and the head keep their width."""
    with torch.device("meta"):
        model = models.mobilenet_v2(width_mult=1.2, depth_mult=1.4, fix_stem_head=True)
    widths = [layer.out_channels for layer in model.features]
    assert widths == [32, 24, *[32] * 3, *[40] * 5, *[80] * 6, *[112] * 5, *[192] * 5, 384, 1280]
    with pytest.raises(ValueError, match="no ImageNet weights for 'mobilenet_v2_d1_4'"):
        models.mobilenet_v2(depth_mult=1.4, weights="imagenet")


def test_initial_values_are_torchvisions() -> None:
    torch.manual_seed(3)
    other = theirs()
    torch.manual_seed(3)
    ours = models.mobilenet_v2()
    for (name, p), q in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert str(ours.classifier[0]) == str(other.classifier[0]) and ours.training


def test_weights_are_channels_last() -> None:
    model = models.mobilenet_v2()
    for name, p in model.named_parameters():
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=torch.channels_last) and p.stride(1) == 1, name
            assert p.stride(3) == p.shape[1], name
        else:
            assert p.is_contiguous()
    layer = model.eval().features[0]
    assert layer(torch.randn(1, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_torchvisions(tier: str, name: str) -> None:
    other = lively(theirs(VARIANTS[name][0], num_classes=50))
    model: Any = models.create(name, num_classes=50).eval()
    model.load_state_dict(other.state_dict())
    for nchw in (torch.randn(2, 3, 64, 64), torch.randn(1, 3, 97, 33)):
        for x in (nchw, nchw.contiguous(memory_format=torch.channels_last)):
            with torch.no_grad():
                # twice: the second call takes the short way
                y = model(x)
                assert torch.equal(model(x), y) or tier == "reference"

            def truth(x: Tensor, logits: Tensor = y) -> Tensor:
                return copy.deepcopy(other).to(x.dtype)(x)

            check_close(y, truth, x, note=(name, x.shape))


def test_gradients_in_eval_mode_are_torchvisions(backend: str) -> None:
    other = lively(theirs(num_classes=10))
    model: Any = models.mobilenet_v2(num_classes=10).eval()
    model.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 32, 32)
    truth = copy.deepcopy(other).double()
    for net, dtype in ((model, torch.float32), (other, torch.float32), (truth, torch.float64)):
        net(x.to(dtype)).pow(2).sum().backward()
    for (name, p), q, r in zip(model.named_parameters(), other.parameters(), truth.parameters(), strict=True):
        scale = r.grad.norm().item()
        error, theirs_error = ((t.grad.double() - r.grad).norm().item() for t in (p, q))
        assert error <= 4 * theirs_error + 1e-4 * scale, (name, error, theirs_error, scale)


def test_a_training_step_is_torchvisions(backend: str) -> None:
    """Same loss, running statistics and new weights, dropout included.

    The last maps are of 2x2 pixels, where BatchNorm enlarges torch's own roundings: float64 is asked elsewhere.
    """
    other = theirs(num_classes=10).to(memory_format=torch.channels_last)
    model = models.mobilenet_v2(num_classes=10)
    model.load_state_dict(other.state_dict())
    x, target = torch.randn(4, 3, 64, 64), torch.tensor([1, 2, 3, 4])
    losses = []
    for net in (model, other):
        torch.manual_seed(7)
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, p), q in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if q.is_floating_point():
            assert (p - q).norm() <= 5e-3 * max(q.norm().item(), 1.0), name
        else:
            assert torch.equal(p, q), name


def test_weights_from_files(tmp_path: Path) -> None:
    model = models.mobilenet_v2(width_mult=0.35, num_classes=4)
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    for source in (file, str(file)):
        other = models.mobilenet_v2(width_mult=0.35, num_classes=4, weights=source)
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
        assert other.features[2].conv[0][0].weight.stride(1) == 1


def test_tracers(backend: str) -> None:
    """fx, jit.trace and deepcopy of a whole network that was used."""
    model, x = lively(models.mobilenet_v2(width_mult=0.35, num_classes=5)), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        want = model(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.jit.trace(model, (x,))(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(model)(x), want)


def test_head(backend: str) -> None:
    """The classifier after surgery, with hooks, in training mode, without a bias."""
    x = torch.randn(3, 8)
    head = fastblocks.layers.head.Classifier(8, 4).eval()

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(head(x), nn.functional.linear(x, head[1].weight, head[1].bias))

    for _ in range(3):
        same()
    seen = []
    handle = head[1].register_forward_hook(lambda *args: seen.append(1))
    same()
    assert seen == [1]
    handle.remove()
    head[1] = nn.Linear(8, 5, bias=False)
    same(), same()
    head[1].weight.data.mul_(1)
    head[1].weight = nn.Parameter(torch.randn(2, 8))
    same()
    head[1] = nn.Sequential(nn.Linear(8, 2))
    with torch.no_grad():
        assert torch.equal(head(x), head[1][0](x))
    head = fastblocks.layers.head.Classifier(8, 4, dropout=0.999)
    with torch.no_grad():
        head(x)
        head.eval()(x)
        head.train()
        assert torch.equal(head(torch.ones(1, 8)), head[1].bias[None]) or head(torch.ones(1, 8)).abs().max() > 10
    pool = fastblocks.layers.head.global_avg_pool
    for images in (torch.randn(2, 8, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4).double()):
        torch.testing.assert_close(pool(images), images.mean((2, 3)))


def test_several_networks_share_nothing(backend: str) -> None:
    x = torch.randn(1, 3, 32, 32)
    nets = [lively(models.mobilenet_v2(width_mult=0.35, num_classes=n)) for n in (3, 4)]
    with torch.no_grad():
        first = [net(x) for net in nets]
        for _ in range(2):
            for net, y in zip(nets, first, strict=True):
                assert torch.equal(net(x), y) or backend == "reference"
