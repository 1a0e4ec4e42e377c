"""Checkpoints of other implementations: timm's names, and ShuffleNets that were trained with the other shuffle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settled
from plain_networks import close, lively, plainly

import fastblocks
from fastblocks import ShuffleUnit, models
from fastblocks.layers import can_fuse
from fastblocks.models import convert_shuffle, from_timm
from fastblocks.models.convert import is_timm
from fastblocks.models.weights import load_state_dict

# --- timm's checkpoints


TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenetv1_100": ("mobilenet_v1", {}),
    "mobilenetv2_050": ("mobilenet_v2", {"width_mult": 0.5}),
    "mobilenetv2_100": ("mobilenet_v2", {}),
    "mobilenetv2_110d": ("mobilenet_v2", {"width_mult": 1.1, "depth_mult": 1.2, "fix_stem_head": True}),
    "mobilenetv2_120d": ("mobilenet_v2", {"width_mult": 1.2, "depth_mult": 1.4, "fix_stem_head": True}),
    "mobilenetv2_140": ("mobilenet_v2_x1_4", {}),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", TIMM)
def test_timms_checkpoints(tmp_path: Path, name: str, suffix: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is what the checkpoints are from")
    theirs = settled(timm.create_model(name, pretrained=False, num_classes=30))
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": theirs.state_dict()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), path)
    ours, options = TIMM[name]
    model = fastblocks.models.create(ours, num_classes=30, weights=path, **options).eval()
    renamed = from_timm(theirs.state_dict())
    assert list(model.state_dict()) == list(renamed)
    assert all(map(torch.equal, model.state_dict().values(), renamed.values()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            close(model(x), theirs(x))


def test_what_is_not_timms_keeps_its_keys(tmp_path: Path) -> None:
    theirs = {"conv_stem.weight": torch.ones(1), "blocks.0.0.conv_dw.weight": torch.ones(1)}
    more = {"blocks.0.0.se.fc1.weight": torch.ones(1), "conv_head.weight": torch.ones(1), "epoch": torch.ones(1)}
    assert list(from_timm(theirs | more))[2:] == list(more)
    assert not is_timm({"a.weight": torch.ones(2), "conv_stem.weight": torch.ones(1)})
    path = tmp_path / "model.pth"
    torch.save(theirs, path)
    assert list(load_state_dict(path, "mobilenet_v2")) == ["features.0.0.weight", "features.1.depthwise.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*features\.0\.1\.weight"):
        fastblocks.models.create("mobilenet_v1", weights=path)


# ------------------------------------------------------------------------------------------------- the other shuffle


@pytest.mark.parametrize(("groups", "width"), [(1, 0.5), (2, 1.0), (3, 0.5), (3, 1.0), (3, 1.5)])
def test_checkpoints_of_the_other_shuffle(groups: int, width: float) -> None:
    theirs = lively(models.shufflenet_v1(groups, width, num_classes=10, shuffle="ng"))
    ours = models.shufflenet_v1(groups, width, num_classes=10).eval()
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    converted = convert_shuffle(theirs.state_dict(), groups)
    ours.load_state_dict(converted)
    assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())
    x = torch.randn(2, 3, 64, 64)
    want = plainly(f"shufflenet_v1_g{groups}", theirs, x, "ng")
    with torch.no_grad():
        for _ in range(2):
            close(theirs(x), want)
            close(ours(x), want)
    if groups > 1:
        assert not torch.allclose(plainly(f"shufflenet_v1_g{groups}", theirs, x), want, rtol=1e-2)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8])
def test_where_the_other_shuffle_can_be_converted(groups: int) -> None:
    """Exactly where both shuffles send as many channels from each group to each group."""
    for each in range(1, 2 * groups + 2):
        channels = groups * each
        theirs = settled(ShuffleUnit(4 * channels, 4 * channels, 1, groups, shuffle_groups=each))
        place = torch.arange(channels)
        counts = []
        for shape in ((groups, each), (each, groups)):
            source = place.view(shape).t().flatten()
            counts.append(torch.bincount(source // each * groups + place // each, minlength=groups**2))
        state_dict = {f"stage3.1.{k}": v for k, v in theirs.state_dict().items()}
        if not torch.equal(*counts):
            assert groups > 3 and each % groups
            with pytest.raises(ValueError, match=rf"^groups: no order .* stage3\.1 .* got {groups}: .*shuffle='ng'"):
                convert_shuffle(state_dict, groups)
            continue
        ours = ShuffleUnit(4 * channels, 4 * channels, 1, groups).eval()
        converted = convert_shuffle(state_dict, groups)
        ours.load_state_dict({k.removeprefix("stage3.1."): v for k, v in converted.items()})
        x = torch.randn(2, 4 * channels, 5, 4)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
            assert can_fuse(ours, x) and (can_fuse(theirs, x) or groups != each)


@pytest.mark.parametrize("name", ["shufflenet_v1_g4", "shufflenet_v1_g8", "shufflenet_v1_g8_x0_5"])
def test_the_other_shuffle_runs_where_it_cannot_be_converted(name: str) -> None:
    model, x = lively(models.create(name, num_classes=10, shuffle="ng")), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            close(model(x), plainly(name, model, x, "ng"))
    with pytest.raises(ValueError, match="shuffle='ng'"):
        convert_shuffle(model.state_dict(), int(name.split("_g")[1][0]))


def test_convert_shuffle_refuses_what_is_no_shufflenet() -> None:
    with pytest.raises(ValueError, match=r"^state_dict: expected the keys of a ShuffleNetV1"):
        convert_shuffle(models.shufflenet_v2_x0_5(2).state_dict(), 3)
    state_dict = models.shufflenet_v1_g3_x0_5(2).state_dict()
    with pytest.raises(
        ValueError, match=r"^groups: expected a divisor of the 30 channels of stage2\.0\.compress, got 4"
    ):
        convert_shuffle(state_dict, 4)
    with pytest.raises(ValueError, match=r"^groups: expected a positive int, got 0"):
        convert_shuffle(state_dict, 0)
