"""Mistakes in `fastblocks train`: each is one line and exit code 2, and the last good checkpoint stays."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from short_runs import STEPS, fails, pictures, run, saved, with_, write_pictures

from fastblocks.cli.errors import UserError
from fastblocks.cli.training import checkpoint as checkpoints
from fastblocks.cli.training.data import Data, Split


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted: its folder and its history."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pets")
    return tmp_path / "pets"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model", {"model": "mobilenet_v1_x0_5"}),
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 7}),
        ("lr", {"lr": 0.02}),
        ("weight_decay", {"weight_decay": 0.0}),
        ("network", {"stock": True}),
    ],
)
def test_going_on_with_another_argument(whole, name, changes):
    with pytest.raises(UserError, match=rf"was made with {name} .*, now it is .*--no-resume") as caught:
        run(whole[0], with_(**changes))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_going_on_with_other_data(whole):
    with pytest.raises(UserError, match="was made with data 'noise', now it is 'other'"):
        run(whole[0], data=pictures(identity="other"))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda content: b"", lambda content: b"no checkpoint"])
def test_a_damaged_checkpoint(capsys, whole, tmp_path, damage):
    (tmp_path / "checkpoint.pt").write_bytes(damage((whole[0] / "checkpoint.pt").read_bytes()))
    assert "checkpoint.pt is damaged, or no checkpoint: delete it" in fails(capsys, "--out", tmp_path)


def test_a_checkpoint_of_something_else(capsys, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "checkpoint.pt")
    assert "no checkpoint of a training" in fails(capsys, "--out", tmp_path)


def test_weights_of_another_form(whole, tmp_path):
    found = saved(whole[0])
    del found["model"]["features.0.0.weight"]
    checkpoints.save(tmp_path / "checkpoint.pt", found)
    with pytest.raises(UserError, match="does not fit mobilenet_v1_x0_25"):
        run(tmp_path)


def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(UserError, match=r"^epoch 2, step 3: the loss is nan; .*checkpoint.pt holds epoch 1$"):
        run(tmp_path, data=pictures(calls=STEPS + 2))
    assert saved(tmp_path)["epoch"] == 1
    with pytest.raises(UserError, match=r"^epoch 1, step 1: the loss is nan; no epoch is saved yet$"):
        run(tmp_path / "new", data=pictures(calls=0))


def test_weights_that_are_not_finite(tmp_path):
    """The loss of an epoch's only step is finite; what the step did to the weights is not saved."""
    with pytest.raises(UserError, match=r"^epoch 1, step 1: the weights are no longer finite; "):
        run(tmp_path, with_(batch_size=32, lr=float("inf")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range(label):
    good = pictures()
    labels = good.train.labels.clone()
    labels[3] = label
    with pytest.raises(ValueError, match=f"train: picture 3 has the label {label}, expected 0 to 3"):
        Data("x", "x", good.classes, 32, Split(labels, good.train.pictures), good.val)


def test_mistakes_in_options(capsys, tmp_path, monkeypatch):
    assert "no network 'resnet'" in fails(capsys, "--model", "resnet")
    assert "takes no --width-mult" in fails(capsys, "--model", "shufflenet_v2_x0_5", "--width-mult", "0.5")
    assert "width_mult: expected" in fails(capsys, "--width-mult", "-1", "--out", tmp_path)
    assert "--batch-size" in fails(capsys, "--batch-size", "1")
    assert "--lr" in fails(capsys, "--lr", "0")
    assert "no such folder" in fails(capsys, "--data", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "cannot write to" in fails(capsys, "--out", tmp_path / "file")
    for rank, size in (("2", "2"), ("one", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert "RANK is" in fails(capsys)


def test_mistakes_in_folders(capsys, folder, tmp_path):
    options = ["--data", folder, "--resolution", "32", "--out", tmp_path / "out", "--model", "mobilenet_v1_x0_25"]
    (folder / "train" / "cat" / "1.png").write_bytes(b"no picture")
    assert "1.png is not a picture that Pillow can read" in fails(capsys, *options)
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    assert "wolf: train has no class of this name" in fails(capsys, *options)
    (folder / "val" / "empty").mkdir()
    assert "empty" in fails(capsys, *options)
    (folder / "train").rename(folder / "training")
    assert "train: no such folder" in fails(capsys, *options)


def test_packages_that_are_missing(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "needs the torchvision of this torch" in fails(capsys, "--data", folder)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'fastblocks[train]'" in fails(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "the picture of the curves needs matplotlib" in fails(capsys)


def test_two_runs_in_one_folder(tmp_path):
    with checkpoints.owned(tmp_path), pytest.raises(UserError, match="another run is writing to"):
        run(tmp_path)
    run(tmp_path, with_(epochs=1))
