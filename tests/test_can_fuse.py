"""Where a layer runs its op and where its children, and the reason that it gives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import block, children, image
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

import fastblocks
from fastblocks.functional import guards, site
from fastblocks.layers import can_fuse, why_not_fuse


@pytest.fixture(autouse=True, params=["the best site", "a site in Python"])
def _sites(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call sites of the extension, if there is one, and those without it."""
    if request.param == "a site in Python":
        monkeypatch.setattr(site, "make_site", None)


def nothing(*args: Any) -> None:
    return None


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(nothing),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(nothing),
    "backward hook": lambda m: m.register_full_backward_hook(nothing),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(nothing),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_children(kind: str, fused: list[str]) -> None:
    """On every child at any depth, set after the op has run; gone, the op runs again. Gradients are recorded."""
    layer, x = block(), image()
    # torch's backward hooks do not bear in-place neighbours
    layer.conv[0][2].inplace = layer.conv[1][2].inplace = False
    layer(x), layer(x)
    for name, module in layer.named_modules():
        if not name:
            continue
        handle = HOOKS[kind](module)
        fused.clear()
        assert "has hooks" in (why_not_fuse(layer, x) or ""), name
        layer(x)
        # the layers inside may be chains of their own, but then fewer than three convolutions are in one
        assert "inverted_residual" not in fused and (not fused or fused[0] == "chain"), name
        handle.remove()
        assert can_fuse(layer, x)
    fused.clear()
    layer(x)
    assert fused == ["chain"]
    with torch.no_grad():
        layer(x)
    assert fused == ["chain", "inverted_residual"]


def test_a_forward_hook_sees_what_it_should(fused: list[str]) -> None:
    layer, x = block(), image()
    layer(x), layer(x)
    seen = []
    layer.conv[1][0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, children(layer, x))
    assert len(seen) == 2 and seen[0].shape == (2, 48, 6, 6)


def test_hooks_on_the_layer_itself_do_not_matter(fused: list[str]) -> None:
    layer, x = block(), image()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(1))
    layer(x)
    with torch.no_grad():
        layer(x)
    assert seen == [1, 1] and fused == ["chain", "inverted_residual"]


def test_global_hooks(fused: list[str]) -> None:
    layer, x = block(), image()
    layer(x), layer(x)
    seen = []
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda module, *args: seen.append(type(module)))
        fused.clear()
        try:
            assert why_not_fuse(layer, x) == "global module hooks are set"
            layer(x)
        finally:
            handle.remove()
        assert fused == [] and nn.Conv2d in seen
    assert can_fuse(layer, x)


def expect(layer: Any, x: Any, words: str, fused: list[str]) -> None:
    """The layer gives this reason, runs no op of its own, and its output is the children's."""
    reason = why_not_fuse(layer, x)
    assert reason is not None and words in reason, reason
    fused.clear()
    with torch.no_grad():
        y = layer(x)
        own = list(fused)
        torch.testing.assert_close(y, children(layer, x), rtol=1e-5, atol=1e-5)
    assert "inverted_residual" not in own


@pytest.mark.parametrize("after", [False, True])
def test_surgery(backend: str, after: bool, fused: list[str]) -> None:
    """Children exchanged, changed or wrapped, before the op was run or after."""

    def swap(layer: Any) -> None:
        layer.conv[2] = nn.Conv2d(48, 8, 1, groups=2)

    def direct(layer: Any) -> None:
        layer.conv._modules["2"] = nn.Sequential(nn.Conv2d(48, 8, 1, bias=False))

    def act(layer: Any) -> None:
        layer.conv[1][2] = nn.Hardswish()

    def sync(layer: Any) -> None:
        layer.conv[3] = nn.SyncBatchNorm(8).eval()

    def subclass(layer: Any) -> None:
        class Doubled(nn.Conv2d):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        layer.conv[2].__class__ = Doubled

    def forward(layer: Any) -> None:
        conv = layer.conv[0][0]
        conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)

    def mode(layer: Any) -> None:
        layer.conv[1][0].padding_mode = "reflect"

    def clamp(layer: Any) -> None:
        layer.conv[1][2].max_val = 4.0

    def longer(layer: Any) -> None:
        layer.conv.append(nn.Tanh())

    def inner(layer: Any) -> None:
        layer.conv[0].append(nn.Tanh())

    def dilated(layer: Any) -> None:
        layer.conv[1][0].dilation = (2, 2)
        layer.conv[1][0].padding = (2, 2)

    def pruned(layer: Any) -> None:
        prune.l1_unstructured(layer.conv[0][0], "weight", 0.5)

    def parametrized(layer: Any) -> None:
        parametrizations.weight_norm(layer.conv[2])

    for change, words in (
        (swap, "has 2 groups"),
        (direct, "is a Sequential, not an nn.Conv2d"),
        (act, "is a Hardswish"),
        (sync, "is a SyncBatchNorm"),
        (subclass, "is a Doubled"),
        (forward, "has a forward of its own"),
        (mode, "padding_mode 'reflect'"),
        (clamp, "clamps to 0.0 .. 4.0"),
        (longer, ""),
        (inner, ""),
        (dilated, "that the op does not know"),
        (pruned, "has hooks"),
        (parametrized, "ParametrizedConv2d"),
    ):
        layer, x = block(), image()
        if after:
            layer(x), layer(x)
        change(layer)
        if change is sync:  # which refuses to run on a CPU
            assert words in (why_not_fuse(layer, x) or "")
        else:
            expect(layer, x, words, fused)
        if change is parametrized:
            parametrize.remove_parametrizations(layer.conv[2], "weight")
            assert can_fuse(layer, x)


