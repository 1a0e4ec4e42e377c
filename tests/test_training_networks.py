"""The networks in training: a step against the plain networks in float64, and some steps beside stock torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as tF
from one_step import chains, error
from plain_networks import Plain
from torch import Tensor, nn

import fastblocks

NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenet_v1_x0_25": {},
    "mobilenet_v2": {"width_mult": 0.35},
    "shufflenet_v1_g3_x0_5": {},
    "shufflenet_v2_x0_5": {},
}


COMPILED = [
    pytest.param(name, marks=pytest.mark.skipif(name not in fastblocks.backend_info()["tiers"], reason=f"needs {name}"))
    for name in ("native", "numba")
]


class Training(Plain):
    """A plain network with batch statistics, on tensors that it is given."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.other = tensors, False

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1, act: Any = None) -> Tensor:
        bn = name.rpartition(".")[0] + f".{int(name.rpartition('.')[2]) + 1}"
        weight = self.tensors[f"{name}.weight"]
        x = tF.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        mean, var, gamma, beta = (self.tensors[f"{bn}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        x = tF.batch_norm(x, mean, var, gamma, beta, training=True)
        return x if act is None else act(x)


def build(name: str, kinks: bool = True) -> Any:
    """A network in training mode; without `kinks`, no value comes near a ReLU6's zero or six, nor a ReLU's zero.

    At a kink the last bit of a value decides whether a gradient passes, so gradients of one float32 are percents away
    from another's. Away from kinks they agree to rounding.
    """
    torch.manual_seed(1)
    model = fastblocks.models.create(name, num_classes=10, **NETWORKS[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0 if kinks else 0.4, 0.1 if kinks else 0.05)
            nn.init.normal_(module.bias, 0.2 if kinks else 3.0, 0.1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.05)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def plain_step(
    name: str, model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the plain network; the statistics that it updated are among the results."""
    tensors = {k: v.detach().clone().to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    wanted = [key for key, _ in model.named_parameters()]
    image = x.detach().to(dtype).requires_grad_()
    for key in wanted:
        tensors[key].requires_grad_()
    network = Training(tensors)
    groups = (3,) if "_g3" in name else ()
    loss = tF.cross_entropy(getattr(network, "_".join(name.split("_")[:2]))(image, *groups), labels)
    grads = torch.autograd.grad(loss, [image, *(tensors[key] for key in wanted)])
    statistics = {k: v for k, v in tensors.items() if "running" in k}
    return loss.detach(), {**dict(zip(["input", *wanted], grads, strict=True)), **statistics}


@pytest.mark.parametrize("kinks", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_step(backend: str, name: str, kinks: bool) -> None:
    """As near to float64 as torch's float32: with weights as they are, and wrong by one bit, and by a few at kinks."""
    model = build(name, kinks)
    x = torch.randn(4, 3, 64, 64)
    labels = torch.randint(0, 10, (4,))
    loss, truth = plain_step(name, model, x, labels, torch.float64)
    torchs = [plain_step(name, model, x, labels, torch.float32)]
    for wrong in (2**-23,) * 4 + (2**-20,) * 8 * kinks:
        almost = copy.deepcopy(model)
        with torch.no_grad():
            for p in almost.parameters():
                p.mul_(1 + wrong * torch.randn_like(p))
        torchs.append(plain_step(name, almost, x, labels, torch.float32))
    image = x.clone().requires_grad_()
    result = tF.cross_entropy(model(image), labels)
    result.backward()
    errors = [abs(t[0].item() - loss.item()) for t in torchs]
    assert abs(result.item() - loss.item()) <= max(1e-5, 1e-6 * loss.item(), 3 * max(errors))
    found = {"input": image.grad, **{k: p.grad for k, p in model.named_parameters()}}
    found |= {k: v for k, v in model.named_buffers() if "running" in k}
    scale = max(truth[k].norm().item() for k, _ in model.named_parameters())
    assert found.keys() == truth.keys()
    for key, true in truth.items():
        allowed = max(1e-4, *(3 * error(t[1][key], true, scale) for t in torchs))
        wrong = error(found[key], true, scale)
        assert wrong <= allowed, f"{key}: error {wrong:.3g}, allowed {allowed:.3g}"
    assert all(int(v) == 1 for k, v in model.named_buffers() if "tracked" in k)


def loss_and_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = tF.cross_entropy(model(x), labels)
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", NETWORKS)
def test_some_steps(name: str, compiled: str) -> None:
    """Along a training run in float64, at a real learning rate: from its weights each loss is float64's to 1e-4.

    A run of its own would tell nothing: early steps multiply an error tenfold, and torch with one thread is 1e-1 off
    torch with two after ten. Gradients are as near as torch's float32, whose values at kinks fall on other sides.
    """
    truth = build(name).double()
    ours, plain = build(name), build(name)
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    random = torch.Generator().manual_seed(2)
    first = None
    for _ in range(5):
        x = torch.randn(4, 3, 64, 64, generator=random)
        labels = torch.randint(0, 10, (4,), generator=random)
        for model in (ours, plain):
            model.load_state_dict(truth.state_dict())
        with fastblocks.use_backend(compiled):
            found = loss_and_gradient(ours, x, labels)
        with fastblocks.use_backend("reference"):
            torchs = loss_and_gradient(plain, x, labels)
            want = loss_and_gradient(truth, x.double(), labels)
        optimizer.step()
        first = first or want[0]
        assert abs(found[0] - want[0]) <= max(1e-4, 3 * abs(torchs[0] - want[0]))
        assert error(found[1], want[1]) <= max(0.02, 3 * error(torchs[1], want[1]))
    assert first is not None and abs(want[0] - first) > 1e-2, "the weights hardly moved"


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "shufflenet_v1_g3", "shufflenet_v2_x1_0"])
def test_networks_are_chains(name: str, compiled: str) -> None:
    """Several chains, for a tensor between two of them is where gradients become ready; far fewer than layers."""
    model = fastblocks.models.create(name).train()
    layers = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    with fastblocks.use_backend(compiled):
        count = chains(model(torch.randn(2, 3, 64, 64)))
    assert 3 <= count <= layers // 4, (count, layers)
    with fastblocks.use_backend("reference"):
        assert chains(model(torch.randn(2, 3, 64, 64))) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_modes_may_change(backend: str, name: str) -> None:
    """Training, then evaluation without gradients, then training: none of them sees what another left behind."""
    model = build(name)
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    model.eval()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        logits = [model(x) for _ in range(3)]
        with fastblocks.use_backend("reference"):
            want = plain(x)
    for found in logits:
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    before = [b.clone() for b in model.buffers()]
    model.train()(x).sum().backward()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
