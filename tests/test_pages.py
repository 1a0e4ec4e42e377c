"""The pages in docs/ of the four networks: their figures, their examples, and the tests that they point to."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import test_claims
from counting import channels_last, traffic
from torch import nn

import fastblocks
from fastblocks import models

DOCS = Path(__file__).parent.parent / "docs"

Build = Callable[[], nn.Module]

PAGES: dict[str, dict[str, tuple[Build, int, int]]] = {
    "mobilenet": {
        "32 to 64, 112x112": (lambda: fastblocks.DepthwiseSeparableConv(32, 64), 32, 112),
        "64 to 128, 112x112, stride 2": (lambda: fastblocks.DepthwiseSeparableConv(64, 128, 2), 64, 112),
        "512 to 512, 14x14": (lambda: fastblocks.DepthwiseSeparableConv(512, 512), 512, 14),
        "the whole network": (lambda: models.create("mobilenet_v1"), 3, 224),
    },
    "mobilenet_v2": {
        "16-96-24, 112x112, stride 2": (lambda: fastblocks.InvertedResidual(16, 24, 2, 6), 16, 112),
        "24-144-24, 56x56": (lambda: fastblocks.InvertedResidual(24, 24, 1, 6), 24, 56),
        "96-576-96, 14x14": (lambda: fastblocks.InvertedResidual(96, 96, 1, 6), 96, 14),
        "the whole network": (lambda: models.create("mobilenet_v2"), 3, 224),
    },
    "shufflenet": {
        "240 to 240, 28x28": (lambda: fastblocks.ShuffleUnit(240, 240, 1, 3), 240, 28),
        "240 to 480, 28x28, stride 2": (lambda: fastblocks.ShuffleUnit(240, 480, 2, 3), 240, 28),
        "960 to 960, 7x7": (lambda: fastblocks.ShuffleUnit(960, 960, 1, 3), 960, 7),
        "the whole network": (lambda: models.create("shufflenet_v1_g3"), 3, 224),
    },
    "shufflenet_v2": {
        "116 to 116, 28x28": (lambda: fastblocks.ShuffleUnitV2(116, 116, 1), 116, 28),
        "116 to 232, 28x28, stride 2": (lambda: fastblocks.ShuffleUnitV2(116, 232, 2), 116, 28),
        "464 to 464, 7x7": (lambda: fastblocks.ShuffleUnitV2(464, 464, 1), 464, 7),
        "the whole network": (lambda: models.create("shufflenet_v2_x1_0"), 3, 224),
    },
}


def megabytes(how: str, build: Build, channels: int, size: int) -> str:
    module, x = build().eval(), channels_last(1, channels, size, size)
    return f"{traffic(how, lambda: module(x)).bytes / 1e6:.2f}"


@test_claims.native_only
@pytest.mark.parametrize("page", PAGES)
def test_the_traffic_that_the_page_prints(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    for label, case in PAGES[page].items():
        row = " | ".join([label, *(megabytes(how, *case) for how in ("single", "folded", "fused"))])
        assert f"| {row} |" in text, f"{page}.md should have: | {row} |"


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_that_the_page_prints(page: str) -> None:
    failed, tried = doctest.testfile(str(DOCS / f"{page}.md"), module_relative=False)
    assert failed == 0 and tried > 0


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_the_page_names(page: str) -> None:
    names = re.findall(r"`(test_\w+)`", (DOCS / f"{page}.md").read_text())
    assert names and set(names) <= set(vars(test_claims)) | set(globals())
