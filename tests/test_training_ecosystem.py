"""Layers in training inside what people train with: the compiler, EMA, autocast, transforms, several processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from one_step import chains, leaves, lively, step
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fastblocks
from fastblocks import ConvBNAct, DepthwiseSeparableConv, InvertedResidual, Sequential, ShuffleUnit, ShuffleUnitV2
from fastblocks.layers import why_not_fuse


def small() -> Any:
    """A network of two chains and a classifier."""
    features = Sequential(
        ConvBNAct(3, 8, 3, 2), DepthwiseSeparableConv(8, 16, 2), InvertedResidual(16, 16), ShuffleUnitV2(16, 16, 1)
    )
    lively(features)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).train()


def image(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16)


def same(found: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Norm-wise; what is small beside the rest has the rest's roundings."""
    assert found.keys() == want.keys()
    scale = max(expected.double().norm().item() for expected in want.values())
    for name, expected in want.items():
        wrong = (found[name].double() - expected.double()).norm().item()
        assert wrong <= tolerance * max(expected.double().norm().item(), 0.05 * scale), (name, wrong)


@pytest.mark.parametrize("kind", ["block", "unit", "network"])
def test_compile(backend: str, kind: str) -> None:
    """One graph, forward and backward, in training mode."""
    model, x = {
        "block": lambda: (lively(InvertedResidual(8, 8)), torch.randn(2, 8, 7, 7)),
        "unit": lambda: (lively(ShuffleUnit(24, 24, 1, 2)), torch.randn(2, 24, 7, 7)),
        "network": lambda: (small(), image()),
    }[kind]()
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    want, found = step(model, model, x), step(other, compiled, x)
    torch.testing.assert_close(found.y, want.y, rtol=1e-5, atol=1e-5)
    same(found.grads, want.grads)
    same(found.statistics, want.statistics)


def test_export_after_training() -> None:
    model, x = small(), image()
    model(x).sum().backward()
    model.eval()
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    assert any("fastblocks" in str(node.target) for node in program.graph.nodes)


def test_copies_of_what_has_trained(backend: str) -> None:
    """deepcopy, pickle and state_dict, before and after eval: the copies train as the original does."""
    model, x = small(), image()
    for _ in range(2):
        model(x).sum().backward()
    with torch.no_grad():
        model.eval()(x), model(x)
    model.train()
    loaded = small()
    loaded.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    want = step(model, model, x)
    for other in copies:
        found = step(other, other, x)
        same(found.grads, want.grads)
        same(found.statistics, want.statistics)
        assert chains(found.y) == chains(want.y)


def test_moving_average(backend: str) -> None:
    """EMA of weights, then statistics for it by a pass over the data."""
    model = small()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = [image() for _ in range(3)]
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    update_bn(data, average)
    plain = copy.deepcopy(average.module)
    with fastblocks.use_backend("reference"):
        update_bn(data, plain)
    same(dict(average.module.named_buffers()), dict(plain.named_buffers()), 1e-4)
    x = image()
    with torch.no_grad():
        want = plain[3](leaves(plain[0].eval(), x).mean((2, 3)))
        torch.testing.assert_close(average.eval()(x), want, rtol=1e-4, atol=1e-4)


def test_parameters_by_the_type_of_their_module() -> None:
    """No weight decay for BatchNorm: its parameters are found where they always are, and move as they should."""
    model = small()
    norm = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in norm], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if id(p) in norm], "weight_decay": 0.0},
    ]
    assert len(groups[1]["params"]) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) > 0
    optimizer = torch.optim.SGD(groups, 0.1)
    before = [p.detach().clone() for group in groups for p in group["params"]]
    model(image()).sum().backward()
    optimizer.step()
    decays = [group["weight_decay"] for group in groups for _ in group["params"]]
    for p, old, decay in zip((p for g in groups for p in g["params"]), before, decays, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * (p.grad + decay * old))


@pytest.mark.parametrize("foreach", [True, False])
def test_optimizers(backend: str, foreach: bool) -> None:
    """Packed weights follow what optimizers do."""
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        model, x = small(), image()
        plain = copy.deepcopy(model)
        losses: list[list[float]] = [[], []]
        for m, found, tier in ((model, losses[0], fastblocks.current_backend()), (plain, losses[1], "reference")):
            optimizer = kind(m.parameters(), lr=1e-3, foreach=foreach)
            with fastblocks.use_backend(tier):
                for _ in range(4):
                    optimizer.zero_grad()
                    loss = m(x).square().mean()
                    loss.backward()
                    nn.utils.clip_grad_norm_(m.parameters(), 1.0)
                    optimizer.step()
                    found.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3), kind
        assert losses[0][-1] < losses[0][0]


def test_autocast(backend: str) -> None:
    """The children run in bfloat16; gradients are finite and near float32's."""
    model, x = small(), image()
    want = step(copy.deepcopy(model), model, x)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert why_not_fuse(model[0][0], x) == "autocast is on"
    assert chains(y) == 0
    y.float().sum().backward()
    for p in model.parameters():
        assert p.grad is not None and p.grad.dtype is torch.float32 and p.grad.isfinite().all()
    torch.testing.assert_close(y.float(), want.y, rtol=0.1, atol=0.1)


