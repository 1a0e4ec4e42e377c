"""The ops as torch knows them: opcheck, compile, export, functional_call, inference mode, profiler, multiply-adds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as tF
from conftest import layouts, record, settled, significant_strides
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastblocks
from fastblocks import functional as F
from fastblocks.backends.layout import strides_like_channels_last
from fastblocks.functional.registration import OPS, SCHEMAS

ONE, TWO = [1, 1], [2, 2]


def arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments of each op, NCHW; `torch.library.opcheck` tries them in every way."""
    x = torch.randn(2, 4, 6, 5)
    dense, depthwise, pointwise = (list(r[:6]) for r in (record(3, 4, 3), record(4, 1, 3), record(4, 4, bias=True)))
    e, d, p = (list(r[:6]) for r in (record(8, 4), record(8, 1, 3), record(4, 8)))
    grouped, half, two = (list(r[:6]) for r in (record(6, 2), record(4, 2), record(2, 4)))
    return {
        "conv_bn_act": (x, dense, 1e-5, TWO, ONE, ONE, "relu6"),
        "pointwise_conv_bn_act": (x, pointwise, 1e-5, "relu", x.clone()),
        "depthwise_conv_bn_act": (x, depthwise, 1e-5, ONE, ONE, ONE, None),
        "inverted_residual": (x, e, d, p, [1e-5, 1e-5, 1e-3], 1, 1, "relu6", True),
        "grouped_pointwise_conv_bn_act": (x, grouped, 1e-5, 2, 3, "relu", torch.randn(2, 6, 6, 5)),
        "depthwise_separable": (x, depthwise, pointwise, [1e-5, 1e-3], 2, 1, "relu6"),
        "shuffle_unit": (x, half, depthwise, half, [1e-5] * 3, 2, 2, "relu"),
        "shuffle_unit_v2": (x, depthwise, two, pointwise, depthwise, two, [1e-5] * 5, 2, "relu"),
        "channel_shuffle": (x, 2),
        "channel_shuffle_split": (x, 2),
        "cat_shuffle_split": (x, torch.randn(2, 6, 6, 5), 5),
        "max_pool2d": (x, [3, 3], TWO, ONE),
        "avg_pool2d": (x, [3, 2], TWO, [1, 0]),
        "global_avg_pool": (x,),
        "linear": (torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)),
    }


def changed(args: tuple[Any, ...], change: Any) -> tuple[Any, ...]:
    """The same arguments with every tensor changed."""
    return tuple(
        change(a)
        if isinstance(a, Tensor)
        else [change(t) if isinstance(t, Tensor) else t for t in a]
        if isinstance(a, list)
        else a
        for a in args
    )


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_opcheck(backend: str, name: str) -> None:
    args = arguments()[name]
    for change in (lambda t: t, channels_last, torch.Tensor.double):
        torch.library.opcheck(OPS[name], changed(args, change))


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_opcheck_with_gradients(backend: str, name: str) -> None:
    # running statistics need no gradient, and torch's BatchNorm has none for them
    def free(t: Tensor) -> Tensor:
        return t.clone().requires_grad_()

    args = changed(arguments()[name], free)
    for arg in args:
        if isinstance(arg, list) and len(arg) == 6:
            arg[2:4] = [t.detach() for t in arg[2:4]]
    torch.library.opcheck(OPS[name], args)


def test_opcheck_of_the_other_forms() -> None:
    """No expansion, no BatchNorm, no residual, no bias."""
    x, weight = torch.randn(2, 4, 6, 5), torch.randn(3, 4)
    d, p, nothing = list(record(4, 1, 3)[:6]), list(record(3, 4)[:6]), [None] * 5
    torch.library.opcheck(OPS["inverted_residual"], (x, [], d, p, [1e-5] * 3, 2, 1, None, False))
    torch.library.opcheck(OPS["pointwise_conv_bn_act"], (x, [p[0], *nothing], 0.0, None, None))
    torch.library.opcheck(OPS["linear"], (x[..., 0, 0], weight, None))
    whole, half, two, three = (list(r[:6]) for r in (record(4, 4), record(4, 2), record(2, 2), record(2, 1, 3)))
    torch.library.opcheck(OPS["grouped_pointwise_conv_bn_act"], (x, half, 0.0, 2, 1, None, None))
    for compress in (whole, half):
        torch.library.opcheck(OPS["shuffle_unit"], (x, compress, d, half, [1e-5] * 3, 1, 2, "relu"))
    torch.library.opcheck(OPS["shuffle_unit_v2"], (x, [], [], two, three, two, [1e-5] * 5, 1, "relu"))


