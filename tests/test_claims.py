"""What the papers say, and the pages in docs/ repeat: counted on real convolutions and on the kernels themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from conftest import record, settled
from counting import by_kind, channels_last, multiply_adds, traffic
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastblocks
from fastblocks import functional as FB
from fastblocks import models

native_only = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="needs the native tier")

# ---------------------------------------------------------------------------------------------------------- MobileNet


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs", "size"), [(32, 64, 112), (512, 512, 14), (1024, 1000, 7), (3, 5, 9)])
def test_depthwise_separable_costs_1_over_n_and_1_over_k2(inputs: int, outputs: int, size: int, stride: int) -> None:
    """Howard et al. 2017, section 3.1."""
    image = (1, inputs, size, size)
    full = by_kind(nn.Conv2d(inputs, outputs, 3, stride, 1), *image)[0].total()
    separable = fastblocks.DepthwiseSeparableConv(inputs, outputs, stride)
    cost = by_kind(separable, *image)[0]
    assert set(cost) == {"depthwise", "1x1"}
    assert Fraction(cost.total(), full) == Fraction(1, outputs) + Fraction(1, 9)
    assert Fraction(cost["depthwise"], full) == Fraction(1, outputs)
    assert multiply_adds(separable, *image) == cost.total()


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_same_of_larger_kernels(backend: str, kernel: int) -> None:
    x, first, second = torch.zeros(1, 24, 20, 20), record(24, 1, kernel), record(40, 24)
    with FlopCounterMode(display=False) as separable, torch.no_grad():
        FB.depthwise_separable(x, first, second)
    with FlopCounterMode(display=False) as full:
        nn.functional.conv2d(x, torch.zeros(40, 24, kernel, kernel), padding=kernel // 2)
    ratio = Fraction(separable.get_total_flops(), full.get_total_flops())
    assert ratio == Fraction(1, 40) + Fraction(1, kernel**2)


def test_shares_of_mobilenet() -> None:
    """Howard et al. 2017, table 2, which prints 1.19 for the 1.91 % of the first layer."""
    cost, weights = by_kind(models.create("mobilenet_v1"), 1, 3, 224, 224)
    percent = {kind: round(100 * n / cost.total(), 2) for kind, n in cost.items()}
    assert percent == {"3x3": 1.91, "depthwise": 3.06, "1x1": 94.86, "linear": 0.18}
    percent = {kind: round(100 * n / weights.total(), 2) for kind, n in weights.items()}
    assert percent == {"3x3": 0.02, "depthwise": 1.06, "1x1": 74.59, "linear": 24.33}


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "shufflenet_v1_g3", "shufflenet_v2_x1_0"])
def test_fused_ops_count_what_their_children_do(name: str) -> None:
    model = models.create(name)
    assert by_kind(model, 1, 3, 224, 224)[0].total() == multiply_adds(model, 1, 3, 224, 224)


# -------------------------------------------------------------------------------------------------------- MobileNetV2


@pytest.mark.parametrize("dims", [2, 3, 5, 15, 30])
def test_relu_loses_few_dimensions_and_keeps_many(tier: str, dims: int) -> None:
    """Sandler et al. 2018, figure 1: a spiral in the plane, through random matrices and a ReLU, and back.

    A point is lost where fewer than two outputs stay above zero. Signs are fair coins: (n + 1) of 2^n points.
    """
    t = torch.linspace(1, 4 * torch.pi, 50)
    spiral = torch.stack([t * t.cos(), t * t.sin()])
    matrices = torch.randn(600, dims, 2)
    weight = matrices.view(-1, 2, 1, 1)
    with torch.no_grad():
        out = FB.pointwise_conv_bn_act(spiral.view(1, 2, 1, -1), FB.ConvBN(weight), activation="relu")
    values = out.view(600, dims, -1).transpose(1, 2).double()
    alive = matrices[:, None].double() * (values != 0)[..., None]
    back = (torch.linalg.pinv(alive) @ values[..., None]).squeeze(-1)
    lost = (back - spiral.T).norm(dim=2) > 1e-3 * spiral.norm(dim=0)
    assert abs(lost.float().mean() - (dims + 1) / 2**dims) < 0.03
    assert dims < 30 or not lost.any()


@native_only
def test_inverted_residual_in_the_papers_measure() -> None:
    """Sandler et al. 2018, section 5.1: memory is the largest input + output of any one operator; 16-96-24, 112x112."""
    block = fastblocks.InvertedResidual(16, 24, stride=2, expand_ratio=6).eval()
    x = channels_last(1, 16, 112, 112)
    unfused, fused = (traffic(how, lambda: block(x)).largest for how in ("folded", "fused"))
    # the depthwise convolution: 96 channels at 112x112 and at 56x56
    assert unfused == 4 * 96 * (112 * 112 + 56 * 56) == 6_021_120
    assert fused == 4 * (16 * 112 * 112 + 24 * 56 * 56) == 1_103_872
    assert round(unfused / fused, 1) == 5.5


_SCRATCH = """
import ast, os, sys, torch
def run(block, batch, channels, size):
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    before = fastblocks.memory_stats()
    y = block(x)
    after = fastblocks.memory_stats()
    output = after["active_bytes"] - before["active_bytes"]
    assert size == 4 or y.numel() * 4 <= output <= 1.25 * y.numel() * 4, (y.shape, output)
    assert after["peak_active_bytes"] > before["peak_active_bytes"]
    return after["peak_active_bytes"] - after["active_bytes"]
