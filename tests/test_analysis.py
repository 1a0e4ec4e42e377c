"""What networks cost, against fvcore, against sums by hand, and on modules that nobody expected."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as tF
from torch import Tensor, nn

import fastblocks
from fastblocks import models
from fastblocks.analysis import Operator, Rates, advise, attainable, bound, count
from fastblocks.analysis.cost import total
from fastblocks.bench.stock import stock_model

FACTS = {  # parameters, and multiply-adds in millions; ShuffleNet's without a classifier bias
    "mobilenet_v1": (4231976, 568.74),
    "mobilenet_v1_x0_75": (2585560, 325.40),
    "mobilenet_v1_x0_5": (1331592, 149.50),
    "mobilenet_v1_x0_25": (470072, 41.03),
    "mobilenet_v2_x0_75": (2636424, 209.07),
    "mobilenet_v2": (3504872, 300.77),
    "mobilenet_v2_x1_4": (6108776, 582.20),
    "shufflenet_v1_g1": (1530936, 143.08),
    "shufflenet_v1_g2": (1732848, 140.84),
    "shufflenet_v1_g3": (1864728, 137.46),
    "shufflenet_v1_g4": (1967344, 134.34),
    "shufflenet_v1_g8": (2433768, 138.37),
    "shufflenet_v1_g3_x0_5": (717324, 37.59),
    "shufflenet_v1_g8_x0_5": (1010448, 40.47),
    "shufflenet_v1_g3_x1_5": (3441168, 292.44),
    "shufflenet_v1_g3_x2_0": (5449776, 524.05),
    "shufflenet_v2_x0_5": (1366792, 40.48),
    "shufflenet_v2_x1_0": (2278604, 144.91),
    "shufflenet_v2_x1_5": (3503624, 295.76),
    "shufflenet_v2_x2_0": (7393996, 583.25),
}

PRODUCTS = ("conv", "linear", "addmm", "matmul", "bmm")  # fvcore's names; it counts a multiply-add as one


def other(package: str, name: str) -> nn.Module:
    """A network of torchvision or timm with random weights."""
    if package == "torchvision":
        return pytest.importorskip("torchvision").models.get_model(name, weights=None).eval()
    return pytest.importorskip("timm").create_model(name, pretrained=False).eval()


def madds(operators: list[Operator]) -> int:
    return total(operators)["multiply_adds"]


# ------------------------------------------------------------------------------------------------------ multiply-adds


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("torchvision", "mobilenet_v2"),
        ("torchvision", "shufflenet_v2_x1_0"),
        ("torchvision", "mnasnet1_0"),
        ("torchvision", "mobilenet_v3_small"),
        ("torchvision", "resnet18"),
        ("timm", "efficientnet_lite0"),
        ("timm", "ghostnet_100"),
        ("timm", "efficientnet_b0"),
    ],
)
def test_multiply_adds_are_those_that_fvcore_counts(package: str, name: str) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    model, x = other(package, name), torch.zeros(1, 3, 224, 224)
    analysis = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    assert madds(count(model, x)) == sum(counts[product] for product in PRODUCTS) > 0


@pytest.mark.parametrize("name", FACTS)
def test_our_networks_cost_what_the_papers_say(name: str) -> None:
    options = {"fc_bias": False} if name.startswith("shufflenet_v1") else {}
    model = models.create(name, **options).eval()
    operators = count(stock_model(model.state_dict()), torch.zeros(1, 3, 224, 224))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, round(madds(operators) / 1e6, 2)) == FACTS[name]


def test_fused_layers_are_counted_by_their_children() -> None:
    model, x = models.create("mobilenet_v2").eval(), torch.zeros(1, 3, 64, 64)
    ours, plain = count(model, x), count(stock_model(model.state_dict()), x)
    assert [operator.multiply_adds for operator in ours if operator.multiply_adds] == [
        operator.multiply_adds for operator in plain if operator.multiply_adds
    ]
    assert {operator.module for operator in ours if operator.multiply_adds} >= {"features.1.conv.1", "classifier.1"}


def test_attention_counts_both_of_its_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return tF.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, :5])

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(torch.matmul(x, x[:, :, :5].mT).softmax(-1), x[:, :, :5])

    x = torch.randn(2, 3, 7, 8)
    assert madds(count(Attention(), x)) == madds(count(ByHand(), x)) == 2 * 3 * 7 * 5 * 8 * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_linear_layer_in_either_mode(mode: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            with mode():
                return self.linear(x)

    (operator,) = count(Inside(), torch.ones(3, 6))
    assert (operator.multiply_adds, operator.module, operator.weights) == (3 * 6 * 4, "linear", 4 * (24 + 4))
    assert operator.product is not None
    assert operator.product[:5] == (6, 4, 1, 1, 3)


@pytest.mark.parametrize(
    ("conv", "madds_expected", "product"),
    [
        (nn.Conv2d(8, 12, 3, 2, 1, groups=4), 12 * 4 * 4 * 9 * 2, (8, 12, 4, 9, 16, 4)),
        (nn.ConvTranspose2d(8, 12, 2, 2, groups=4), 8 * 8 * 8 * 4 * 3, (8, 12, 4, 4, 64, 4)),
        (nn.Conv1d(8, 12, 1), 12 * 8 * 8, (8, 12, 1, 1, 8, 4)),
    ],
)
def test_the_sizes_of_convolutions(conv: nn.Module, madds_expected: int, product: tuple[int, ...]) -> None:
    x = torch.ones(1, 8, 8) if isinstance(conv, nn.Conv1d) else torch.ones(1, 8, 8, 8)
    (operator,) = count(conv, x)
    assert (operator.multiply_adds, operator.product) == (madds_expected, product)


# -------------------------------------------------------------------------------------------------------------- bytes


def run(function: Callable[[Tensor], Any], *size: int) -> list[Operator]:
    class Runs(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    return count(Runs(), torch.ones(size))


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (torch.relu, 96, 96),
        (torch.relu_, 96, 96),
        (lambda x: x + x, 96, 96),
        (lambda x: x + x.new_empty(1, 4, 1, 1), 96 + 16, 96),
        (lambda x: x + x[:, :1].expand(1, 4, 2, 3), 96 + 24, 96),
        (lambda x: x.copy_(x.new_empty(())), 4, 96),
        (lambda x: torch.relu(x[:, ::2]), 48, 48),
        (lambda x: torch.cat((x, x[:, :2]), 1), 96 + 48, 144),
        (lambda x: x.sum(), 96, 4),
        (lambda x: torch.add(x, 1, out=torch.empty_like(x)), 96, 96),
    ],
)
def test_bytes_read_and_written(function: Callable[[Tensor], Any], read: int, written: int) -> None:
    operators = run(function, 1, 4, 2, 3)
    assert sum(operator.read for operator in operators) == read
    assert sum(operator.written for operator in operators) == written


def test_views_move_nothing() -> None:
    assert run(lambda x: x.view(4, 6).chunk(2)[0].t().mT.flatten().reshape(3, 4)[1:].contiguous(), 1, 4, 2, 3) == []


def test_weights_are_told_from_activations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    conv, norm = count(model, torch.ones(2, 3, 6, 6))
    assert (conv.weights, conv.read, conv.written) == (4 * (8 * 27 + 8), 4 * 2 * 3 * 36, 4 * 2 * 8 * 16)
    assert (norm.weights, norm.read, norm.kind) == (4 * 4 * 8, 4 * 2 * 8 * 16, "element-wise")


def test_kinds() -> None:
    kinds = {operator.name: operator.kind for operator in run(
        lambda x: tF.hardswish(tF.max_pool2d(torch.cat((x, x.clone()), 1), 2)).mean(), 1, 4, 2, 4
    )}  # fmt: skip
    assert kinds == {
        "clone": "copy", "cat": "copy", "max_pool2d_with_indices": "other", "hardswish": "element-wise", "mean": "other"
    }  # fmt: skip


def test_memory_in_use_is_that_of_what_is_still_needed() -> None:
    """The input is held for the sum, what the first ReLU made is gone when the second has run."""
    operators = run(lambda x: torch.relu(torch.sigmoid(torch.relu(x))) + x, 1, 4, 2, 3)
    assert [operator.live // 96 for operator in operators] == [2, 3, 3, 3]
    assert [operator.live // 96 for operator in run(lambda x: torch.relu_(torch.relu(x)), 1, 4, 2, 3)] == [2, 2]


# -------------------------------------------------------------------------------------------------------- odd modules


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x


class Names(nn.Module):
    """Takes keywords, gives a dictionary of nested things."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0, *, flag: object = None) -> dict[str, Any]:
        return {"a": self.a(x) * scale, "b": (self.b(x), [x, None, 3])}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.circular = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.names = Names()
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.embedding = nn.Embedding(10, 8)
        self.never = nn.Linear(3, 3)
        self.lazy = nn.LazyConv2d(8, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, but users have such modules
            self.script = torch.jit.trace(nn.Conv2d(8, 8, 1).eval(), torch.ones(1, 8, 4, 4))

    def forward(self, x: Tensor) -> Any:
        x = self.circular(x)
        x = torch.relu_(x)
        x += 1
        named = self.names(x, 2.0, flag=True)
        x = self.names(named["a"] + named["b"][0])["a"]  # called twice
        x = self.script(self.lazy(self.normed(Square.apply(x))))
        rows = x.flatten(2).transpose(1, 2)[:, :16]
        y, _ = self.recurrent(rows)
        y = y @ self.matrix + self.embedding(torch.zeros(1, 1, dtype=torch.long))
        y, _ = self.attention(y, y, y)
        sparse = torch.sparse.mm(torch.eye(8).to_sparse(), self.matrix)
        return torch.fft.fft2(x).real.sum(), {"rows": y, "sparse": sparse}


def test_whatever_a_module_does_it_is_counted() -> None:
    operators = count(Odd().eval(), torch.randn(1, 3, 8, 8))
    by_module = {operator.module: 0 for operator in operators}
    for operator in operators:
        by_module[operator.module] += operator.multiply_adds
    assert by_module["circular"] == 8 * 3 * 9 * 64
    assert by_module["names.a"] == 2 * 8 * 8 * 64  # of two calls
    assert by_module["names.b"] == 2 * 8 * 8 * 9 * 64
    assert "never" not in by_module
    assert by_module[""] >= 8 * 8 * 64  # the traced module takes no hooks: its owner has its costs
    assert {"mkldnn_rnn_layer", "lstm"} & {operator.name for operator in operators if operator.kind == "uncounted"}


def test_what_a_module_raises_is_raised_and_leaves_no_hook() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("in here")

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.conv = Fails(), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(LookupError):
                self.fails(x)
            return torch.relu(self.conv(x))

    model, x = Catches(), torch.ones(1, 1, 2, 2)
    assert [operator.module for operator in count(model, x)] == ["conv", ""]
    with pytest.raises(LookupError, match="in here"):
        count(model.fails, x)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------- the roofline, the guidelines


def test_the_roofline_is_the_lower_of_two_limits() -> None:
    assert attainable(0.5, 100, 20) == 10
    assert attainable(5, 100, 20) == attainable(50, 100, 20) == 100
    for multiply_adds, moved in ((10**9, 10**9), (10**9, 10**7)):
        seconds, by = bound(multiply_adds, moved, 100, 20)
        assert 2e-9 * multiply_adds / seconds == pytest.approx(attainable(2 * multiply_adds / moved, 100, 20))
        assert by == ("memory" if moved == 10**9 else "arithmetic")


RATES = Rates(bytes_per_second=1e9, product_call=1e-3)


def advice(guideline: str, **blocks: nn.Module) -> Any:
    """What one guideline says of these blocks, each run on 8 x 8 pixels; None if nothing."""
    operators = {}
    for name, block in blocks.items():
        conv: Any = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
        counted = count(block.eval(), torch.ones(2, conv.in_channels, 8, 8))
        operators[name] = [operator._replace(seconds=0.25) for operator in counted]
    return next((found for found in advise(operators, RATES) if found.guideline == guideline), None)


def moved(block: nn.Module, channels: int) -> int:
    return total(count(block.eval(), torch.ones(2, channels, 8, 8)))["moved"]


@pytest.mark.parametrize(("inputs", "outputs", "equal"), [(16, 64, 32), (64, 16, 32), (8, 72, 24)])
def test_g1_costs_what_equal_widths_would_save(inputs: int, outputs: int, equal: int) -> None:
    uneven, even = nn.Conv2d(inputs, outputs, 1, bias=False), nn.Conv2d(equal, equal, 1, bias=False)
    found = advice("G1", even=even, uneven=uneven)
    extra = moved(uneven, inputs) - moved(even, equal)
    assert found.blocks == ("uneven",) and found.examples == (f"{inputs} to {outputs}",)
    assert found.extra_bytes == extra > 0
    assert found.seconds == pytest.approx(extra / 1e9)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_g2_costs_what_one_group_would_save(groups: int) -> None:
    """As in the paper, the same multiply-adds from the same input: g times as many output channels."""
    grouped = nn.Conv2d(32, 32 * groups, 1, groups=groups, bias=False)
    one = nn.Conv2d(32, 32, 1, bias=False)
    found = advice("G2", one=one, grouped=grouped, depthwise=nn.Conv2d(32, 32, 3, groups=32))
    assert madds(count(grouped, torch.ones(2, 32, 8, 8))) == madds(count(one, torch.ones(2, 32, 8, 8)))
    assert found.blocks == ("grouped",)
    assert found.extra_bytes == moved(grouped, 32) - moved(one, 32) > 0


def test_g3_counts_convolutions_beyond_the_first() -> None:
    def row(length: int) -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(length)))

    found = advice("G3", one=row(1), four=row(4), two=row(2))
    assert found.blocks == ("four", "two")
    assert (found.extra_calls, found.seconds) == (4, pytest.approx(4e-3))


def test_g4_sums_measured_times() -> None:
    plain, more = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    found = advice("G4", plain=plain, more=more)
    assert (found.blocks, found.extra_calls, found.seconds) == (("more",), 2, 0.5)
    assert found.extra_bytes == moved(more, 4) - moved(plain, 4)


def test_advice_begins_with_what_costs_most_and_is_silent_where_nothing_is_wrong() -> None:
    block = fastblocks.InvertedResidual(16, 16).eval()
    operators = {"block": count(block, torch.ones(1, 16, 8, 8))}
    seconds = [found.seconds for found in advise(operators, RATES)]
    assert len(seconds) == 3 and seconds == sorted(seconds, key=lambda s: -(s or 0))
    assert {found.seconds for found in advise(operators)} == {None}
    assert advise({"conv": count(nn.Conv2d(4, 4, 1), torch.ones(1, 4, 8, 8))}, RATES) == []