def test_promised_strides_are_kept(tier: str) -> None:
    """Fake tensors promise the strides that the op then delivers, whatever the layout."""
    from torch._subclasses import FakeTensorMode

    args = arguments()
    for size in ((2, 4, 6, 5), (1, 4, 1, 1), (2, 4, 1, 6), (1, 4, 6, 5)):
        for _, x in layouts(torch.randn(size)):
            for name in SCHEMAS:
                if name == "linear" or (name == "avg_pool2d" and size[3] == 1):
                    continue
                case = (x, *args[name][1:])
                if name.endswith("pointwise_conv_bn_act"):
                    case = (*case[:-1], None)
                elif name == "cat_shuffle_split":
                    case = (x, torch.cat([x, x[:, :2]], 1), 5)
                found = OPS[name](*case)
                with FakeTensorMode() as mode:
                    promised = OPS[name](*changed(case, mode.from_tensor))
                if isinstance(found, Tensor):
                    found, promised = [found], [promised]
                for y, fake in zip(found, promised, strict=True):
                    assert fake.shape == y.shape and fake.dtype == y.dtype, name
                    note = (name, x.shape, x.stride(), fake.stride(), y.stride())
                    assert significant_strides(fake) == significant_strides(y), note


def test_the_memory_format_rule_is_torchs() -> None:
    """Random sizes and strides, dimensions of 1 among them, against what torch's convolution makes of them."""
    generator = torch.Generator().manual_seed(1)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most, (1,), generator=generator))

    seen = set()
    for _ in range(3000):
        size = [draw(1, 4) for _ in range(4)]
        order = torch.randperm(4, generator=generator).tolist() if draw(0, 2) else [1, 3, 2, 0]
        stride, step = [0] * 4, 1
        for dim in order:
            stride[dim] = step if size[dim] > 1 or draw(0, 2) else draw(0, 9)
            step = max(step, stride[dim] * size[dim] * draw(1, 3))
        x = torch.zeros(5000).as_strided(size, stride)
        y = tF.conv2d(x, torch.zeros(3, size[1], 1, 1))
        # with 3 output channels only a 1 x 1 map leaves the format of the output open
        if size[2] * size[3] == 1:
            continue
        rule = strides_like_channels_last(size, stride)
        assert rule == (y.stride(1) == 1), (size, stride, y.stride())
        seen.add(rule)
    assert seen == {True, False}


def test_compile_fullgraph(backend: str) -> None:
    x = torch.randn(2, 8, 7, 7)
    layers = [
        settled(fastblocks.InvertedResidual(8, 8)),
        settled(fastblocks.InvertedResidual(8, 6, expand_ratio=1, stride=2)),
        settled(fastblocks.ConvBNAct(8, 6)),
        settled(fastblocks.DepthwiseConvBNAct(8)),
    ]
    for layer in layers:
        with torch.no_grad():
            want = layer(x)
            for compiler in ("eager", "aot_eager"):
                assert torch.equal(torch.compile(layer, backend=compiler, fullgraph=True)(x), want)
    torch._dynamo.reset()


def test_compile_fullgraph_of_functions(backend: str) -> None:
    """Ops of one and of two outputs, one after the other; forward, and gradients."""
    conv, depthwise, half = record(8, 4), record(8, 1, 3), record(8, 4)
    square, small = record(8, 8), (record(4, 4), record(4, 1, 3), record(4, 4))

    def network(x: Tensor) -> Tensor:
        y = F.max_pool2d(x, 3, 2, 1)
        y = F.grouped_pointwise_conv_bn_act(y, conv, groups=2, shuffle=2, activation="relu")
        left, right = F.channel_shuffle_split(F.shuffle_unit(y, conv, depthwise, half, groups=2))
        left, right = F.cat_shuffle_split(left, right.sin(), 4)
        y = F.shuffle_unit_v2(torch.cat((left, right), 1), *small)
        y = F.depthwise_separable(F.channel_shuffle(y, 4), depthwise, square)
        return F.avg_pool2d(y, 2)

    for image in (torch.randn(2, 8, 9, 10), torch.randn(2, 8, 9, 10).contiguous(memory_format=torch.channels_last)):
        x = image.requires_grad_()
        want = network(x)
        (grad,) = torch.autograd.grad(want.pow(2).sum(), x)
        for compiler in ("eager", "aot_eager"):
            compiled = torch.compile(network, backend=compiler, fullgraph=True)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), want)
            (found,) = torch.autograd.grad(compiled(x).pow(2).sum(), x)
            torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_compiled_graphs_hold_one_op_a_layer() -> None:
    try:
        native = fastblocks.use_backend("native")
    except RuntimeError as error:
        pytest.skip(str(error))
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    with native, torch.no_grad():
        layer = settled(fastblocks.InvertedResidual(8, 8))
        torch.compile(layer, backend=keep, fullgraph=True)(torch.randn(1, 8, 5, 5))
    assert graphs == [["fastblocks.inverted_residual.default"]]
    torch._dynamo.reset()