@torch.no_grad()
def measure(threads, module, channels, size):
    global fastblocks
    import fastblocks  # not before the fork: a child of a process that has it takes one thread
    torch.set_num_threads(threads)
    block = eval("fastblocks." + module).eval()
    run(block, 1, channels, 4)  # packs the weights
    return [run(block, batch, channels, size) for batch in (threads, 8)]
for threads, block in ast.literal_eval(sys.argv[1]):
    if os.fork() == 0:
        print((threads, block), measure(threads, *block), sep=": ", end=", ", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""

Block = tuple[str, int, int]
"""What makes it, its channels, and the pixels of a side."""

Scratch = dict[tuple[int, Block], list[int]]
"""Bytes by threads and block."""

_EXPANDING: Block = ("InvertedResidual(16, 24, 2, 6)", 16, 112)
_BLOCKS: list[tuple[Block, int]] = [
    (("DepthwiseSeparableConv(32, 64)", 32, 112), 0),
    (("ShuffleUnit(240, 240, 1, 3)", 240, 28), 0),
    (("ShuffleUnit(240, 480, 2, 3)", 240, 56), 0),
    (("ShuffleUnitV2(116, 116, 1)", 116, 28), 0),
    (("ShuffleUnitV2(116, 232, 2)", 116, 56), 4 * 116 * 28 * 28),
]


@pytest.fixture(scope="module")
def scratch() -> Scratch:
    """Beside input, output and packed weights, for a batch of an image a thread and one of 8.

    Each is taken in a process of its own. Threads that share an image take less: each has rows for its part only.
    """
    asked = [(threads, block) for threads in (1, 2) for block in (_EXPANDING, *(block for block, _ in _BLOCKS))]
    command = [sys.executable, "-c", _SCRATCH, repr(asked)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: Scratch = ast.literal_eval(f"{{{done.stdout}}}")
    assert all(found[2, block][1] > found[1, block][1] for _, block in found)  # so both threads took part
    return found


@native_only
@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_of_the_fused_inverted_residual(scratch: Scratch, threads: int) -> None:
    """The kernel takes far less than the expanded tensor of 4.8 MB; each thread has rows of its own."""
    one, eight = scratch[threads, _EXPANDING]
    expanded = 4 * 96 * 112 * 112
    assert 0 < one < threads * expanded / 8
    assert eight < threads * expanded / 8


@native_only
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("block", "left"), _BLOCKS, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_scratch_does_not_grow_with_the_batch(scratch: Scratch, threads: int, block: Block, left: int) -> None:
    """Rows of a thread's own are what the kernel takes, and `left` bytes an image: a left branch's result.

    Beside them scaled weights, which a larger batch repays.
    """
    few, eight = scratch[threads, block]
    assert 0 < few < threads * (750_000 + 1.25 * left)
    assert eight <= few + (8 - threads) * 1.25 * left + 64_000


def test_memory_of_mobilenet_v2() -> None:
    """Sandler et al. 2018, table 3: 16-bit activations between blocks.

    The paper gives a resolution the channels of the stages that begin there (table 2), though the last of them ends at
    half of it; at 112x112 it gives the 16 channels that stand there.
    """
    paper = {112: (16, 400), 56: (32, 200), 28: (64, 100), 14: (160, 62), 7: (320, 32)}
    begins: dict[int, int] = {}
    stands: dict[int, int] = {}

    def seen(block: Any, args: Any, out: Tensor) -> None:
        for t in (args[0], out):
            stands[t.shape[2]] = max(stands.get(t.shape[2], 0), t.shape[1])
        begins[args[0].shape[2]] = max(begins.get(args[0].shape[2], 0), out.shape[1])

    model: Any = models.create("mobilenet_v2").eval()
    for block in model.features:
        # the first block's input is the stem's output, which the paper leaves out
        if isinstance(block, fastblocks.InvertedResidual) and block is not model.features[1]:
            block.register_forward_hook(seen)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert stands == {112: 16, 56: 24, 28: 32, 14: 96, 7: 320}
    # the first block of a stage begins at the size before it
    assert begins == {112: 24, 56: 32, 28: 64, 14: 160, 7: 320}
    for size, (channels, kilobytes) in paper.items():
        assert channels == (stands if size == 112 else begins)[size]
        assert 2 * channels * size**2 / 1000 == pytest.approx(kilobytes, rel=0.021), size
    assert max(2 * c * size**2 for size, c in stands.items()) == 2 * 16 * 112**2 == 401_408


def test_memory_of_mobilenet() -> None:
    """The same table: 1600 KB for MobileNet, 64 channels at 112x112."""
    largest = 0

    def seen(block: Any, args: Any, out: Tensor) -> None:
        nonlocal largest
        largest = max(largest, 2 * out.numel())

    model = models.create("mobilenet_v1").eval()
    for block in model.modules():
        if isinstance(block, fastblocks.DepthwiseSeparableConv):
            block.register_forward_hook(seen)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert largest == 2 * 64 * 112**2 == 1_605_632


# --------------------------------------------------------------------------------------------------------- ShuffleNet


def bottleneck(channels: int, inner: int, groups_of_3x3: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, inner, 3, 1, 1, 1, groups_of_3x3), nn.Conv2d(inner, channels, 1)
    )


@pytest.mark.parametrize("channels", [256, 512, 1024, 2048])
def test_pointwise_share_of_a_resnext_unit(channels: int) -> None:
    """Zhang et al. 2017, section 3.1: cardinality 32, the 3x3 at half the channels, as in ResNeXt's 32x4d."""
    cost, _ = by_kind(bottleneck(channels, channels // 2, 32), 1, channels, 14, 14)
    assert round(100 * cost["1x1"] / cost.total(), 1) == 93.4


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_a_shuffle_unit_costs_less_than_resnets_and_resnexts(groups: int) -> None:
    """Zhang et al. 2017, section 3.2: hw(2cm/g + 9m), against hw(2cm + 9m^2) and hw(2cm + 9m^2/g)."""
    c = 144 * groups
    m, h = c // 4, 7
    unit = by_kind(fastblocks.ShuffleUnit(c, c, 1, groups), 1, c, h, h)[0].total()
    resnet, resnext = (by_kind(bottleneck(c, m, g), 1, c, h, h)[0].total() for g in (1, groups))
    assert unit == h * h * (2 * c * m // groups + 9 * m)
    assert resnet == h * h * (2 * c * m + 9 * m * m)
    assert resnext == h * h * (2 * c * m + 9 * m * m // groups)
    assert unit < resnext <= resnet


def seen_inputs(channels: int, groups: int, shuffled: bool) -> Tensor:
    """By index arithmetic: which inputs an output of two stacked grouped 1x1 depends on, (outputs, inputs)."""
    size = channels // groups
    sees = torch.zeros(channels, channels, dtype=torch.bool)
    for out in range(channels):
        for k in range(out // size * size, out // size * size + size):
            # the shuffle puts channel j of group i at i + j * groups
            middle = k % groups * size + k // groups if shuffled else k
            sees[out, middle // size * size : middle // size * size + size] = True
    return sees


def stacked(channels: int, groups: int, how: str) -> Callable[[Tensor], Tensor]:
    first, second = (record(channels, channels // groups) for _ in range(2))

    def run(x: Tensor) -> Tensor:
        shuffle = groups if how == "fused shuffle" else 1
        y = FB.grouped_pointwise_conv_bn_act(x, first, groups=groups, shuffle=shuffle)
        if how == "shuffle":
            y = FB.channel_shuffle(y, groups)
        return FB.grouped_pointwise_conv_bn_act(y, second, groups=groups)

    return run


@pytest.mark.parametrize("how", ["plain", "shuffle", "fused shuffle"])
@pytest.mark.parametrize(("groups", "channels"), [(2, 8), (3, 60), (4, 68), (4, 8), (8, 64), (8, 96), (8, 48)])
def test_stacked_groups_see_a_share_and_all_after_a_shuffle(backend: str, groups: int, channels: int, how: str) -> None:
    """Zhang et al. 2017, section 3.1 and figure 1, as the support of the Jacobian: exact zeros, and none."""
    run, x = stacked(channels, groups, how), torch.randn(1, channels, 1, 1)
    expected = seen_inputs(channels, groups, how != "plain")
    # of (4, 8) and (8, 48) a shuffle reaches a part: see the next test
    reached = 1 if how == "plain" else min(groups, channels // groups)
    assert expected.sum(1).unique().tolist() == [reached * channels // groups]
    jacobian = torch.autograd.functional.jacobian(run, x).view(channels, channels)
    assert torch.equal(jacobian != 0, expected)
    # the same of the forward pass alone: an output that does not see an input does not change by a bit
    with torch.no_grad():
        before = run(x).flatten()
        after = torch.stack([run(x + unit.view_as(x)).flatten() for unit in 1000 * torch.eye(channels)], 1)
    assert torch.equal(after != before[:, None], expected)


def test_a_shuffle_needs_as_many_channels_a_group_as_there_are_groups() -> None:
    """With 6 channels a group, as in stage 2 of ShuffleNet 0.5x g8, one shuffle reaches 6 of 8 groups."""
    assert seen_inputs(384 // 2 // 4, 8, True).sum(1).unique().tolist() == [36]
    for groups, width in {2: 200, 3: 240, 4: 272, 8: 384}.items():
        for stage in (1, 2, 4):
            assert seen_inputs(width * stage // 4, groups, True).all()


# ------------------------------------------------------------------------------------------------------- ShuffleNetV2


def access_cost(first: int, second: int, size: int, groups: int = 1) -> tuple[int, int]:
    """Memory access cost (activations and weights, in numbers) and multiply-adds of a 1x1 convolution."""
    conv = nn.Conv2d(first, second, 1, groups=groups, bias=False)
    x = torch.zeros(1, first, size, size)
    numbers = traffic("single", lambda: conv(x)).bytes // 4 + conv.weight.numel()
    return numbers, by_kind(conv, *x.shape)[0].total()


def test_equal_widths_cost_the_fewest_accesses() -> None:
    """Ma et al. 2018, G1: MAC >= 2 sqrt(hw B) + B/hw, and equal widths reach it. Channels of the paper's table 1."""
    size, each = 56, []
    for first, second in ((32, 32), (22, 44), (13, 78), (9, 108)):
        mac, cost = access_cost(first, second, size)
        bound = 2 * (size**2 * cost) ** 0.5 + cost / size**2
        assert mac == bound if first == second else mac > bound
        each.append(mac / cost)
    assert each == sorted(each)


def test_groups_cost_accesses() -> None:
    """Ma et al. 2018, G2: at equal multiply-adds more groups mean more channels. Channels of the paper's table 2.

    Its 180 channels of 8 groups cannot be had: 184 are the nearest.
    """
    size, found = 56, [access_cost(c, c, 56, g) for g, c in ((1, 64), (2, 90), (4, 128), (8, 184))]
    macs, costs = zip(*found, strict=True)
    assert max(costs) / min(costs) < 1.05
    each = [mac / cost for mac, cost in found]
    assert each == sorted(each) and each[-1] > 2.5 * each[0]
    assert macs[0] == 2 * 64 * size**2 + 64 * 64


def test_half_of_the_channels_pass_a_unit_untouched() -> None:
    """Ma et al. 2018, section 3: after j units, 2^-j of the channels have come through unchanged."""
    unit = settled(fastblocks.ShuffleUnitV2(32, 32, 1))
    x = torch.randn(1, 32, 5, 5)
    before = {channel.numpy().tobytes() for channel in x[0]}
    for units in (1, 2, 3, 4):
        with torch.no_grad():
            x = unit(x)
        assert sum(channel.numpy().tobytes() in before for channel in x[0]) == 32 >> units
