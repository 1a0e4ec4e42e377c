"""The blocks of MobileNet and of the ShuffleNets as layers: outputs, training, copies, tracers, and who looks in."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import settled
from torch import Tensor, nn
from units import BLOCKS, UNITS, image, one_by_one

import fastblocks
from fastblocks import ConvBNAct
from fastblocks.layers import can_fuse, why_not_fuse


@pytest.mark.parametrize("name", UNITS)
def test_output_is_that_of_the_children(tier: str, name: str, fused: list[str]) -> None:
    make, op = UNITS[name]
    layer = settled(make())
    for nchw in (image(), image(1, 9, 4), image(3, 3, 3)):
        for x in (nchw, nchw.contiguous(memory_format=torch.channels_last), nchw[:0]):
            assert can_fuse(layer, x), why_not_fuse(layer, x)
            with torch.no_grad():
                want = one_by_one(layer, x)
                for _ in range(3):
                    fused.clear()
                    got = layer(x)
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
                    assert fused == [op]


@pytest.mark.parametrize("name", UNITS)
def test_training_is_that_of_the_children(backend: str, name: str) -> None:
    layer = UNITS[name][0]()
    other = copy.deepcopy(layer)
    x, same = image().requires_grad_(), None
    for run, module in ((layer, layer), (lambda t: one_by_one(other, t), other)):
        module.train()
        run(x).pow(2).sum().backward()
        same, x = x, x.detach().clone().requires_grad_()
    assert same is not None
    for p, q in zip((*layer.parameters(), *layer.buffers()), (*other.parameters(), *other.buffers()), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        if p.grad is not None:
            # norm-wise: a gradient behind BatchNorm is a difference of large sums
            assert (p.grad - q.grad).norm() <= 1e-5 * (q.grad.norm() + 100)


@pytest.mark.parametrize("name", UNITS)
def test_gradients_in_eval_mode(backend: str, name: str) -> None:
    layer = settled(UNITS[name][0]())
    other = copy.deepcopy(layer)
    a, b = image().requires_grad_(), torch.empty(0)
    b = a.detach().clone().requires_grad_()
    for _ in range(2):  # with all checks, and from the call site
        a.grad = None
        layer.zero_grad()
        layer(a).pow(2).sum().backward()
    one_by_one(other, b).pow(2).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNITS)
def test_copies(backend: str, name: str) -> None:
    layer, x = settled(UNITS[name][0]()), image()
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
            assert str(other) == str(layer)
            for p in other.parameters():
                p.mul_(2)
            assert torch.equal(layer(x), want)


@pytest.mark.parametrize("name", [*BLOCKS, "grouped", "shuffle", "pool"])
def test_compile_trace_and_export(backend: str, name: str) -> None:
    layer, x = settled(UNITS[name][0]()), image()
    with torch.no_grad():
        want = layer(x)
        for compiler in ("eager", "aot_eager"):
            compiled = torch.compile(layer, backend=compiler, fullgraph=True)
            torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), want, rtol=1e-5, atol=1e-5)
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), want, rtol=1e-5, atol=1e-5)
    targets = {str(node.target) for node in program.graph.nodes}
    assert (f"fastblocks.{UNITS[name][1]}.default" in targets) == (backend != "reference")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", UNITS)
def test_inputs_and_contexts(backend: str, name: str, fused: list[str]) -> None:
    layer, x = settled(UNITS[name][0]()), image()
    with torch.no_grad():
        layer(x), layer(x)
        fused.clear()
        assert "torch.float64" in (why_not_fuse(layer, x.double()) or "")
        double = copy.deepcopy(layer).double()
        torch.testing.assert_close(double(x.double()).float(), layer(x), rtol=1e-4, atol=1e-4)
        assert len(fused) == 1
        vmapped = torch.vmap(layer)(x[None])[0]
        torch.testing.assert_close(vmapped, layer(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert why_not_fuse(layer, x) == "autocast is on"
            assert layer(x).shape == vmapped.shape
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == vmapped.shape
    assert layer(x).shape == vmapped.shape


# ------------------------------------------------------------------------------------------------------ who looks in


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_on_children(backend: str, name: str, fused: list[str]) -> None:
    """On every child at any depth, set after the op has run; gone, the op runs again."""
    make, op = UNITS[name]
    layer, x = settled(make()), image()
    with torch.no_grad():
        want = layer(x)
        layer(x)
        for child_name, module in layer.named_modules():
            if not child_name:
                continue
            seen: list[int] = []
            handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            fused.clear()
            assert "has hooks" in (why_not_fuse(layer, x) or ""), child_name
            torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
            # torchvision's block has an empty branch at stride 1, which nobody calls
            assert seen == ([] if name == "v2" and child_name == "branch1" else [1]), child_name
            assert op not in fused, child_name
            handle.remove()
            assert can_fuse(layer, x)
        fused.clear()
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
        assert fused == [op]


def _set(path: str, value: Callable[[], Any]) -> Callable[[Any], None]:
    """Exchange a child, or an attribute of one."""

    def change(layer: Any) -> None:
        *names, last = path.split(".")
        for name in names:
            layer = getattr(layer, name) if not name.isdigit() else layer[int(name)]
        if last.isdigit():
            layer[int(last)] = value()
        else:
            setattr(layer, last, value())

    return change


def _doubled() -> nn.Module:
    class Doubled(ConvBNAct):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    return settled(Doubled(12, 12, groups=12))


SURGERY: list[tuple[str, Callable[[Any], None], str | None]] = [
    ("separable", _set("depthwise.2", nn.Hardswish), "depthwise.activation is a Hardswish"),
    ("separable", _set("pointwise.2", nn.ReLU), "the two activations differ"),
    ("separable", _set("pointwise.0", lambda: nn.Conv2d(12, 20, 1, groups=2)), "pointwise.convolution has 2 groups"),
    ("separable", _set("pointwise.0", lambda: nn.Conv2d(12, 20, 3, padding=1)), "pointwise is no 1x1 convolution"),
    ("separable", _set("depthwise.0", lambda: nn.Conv2d(12, 12, 1)), "depthwise is no depthwise convolution"),
    ("separable", _set("depthwise.0", lambda: nn.Conv2d(12, 12, 3, groups=4)), "depthwise.convolution has 4 groups"),
    ("separable", _set("depthwise.0", lambda: nn.Conv2d(12, 12, (3, 1), groups=12)), "a kernel, stride, padding"),
    ("separable", _set("depthwise", _doubled), "depthwise is a Doubled, not a ConvBNAct"),
    ("separable", _set("more", nn.Tanh), "the layer has other children"),
    ("separable", lambda layer: layer.pointwise.append(nn.Tanh()), "pointwise has 4 children"),
    ("unit", _set("shuffle", lambda: nn.ChannelShuffle(3)), None),
    ("unit", _set("shuffle", nn.Identity), "shuffle is a Identity, not a ChannelShuffle"),
    ("unit", _set("shuffle.groups", lambda: 1), "compress.convolution has 3 groups, the shuffle has 1"),
    (
        "unit",
        _set("compress", lambda: settled(ConvBNAct(12, 3, 1))),
        "compress has the activation relu6, expected relu",
    ),
    ("unit", _set("activation", nn.ReLU6), "compress has the activation relu, expected relu6"),
    ("unit", _set("activation", nn.Sigmoid), "activation is a Sigmoid"),
    ("unit", lambda layer: layer.expand.append(nn.ReLU()), "expand has the activation relu, expected None"),
    ("unit", _set("depthwise.0", lambda: nn.Conv2d(3, 3, 1, groups=3)), None),
    ("unit", _set("depthwise.0", lambda: nn.Conv2d(3, 3, 3, padding=2, groups=3, dilation=2)), "padding or dilation"),
    ("unit", _set("depthwise.0.padding_mode", lambda: "reflect"), "padding_mode 'reflect'"),
    ("unit", _set("expand.0", lambda: nn.Conv2d(3, 12, 1)), "expand.convolution has 1 groups, the shuffle has 3"),
    ("unit", _set("pool", nn.Identity), "the layer has other children"),
    ("unit, stride", _set("pool", lambda: nn.MaxPool2d(3, 2, 1)), "pool is a MaxPool2d, not an nn.AvgPool2d"),
    ("unit, stride", _set("pool.count_include_pad", lambda: False), "pool has count_include_pad False"),
    ("unit, stride", _set("pool.divisor_override", lambda: 5), "pool has divisor_override 5"),
    ("unit, stride", _set("pool", lambda: nn.AvgPool2d((3, 3), (2, 2), (1, 1))), None),
    ("v2", _set("branch2.2", nn.ReLU6), "the activations differ"),
    ("v2", _set("branch2.7", nn.Hardswish), "branch2.5.activation is a Hardswish"),
    ("v2", lambda layer: layer.branch2.append(nn.Tanh()), "branch2 has other children"),
    ("v2", _set("branch2.5", lambda: nn.Conv2d(6, 6, 1, groups=2)), "branch2.5.convolution has 2 groups"),
    ("v2", _set("branch2.3", lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6)), None),
    ("v2", _set("branch1", nn.Identity), "branch1 is a Identity, not an nn.Sequential"),
    ("v2, stride", _set("branch1.0", lambda: nn.Conv2d(12, 12, 3, 2, 1)), "branch1.0 is no depthwise convolution"),
    ("v2, stride", _set("branch1.4", nn.Identity), "the activations differ"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("case", range(len(SURGERY)))
def test_surgery(backend: str, case: int, after: bool, fused: list[str]) -> None:
    """Children exchanged, changed or wrapped, before the op was run or after; without words the op follows."""
    name, change, words = SURGERY[case]
    make, op = UNITS[name]
    layer, x = settled(make()), image()
    with torch.no_grad():
        if after:
            layer(x), layer(x)
        change(layer)
        reason = why_not_fuse(layer, x)
        assert reason is None if words is None else words in (reason or ""), reason
        frozen = copy.deepcopy(layer)
        fused.clear()
        got = layer(x)
        assert (op in fused) == (words is None)
        torch.testing.assert_close(got, frozen._run_children(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_changes_that_the_op_follows(backend: str, name: str, fused: list[str]) -> None:
    """New weights, statistics, eps: the next call has them."""
    make, op = UNITS[name]
    layer, x = settled(make()), image()

    def same() -> None:
        fused.clear()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=1e-5, atol=2e-5)
        assert fused[:1] == [op]

    same(), same()
    for module in list(layer.modules()):
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.mul_(0.5)
            same()
            module.weight = nn.Parameter(torch.randn_like(module.weight) / 3)
            same()
            module.weight.data = torch.randn_like(module.weight) / 3
            same()
            module.bias = nn.Parameter(torch.randn(module.out_channels))
            same()
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(0.5)
            same()
            module.running_var = module.running_var * 2
            same()
            module.eps = 0.1
            same()
    layer.load_state_dict(settled(make()).state_dict(), strict=False)
    same()
    x = torch.randn(1, 12, 9, 9).contiguous(memory_format=torch.channels_last)
    same(), same()


def test_frozen_batch_norm(backend: str, fused: list[str]) -> None:
    """A block in training mode whose BatchNorms are frozen runs as an op, statistics untouched."""
    for name in BLOCKS:
        make, op = UNITS[name]
        layer, x = settled(make()).train(), image()
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        fused.clear()
        layer(x).sum().backward()
        assert fused[:1] == [op if fastblocks.current_backend() == "reference" else "chain"]
        with torch.no_grad():
            layer(x)
        assert fused[-1] == op
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