def test_compiled_training_and_gradients(backend: str) -> None:
    """Gradients of compiled layers equal those of eager ones, in eval mode and in training mode."""
    x = torch.randn(2, 8, 5, 5)
    for training in (False, True):
        layer = settled(fastblocks.InvertedResidual(8, 8)).train(training)
        other = copy.deepcopy(layer)
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        for run in (layer, compiled):
            image = x.clone().requires_grad_()
            run(image).pow(2).sum().backward()
        for p, q in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
        for p, q in zip(layer.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(p, q)
    torch._dynamo.reset()


def test_export(backend: str) -> None:
    layer = settled(fastblocks.InvertedResidual(8, 8))
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = torch.export.export(layer, (torch.randn(2, 8, 12, 10),), dynamic_shapes=(sizes,))
    with torch.no_grad():
        for size in ((2, 8, 12, 10), (3, 8, 9, 16)):
            x = torch.randn(size)
            torch.testing.assert_close(program.module()(x), layer(x))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("fastblocks.inverted_residual.default" in targets) == (backend != "reference")


def test_inference_mode(backend: str) -> None:
    layer = settled(fastblocks.InvertedResidual(8, 8))
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        want = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
        y = layer(x.clone())
        assert torch.equal(y, want) and y.is_inference()
        made = settled(fastblocks.ConvBNAct(8, 8))
        assert torch.equal(made(x), made(x))
    with torch.no_grad():
        assert torch.equal(layer(x), want)


def test_functional_call(backend: str) -> None:
    layer = settled(fastblocks.InvertedResidual(8, 8))
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        want = layer(x)
        state = {name: tensor * 2 for name, tensor in layer.state_dict().items()}
        found = torch.func.functional_call(layer, state, (x,))
        assert torch.equal(layer(x), want)
        layer.load_state_dict(state)
        assert torch.equal(layer(x), found) and not torch.equal(found, want)


def test_functions_under_transforms(backend: str) -> None:
    x, conv = torch.randn(3, 2, 4, 5, 5), record(6, 4, 3)
    mapped = torch.vmap(lambda t: F.conv_bn_act(t, conv, activation="relu6"))(x)
    torch.testing.assert_close(mapped, torch.stack([F.conv_bn_act(t, conv, activation="relu6") for t in x]))
    grad = torch.func.grad(lambda t: F.conv_bn_act(t, conv).pow(2).sum())(x[0])
    image = x[0].clone().requires_grad_()
    F.conv_bn_act(image, conv).pow(2).sum().backward()
    torch.testing.assert_close(grad, image.grad)


def test_autocast(backend: str) -> None:
    """The functions give torch's dtype under autocast."""
    x, conv = torch.randn(2, 4, 5, 5), record(6, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.conv_bn_act(x, conv)
        z = tF.conv2d(x, conv.weight)
    assert y.dtype == z.dtype == torch.bfloat16
    assert F.conv_bn_act(x, conv).dtype == torch.float32


def test_profiler_names(backend: str) -> None:
    layer = settled(fastblocks.InvertedResidual(8, 8))
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        layer(x)
        layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x)
    names = {event.key for event in profile.key_averages()}
    assert ("fastblocks::inverted_residual" if backend != "reference" else "aten::conv2d") in names


def test_multiply_adds_are_counted() -> None:
    args = arguments()
    for name, want in (
        ("conv_bn_act", 2 * 3 * 3 * 3 * 4 * 9),
        ("pointwise_conv_bn_act", 2 * 4 * 30 * 4),
        ("depthwise_conv_bn_act", 2 * 4 * 30 * 9),
        ("inverted_residual", 2 * 30 * 8 * (4 + 9 + 4)),
        ("grouped_pointwise_conv_bn_act", 2 * 6 * 30 * 2),
        ("depthwise_separable", 2 * 9 * 4 * (9 + 4)),
        ("shuffle_unit", 2 * 4 * (30 * 2 + 9 * (9 + 2))),
        ("shuffle_unit_v2", 2 * (30 * 4 * 4 + 9 * (4 * 9 + 4 * 2) * 2)),
        ("linear", 2 * 4 * 3),
    ):
        with FlopCounterMode(display=False) as counter:
            OPS[name](*args[name])
        assert counter.get_total_flops() == 2 * want, name
    unit = ([], [], list(record(2, 2)[:6]), list(record(2, 1, 3)[:6]), list(record(2, 2)[:6]))
    with FlopCounterMode(display=False) as counter:
        OPS["shuffle_unit_v2"](args["shuffle_unit_v2"][0], *unit, [1e-5] * 5, 1, "relu")
    assert counter.get_total_flops() == 2 * 2 * 30 * 2 * (2 + 9 + 2)
