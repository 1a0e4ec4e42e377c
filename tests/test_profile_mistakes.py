"""`fastblocks profile`: every mistake is one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from profiles import own_module

from fastblocks import cli
from fastblocks.bench.profile import loading


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from own_module(tmp_path, monkeypatch)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, expect exit code 2 and one line; return the line."""
    assert cli.main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastblocks: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("mobilnet_v2", "none has this name; close to it: mobilenet_v2"),
        ("torchvision/mobilenet_v9", "MODEL 'torchvision/mobilenet_v9': expected a name"),
        ("somewhere/net", "expected torchvision/NAME or timm/NAME before a slash"),
        ("no_such_module:build", "importing no_such_module failed: ModuleNotFoundError"),
        (":build", "expected module:callable"),
        ("own_networks:nothing", "own_networks has no nothing"),
        ("own_networks:value", "value is a int, expected a callable"),
        ("own_networks:number", "number() gave a int, expected a torch.nn.Module"),
        ("own_networks:raises", "raises() failed: RuntimeError: bad"),
        (
            "own_networks:Two",
            "failed on one float32 image tensor (1, 3, 224, 224), which is what it was given: TypeError",
        ),
        ("own_networks:Forgetful", "it ran once, but not again: ValueError: enough"),
    ],
)
def test_a_wrong_model_is_one_line(own: str, model: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    line = fails(capsys, model, "--rounds", "1")
    assert says in line and f"MODEL {model!r}" in line


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert "torchvision is not installed; timm is not installed" in fails(capsys, "resnet18")
    assert "timm is not installed (pip install timm)" in fails(capsys, "timm/resnet18")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--size", "big"), "'big': expected pixels of a side"),
        (("--size", "0"), "expected pixels of a side"),
        (("--size", "32x0"), "expected pixels of a side"),
        (("--batch", "0"), "--batch"),
        (("--rounds", "0", "--plot", "a.png"), "expected --rounds above 0"),
        (("--plot", "a.svg"), "expected a file name that ends in .png"),
        (
            ("--html", "own_networks.py/a.html"),
            "--html: expected a folder that can be written to, got 'own_networks.py'",
        ),
        (("--html", "."), "--html"),
    ],
)
def test_a_wrong_option_is_one_line(
    own: str, options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(capsys, "mobilenet_v2", *options)


def test_a_picture_too_small_for_the_network_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert "failed on one float32 image tensor (1, 3, 8, 8)" in fails(capsys, "alexnet", "--size", "8")


def test_a_disk_that_is_full_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastblocks.bench.files.replace_text", full)
    page = str(tmp_path / "a.html")
    assert cli.main(["profile", "shufflenet_v2_x0_5", "--size", "32", "--rounds", "0", "--html", page]) == 2
    assert capsys.readouterr().err == f"fastblocks: --html: cannot write to {page!r}: No space left on device\n"