def test_synchronised_norms() -> None:
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(lively(InvertedResidual(8, 8)))
    x = torch.randn(2, 8, 5, 5)
    assert "SyncBatchNorm" in (why_not_fuse(layer, x) or "")
    y = layer.eval()(x)
    assert chains(y) == 0
    torch.testing.assert_close(y, leaves(layer, x))


def test_hooks_on_children(backend: str) -> None:
    """A hook on a child, a container or a layer in a row is called, and the numbers stay."""
    x = torch.randn(2, 8, 5, 5)
    row = lively(Sequential(InvertedResidual(8, 8), InvertedResidual(8, 8), InvertedResidual(8, 8)))
    for act in (m for m in row.modules() if isinstance(m, nn.ReLU6)):
        act.inplace = False  # torch refuses it behind a backward hook
    calls: list[str] = []
    for module in (row[1].conv[0][1], row[1].conv[1], row[1].conv, row[1]):
        other = copy.deepcopy(row)
        calls.clear()
        want = step(other, lambda x, other=other: leaves(other, x), x)
        handles = [
            module.register_forward_hook(lambda *_: calls.append("forward")),
            module.register_full_backward_hook(lambda *_: calls.append("backward")),
        ]
        for norm in (m for m in row.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
        found = step(row, row, x)
        assert calls == ["forward", "backward"]
        same(found.grads, want.grads, 1e-4)
        for handle in handles:
            handle.remove()
    row[1].conv[0][1].register_forward_pre_hook(lambda *_: None)
    assert "hooks" in (why_not_fuse(row[1], x) or "")


def test_transforms(backend: str) -> None:
    """torch.func: gradients by functional_call, and gradients of each image with frozen statistics."""
    # torch has no transform of an update of statistics
    layer = lively(InvertedResidual(8, 8, norm_layer=lambda n: nn.BatchNorm2d(n, track_running_stats=False)))
    x = torch.randn(3, 8, 5, 5)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    def gradients(layer: Any) -> dict[str, Any]:
        plain = copy.deepcopy(layer)
        leaves(plain, x).square().sum().backward()
        return {k: p.grad for k, p in plain.named_parameters()}

    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    same(grad(loss)(parameters, x), gradients(layer), 1e-4)
    layer = lively(InvertedResidual(8, 8)).eval()
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    same({k: v.sum(0) for k, v in each.items()}, gradients(layer), 1e-4)


def test_functional_call_with_other_parameters(backend: str) -> None:
    """Tensors that are exchanged for one call, and want gradients."""
    layer, x = lively(InvertedResidual(8, 8)), torch.randn(2, 8, 5, 5)
    plain = copy.deepcopy(layer)
    halves = {k: (p.detach() / 2).requires_grad_() for k, p in layer.named_parameters()}
    functional_call(layer, halves, (x,)).square().sum().backward()
    with torch.no_grad():
        for p in plain.parameters():
            p.div_(2)
    leaves(plain, x).square().sum().backward()
    same({k: v.grad for k, v in halves.items()}, {k: p.grad for k, p in plain.named_parameters()}, 1e-4)
    assert all(p.grad is None for p in layer.parameters())


def test_other_dtypes_and_devices() -> None:
    model = small()
    double = copy.deepcopy(model).double()
    y = double(image().double())
    y.sum().backward()
    assert y.dtype is torch.float64 and chains(y) == 0
    meta = copy.deepcopy(model).to("meta")
    y = meta(torch.empty(2, 3, 16, 16, device="meta"))
    y.sum().backward()
    assert y.device.type == "meta" and y.shape == (2, 5)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in meta.parameters())


PROCESSES = """
import copy, sys
import torch, torch.distributed as dist
from torch import nn
import fastblocks

def network():
    torch.manual_seed(0)
    row = fastblocks.Sequential(
        fastblocks.ConvBNAct(3, 8, 3, 2), fastblocks.InvertedResidual(8, 8), fastblocks.ShuffleUnitV2(8, 16, 2)
    )
    return nn.Sequential(row, nn.Flatten(), nn.Linear(256, 3)).train()

def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    want = []
    for i in range(2):
        alone = network()
        alone(images[i]).square().sum().backward()
        want.append([p.grad for p in alone.parameters()])
    for kwargs in ({}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}):
        model = nn.parallel.DistributedDataParallel(network(), **kwargs)
        for _ in range(2):
            model.zero_grad()
            model(images[rank]).square().sum().backward()
            for p, a, b in zip(model.parameters(), *want):
                torch.testing.assert_close(p.grad, (a + b) / 2, rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
    print("equal")
"""


def test_two_processes(tmp_path: Any) -> None:
    """DistributedDataParallel gives the mean of the gradients that each process alone would have."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    script = tmp_path / "two.py"
    script.write_text(PROCESSES)
    run = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]
