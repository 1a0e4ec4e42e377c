"""Keys of the blocks, shuffles, pooling and the classifier's layer; arguments and inputs that are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import settled
from torch import Tensor, nn
from units import UNITS, image, one_by_one, plain_shuffle

import fastblocks
from fastblocks import (
    ChannelShuffle,
    ChannelShuffleSplit,
    DepthwiseSeparableConv,
    MaxPool2d,
    ShuffleUnit,
    ShuffleUnitV2,
)
from fastblocks.layers import can_fuse, why_not_fuse
from fastblocks.layers.head import Linear

# ------------------------------------------------------------------------------------------------------ keys and kin


def test_torchvisions_unit() -> None:
    shufflenetv2 = pytest.importorskip("torchvision.models.shufflenetv2", reason="it is what units are compared with")
    for channels in ((12, 12, 1), (12, 26, 2)):
        ours, theirs = ShuffleUnitV2(*channels), settled(shufflenetv2.InvertedResidual(*channels))
        assert [(n, type(m)) for n, m in ours.named_modules()][1:] == [(n, type(m)) for n, m in theirs.named_modules()][
            1:
        ]
        for a, b in zip(ours.modules(), theirs.modules(), strict=True):
            assert type(a) is not type(b) or a.extra_repr() == b.extra_repr()
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        assert ours.stride == theirs.stride
        ours.eval().load_state_dict(theirs.state_dict())
        with torch.no_grad():
            x = image()
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_keys() -> None:
    def convolutions(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {k.removesuffix(".weight"): tuple(v.shape) for k, v in layer.state_dict().items() if v.dim() == 4}

    assert convolutions(DepthwiseSeparableConv(8, 12)) == {"depthwise.0": (8, 1, 3, 3), "pointwise.0": (12, 8, 1, 1)}
    assert convolutions(ShuffleUnit(24, 240, 2, 3, first_grouped=False)) == {
        "compress.0": (60, 24, 1, 1),
        "depthwise.0": (60, 1, 3, 3),
        "expand.0": (216, 20, 1, 1),
    }
    assert convolutions(ShuffleUnit(240, 240, 1, 3))["compress.0"] == (60, 80, 1, 1)
    assert (
        not ChannelShuffle(2).state_dict() and not MaxPool2d(2).state_dict() and not ChannelShuffleSplit().state_dict()
    )
    assert isinstance(ChannelShuffle(2), nn.ChannelShuffle) and isinstance(MaxPool2d(2), nn.MaxPool2d)
    assert str(ChannelShuffle(2)) == str(nn.ChannelShuffle(2)) and str(MaxPool2d(2)) == str(nn.MaxPool2d(2))


def test_the_other_shuffle_is_the_inverse(backend: str) -> None:
    x = torch.randn(2, 24, 3, 3)
    for groups in (1, 2, 3, 4, 8, 24):
        assert torch.equal(ChannelShuffle(24 // groups)(ChannelShuffle(groups)(x)), x)
    unit = settled(ShuffleUnit(24, 48, 2, 2, shuffle_groups=6))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(unit(x), one_by_one(unit, x), rtol=1e-5, atol=1e-5)
    assert "the shuffle has 6" in (why_not_fuse(unit, x) or "")


def test_shuffle_split(tier: str, fused: list[str]) -> None:
    for groups in (2, 3, 4):
        layer = ChannelShuffleSplit(groups)
        for nchw in (image(), image(1, 1, 1), image()[:0]):
            for x in (nchw, nchw.contiguous(memory_format=torch.channels_last)):
                assert can_fuse(layer, x)
                want = plain_shuffle(x, groups).chunk(2, 1)
                for _ in range(3):
                    got = layer(x)
                    assert isinstance(got, tuple) and all(map(torch.equal, got, want))
                    assert got[0].untyped_storage().data_ptr() != got[1].untyped_storage().data_ptr() or not len(x)
    assert set(fused) == {"channel_shuffle_split"}
    a, b = image().requires_grad_(), image()
    left, right = layer(a)
    (left * 2 + right * 3).sum().backward()
    factors = torch.cat((torch.full((6,), 2.0), torch.full((6,), 3.0)))
    # where each channel went to
    place = plain_shuffle(torch.arange(12.0).view(1, 12, 1, 1), 4).flatten().argsort()
    assert torch.equal(a.grad[0, :, 0, 0], factors[place])
    double = layer(b.double())
    assert all(map(torch.equal, double, plain_shuffle(b.double(), 4).chunk(2, 1)))
    assert str(layer) == "ChannelShuffleSplit(groups=4)"


def test_shuffle_of_other_shapes(backend: str) -> None:
    """As nn.ChannelShuffle has it: any number of dimensions behind the channels, any dtype."""
    layer = ChannelShuffle(3)
    for n in (2, 4):
        with pytest.raises(ValueError, match=r"groups: .*, got 3"):
            layer(torch.ones(1, n, 5))
    for x in (torch.randn(2, 12, 5), torch.randn(2, 12, 3, 2, 2), torch.arange(24).view(2, 12, 1, 1)):
        assert not can_fuse(layer, x)
        assert torch.equal(layer(x), nn.ChannelShuffle(3)(x))


def test_max_pool_as_torchs(backend: str, fused: list[str]) -> None:
    x = image()
    for kwargs, reason in (
        ({"dilation": 2}, "dilation is 2"),
        ({"return_indices": True}, "indices are wanted"),
        ({"ceil_mode": True}, "the output's size is rounded up"),
    ):
        layer = MaxPool2d(3, 2, 1, **kwargs)
        assert reason in (why_not_fuse(layer, x) or "")
        got, want = layer(x), nn.MaxPool2d(3, 2, 1, **kwargs)(x)
        assert all(map(torch.equal, got, want)) if isinstance(want, tuple) else torch.equal(got, want)
    layer = MaxPool2d(2)
    assert why_not_fuse(layer, x[0]) == "the input is not batched"
    assert torch.equal(layer(x[0]), nn.MaxPool2d(2)(x[0]))
    assert not fused
    for _ in range(2):
        assert torch.equal(layer(x), nn.MaxPool2d(2)(x))
        assert torch.equal(layer(x[:, :5]), nn.MaxPool2d(2)(x[:, :5]))
    layer.kernel_size = (3, 2)
    assert torch.equal(layer(x), nn.functional.max_pool2d(x, (3, 2), 2))
    assert set(fused) == {"max_pool2d"}
    with pytest.raises(ValueError, match="input"):
        layer(x[:, :, :1])


def test_linear(backend: str, fused: list[str]) -> None:
    layer, x = Linear(8, 5), torch.randn(3, 8)

    def same(x: Tensor, op: bool = True) -> None:
        with torch.no_grad():
            fused.clear()
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
            assert fused == ["linear"] * op
        fused.clear()
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        # the compiled tiers leave a weight that trains to torch
        assert fused == ["linear"] * (op and backend == "reference")

    same(x), same(x), same(x[:0]), same(x[0], op=False)
    layer.weight = nn.Parameter(torch.randn(5, 8))
    same(x)
    layer.weight.data.mul_(2)
    fastblocks.refresh(layer)
    same(x)
    layer.bias = None
    same(x)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and torch.equal(
        pickle.loads(pickle.dumps(layer))(x), layer(x)
    )
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(5, 8))
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(3, 9))
    nn.utils.parametrizations.weight_norm(layer)
    same(x, op=False)
    assert layer.double()(x.double()).dtype is torch.float64
    assert str(Linear(8, 5, bias=False)) == str(nn.Linear(8, 5, bias=False))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"in_channels: expected a positive int, got 0", lambda: DepthwiseSeparableConv(0, 8)),
        (r"out_channels: expected a positive int, got -1", lambda: DepthwiseSeparableConv(8, -1)),
        (r"stride: expected a positive int, got 0", lambda: DepthwiseSeparableConv(8, 8, 0)),
        (r"groups: expected a positive int, got 0", lambda: ChannelShuffle(0)),
        (r"groups: expected an int, got float 1\.5", lambda: ChannelShuffle(1.5)),
        (r"groups: expected a positive int, got -2", lambda: ChannelShuffleSplit(-2)),
        (r"groups: expected a positive int, got 0", lambda: ShuffleUnit(24, 24, 1, 0)),
        (r"groups: expected a divisor of out_channels / 4 = 6, got 4", lambda: ShuffleUnit(24, 24, 1, 4)),
        (r"groups: expected a divisor of out_channels - in_channels = 25, got 2", lambda: ShuffleUnit(23, 48, 2, 2)),
        (r"shuffle_groups: expected a divisor of .* = 6, got 4", lambda: ShuffleUnit(24, 24, 1, 3, shuffle_groups=4)),
        (r"stride: expected 1 or 2, got 3", lambda: ShuffleUnit(24, 24, 3, 3)),
        (r"out_channels: expected in_channels = 24 at stride 1, got 48", lambda: ShuffleUnit(24, 48, 1, 3)),
        (r"out_channels: expected more than in_channels = 24 .*, got 24", lambda: ShuffleUnit(24, 24, 2, 3)),
        (r"out_channels: expected a multiple of 4, got 26", lambda: ShuffleUnit(13, 26, 2, 1)),
        (r"stride: expected 1 or 2, got 0", lambda: ShuffleUnitV2(24, 24, 0)),
        (r"out_channels: expected an even number, for two branches, got 25", lambda: ShuffleUnitV2(24, 25, 2)),
        (r"out_channels: expected in_channels = 24 at stride 1, got 26", lambda: ShuffleUnitV2(24, 26, 1)),
    ],
)
def test_layers_refuse_arguments(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()


@pytest.mark.parametrize("training", [True, False])
def test_layers_refuse_inputs(backend: str, training: bool) -> None:
    """Whether the op or the children would run; before anything was run, and after."""
    for name in ("separable", "grouped", "unit", "unit, first", "v2", "v2, stride"):
        layer = UNITS[name][0]().train(training)
        for _ in range(2):
            for wrong in (image()[0], image()[:, :11], torch.randn(2, 13, 5, 5), image().int(), image()[:, :6]):
                with pytest.raises((ValueError, TypeError), match=r"^input: expected"):
                    layer(wrong)
            layer(image()), layer(image())
    for layer, channels, message in (
        (ChannelShuffle(5), 12, "groups: expected a divisor of .*12, got 5"),
        (ChannelShuffleSplit(3), 9, "input: expected an even number of channels"),
        (ChannelShuffleSplit(4), 6, "groups: expected a divisor of .*6, got 4"),
    ):
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ValueError, match=message):
                layer(torch.ones(1, channels, 2, 2, dtype=dtype))
