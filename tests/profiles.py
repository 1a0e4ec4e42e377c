"""What the tests of `fastblocks profile` share: networks of a user's own."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

OWN = """
    import torch, fastblocks
    from torch import nn

    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 4, 1), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 2:
                raise ValueError("enough\\nof this")
            return self.conv(x)

    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*(nn.Sequential(Pair(), Pair()) for _ in range(2)))

        def forward(self, x):
            return self.net(x).softmax(1)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, x):
            x += 1  # in place
            return self.b(self.a(x).relu())

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.more = nn.ModuleList([self.conv, nn.Conv2d(3, 3, 1)])
            self.extra, self.unused = nn.Parameter(torch.ones(1)), nn.Linear(5, 5)

        def forward(self, x):
            return self.more[1](self.more[0](self.conv(x))) * self.extra

    def fused():
        return nn.Sequential(
            fastblocks.Sequential(fastblocks.ConvBNAct(3, 16, stride=2), fastblocks.InvertedResidual(16, 16)),
            nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.Flatten(1), nn.Dropout(), nn.LazyLinear(5),
        )

    def dropping():
        return nn.Sequential(fastblocks.ConvBNAct(3, 16), Dropping())

    class Dropping(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x)

    def raises():
        raise RuntimeError("bad\\nluck")

    def number():
        return 3

    value = 3
"""


def own_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's in the current directory; its name."""
    (folder / "own_networks.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(folder)
    yield "own_networks"
    sys.modules.pop("own_networks", None)