def test_one_norm_that_trains(backend: str, fused: list[str]) -> None:
    """Where one BatchNorm uses the batch's statistics the layer is a chain, with or without gradients."""

    def training(layer: Any) -> None:
        layer.conv[0][1].train()

    def without_statistics(layer: Any) -> None:
        layer.conv[3] = nn.BatchNorm2d(8, track_running_stats=False).eval()

    for after, change in itertools.product((False, True), (training, without_statistics)):
        layer, x = block(), image()
        if after:
            layer(x), layer(x)
        change(layer)
        other = copy.deepcopy(layer)
        for context in (torch.no_grad, torch.enable_grad):
            fused.clear()
            with context():
                y = layer(x)
            own = list(fused)
            with torch.no_grad(), fastblocks.use_backend("reference"):
                torch.testing.assert_close(y, children(other, x), rtol=1e-5, atol=1e-5)
            assert "inverted_residual" not in own and ("chain" in own) == (backend != "reference")
        for a, b in zip(layer.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_changes_that_the_op_follows(backend: str, fused: list[str]) -> None:
    """New weights, statistics, eps, stride: the next call has them."""
    layer, x = block(), image()

    def same() -> None:
        fused.clear()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), children(layer, x), rtol=1e-5, atol=1e-5)
        assert fused[:1] == ["inverted_residual"]

    same(), same()
    conv, bn = layer.conv[0][0], layer.conv[1][1]
    conv.weight = nn.Parameter(torch.randn_like(conv.weight) / 3)
    same()
    with torch.no_grad():
        conv.weight.mul_(2)
    same()
    conv.weight.data = torch.randn_like(conv.weight) / 3
    same()
    bn.running_var = bn.running_var * 2
    same()
    bn.running_mean.add_(1)
    same()
    bn.eps = 0.1
    same()
    layer.conv[2] = nn.Conv2d(48, 8, 1)
    same()
    layer.conv[0][2] = nn.ReLU()
    layer.conv[1][2] = nn.ReLU()
    same()
    layer.use_res_connect = False
    same()
    layer.conv[1][0].stride = (2, 2)
    same()
    layer.load_state_dict(block().state_dict(), strict=False)
    same()
    x = torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    same()
    layer.conv[0][0].weight.data = torch.randn(48, 8, 1, 1)[::2]
    with pytest.raises(ValueError, match=r"expand\.running_mean"):
        layer(x)
    layer.conv[0][0].weight.data = torch.randn(48, 8, 1, 1, dtype=torch.float64)
    assert "float64" in (why_not_fuse(layer, x) or "")


def test_inputs_and_contexts(backend: str, fused: list[str]) -> None:
    layer, x = block(), image()
    layer(x), layer(x)
    assert "torch.float64" in (why_not_fuse(layer, x.double()) or "")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expect_dtype = children(layer, x).dtype
        assert why_not_fuse(layer, x) == "autocast is on"
        fused.clear()
        assert layer(x).dtype == expect_dtype and not fused
    layer.double()
    assert "torch.float64" in (why_not_fuse(layer, x.double()) or "")
    assert torch.equal(layer(x.double()), children(layer, x.double()))
    layer.float()
    meta = copy.deepcopy(layer).to("meta")
    assert "on meta" in (why_not_fuse(meta, x.to("meta")) or "")
    assert meta(x.to("meta")).shape == x.shape
    fused.clear()
    for transform in (torch.vmap(layer, randomness="error"), torch.func.grad(lambda t: layer(t[0]).sum())):
        transform(x[None])
    assert not fused
    torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    with torch.no_grad():
        torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    assert fused == ["chain"] * (backend != "reference") + ["inverted_residual"] * (2 - (backend != "reference"))
    assert why_not_fuse(nn.Linear(3, 3), x) == "Linear is no fused layer"
    assert "str" in (why_not_fuse(layer, "image") or "")


def test_tracers_see_the_children(backend: str) -> None:
    layer, x = block(), image()
    with torch.no_grad():
        want = layer(x)
        graph = torch.fx.symbolic_trace(layer)
        assert [n.target for n in graph.graph.nodes if n.op == "call_module"][:2] == ["conv.0.0", "conv.0.1"]
        torch.testing.assert_close(graph(x), want)
        traced = torch.jit.trace(layer, (x,))
        assert "aten::_convolution" in str(traced.inlined_graph) and "fastblocks::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), want)


def test_onnx_export_sees_the_children() -> None:
    pytest.importorskip("onnx", reason="torch's ONNX export needs onnx")
    pytest.importorskip("onnxscript", reason="torch's ONNX export needs onnxscript")
    layer, x = block(), image()
    program = torch.onnx.export(layer, (x,), dynamo=True)
    assert {node.op_type for node in program.model.graph} >= {"Conv"}


def test_onnx_export_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert why_not_fuse(block(), image()) == "an ONNX export is running"


def test_forward_derivatives(backend: str) -> None:
    layer, x = block().requires_grad_(False), image()
    layer(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        found = forward_ad.unpack_dual(layer(dual)).tangent
        wanted = forward_ad.unpack_dual(children(layer, dual)).tangent
    torch.testing.assert_close(found, wanted)


def test_functions_without_torchs_guards(backend: str, monkeypatch: pytest.MonkeyPatch, fused: list[str]) -> None:
    """Where torch's private guards are missing, the comparison in Python does the same."""
    monkeypatch.setattr(guards, "_TensorGuards", None)
    test_changes_that_the_op_follows(backend, fused)
    test_inputs_and_contexts(backend, fused)
