"""All networks: the papers' counts, outputs of plain torch networks, names, widths, chains."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as tF
from one_step import error
from plain_networks import Plain, close, lively, plainly
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastblocks
from fastblocks import models

native = pytest.mark.skipif(fastblocks.current_backend() != "native", reason="chains belong to the native tier")

# parameters (of ShuffleNet without the classifier's bias) and millions of multiply-adds
VARIANTS = {
    "mobilenet_v1": (4_231_976, 568.74),
    "mobilenet_v1_x0_75": (2_585_560, 325.40),
    "mobilenet_v1_x0_5": (1_331_592, 149.50),
    "mobilenet_v1_x0_25": (470_072, 41.03),
    "mobilenet_v2": (3_504_872, 300.77),
    "mobilenet_v2_x0_75": (2_636_424, 209.07),
    "mobilenet_v2_x1_4": (6_108_776, 582.20),
    "shufflenet_v1_g1": (1_530_936, 143.08),
    "shufflenet_v1_g2": (1_732_848, 140.84),
    "shufflenet_v1_g3": (1_864_728, 137.46),
    "shufflenet_v1_g4": (1_967_344, 134.34),
    "shufflenet_v1_g8": (2_433_768, 138.37),
    "shufflenet_v1_g3_x0_5": (717_324, 37.59),
    "shufflenet_v1_g8_x0_5": (1_010_448, 40.47),
    "shufflenet_v1_g3_x1_5": (3_441_168, 292.44),
    "shufflenet_v1_g3_x2_0": (5_449_776, 524.05),
    "shufflenet_v2_x0_5": (1_366_792, 40.48),
    "shufflenet_v2_x1_0": (2_278_604, 144.91),
    "shufflenet_v2_x1_5": (3_503_624, 295.76),
    "shufflenet_v2_x2_0": (7_393_996, 583.25),
}
FAMILIES = ["mobilenet_v1_x0_25", "mobilenet_v2_x0_75", "shufflenet_v1_g3_x0_5", "shufflenet_v2_x0_5"]


# -------------------------------------------------------------------------------------------------------- what they are


def test_names() -> None:
    assert models.list() == sorted(VARIANTS)
    for name in models.list():
        assert callable(getattr(models, name))
    with pytest.raises(
        ValueError, match=r"^name: expected one of mobilenet_v1, .*, shufflenet_v2_x2_0, got 'resnet50'"
    ):
        models.create("resnet50")


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiply_adds(name: str) -> None:
    parameters, million = VARIANTS[name]
    options = {"fc_bias": False} if name.startswith("shufflenet_v1") else {}
    with torch.device("meta"):
        model = models.create(name, **options).eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
        assert round(counter.get_total_flops() / 2e6, 2) == million
        if options:
            assert sum(p.numel() for p in models.create(name).parameters()) == parameters + 1000


@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_that_of_a_plain_network(tier: str, name: str) -> None:
    model = lively(models.create(name, num_classes=50))
    for nchw in (torch.randn(2, 3, 64, 64), torch.randn(1, 3, 97, 33)):
        want = plainly(name, model, nchw)
        for x in (nchw, nchw.contiguous(memory_format=torch.channels_last)):
            with torch.no_grad():
                for _ in range(3):  # with all checks, from the call sites, as one chain
                    close(model(x), want)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "shufflenet_v1_g3", "shufflenet_v2_x1_0"])
def test_output_at_full_size(backend: str, name: str) -> None:
    model, x = models.create(name).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = plainly(name, model, x)
        for _ in range(3):
            close(model(x), want)
        with FlopCounterMode(display=False) as counter:
            model(x)
    assert round(counter.get_total_flops() / 2e6, 2) == VARIANTS[name][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_fuses(name: str, fused: list[str]) -> None:
    """In eval mode a network is its layers' ops and nothing besides."""
    ops = {
        "mobilenet_v1": ["conv_bn_act", *["depthwise_separable"] * 13],
        "mobilenet_v2": ["conv_bn_act", *["inverted_residual"] * 17, "pointwise_conv_bn_act"],
        "shufflenet_v1": ["conv_bn_act", "max_pool2d", *["shuffle_unit"] * 16],
        "shufflenet_v2": ["conv_bn_act", "max_pool2d", *["shuffle_unit_v2"] * 16, "pointwise_conv_bn_act"],
    }
    model = lively(models.create(name, num_classes=5))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert fused == [*ops["_".join(name.split("_")[:2])], "global_avg_pool", "linear"]


@pytest.mark.parametrize("name", ["x0_5", "x1_0", "x1_5", "x2_0"])
def test_shufflenet_v2_is_torchvisions(backend: str, name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is what the networks are compared with")
    theirs = lively(getattr(torchvision.models, f"shufflenet_v2_{name}")(num_classes=20))
    ours = models.create(f"shufflenet_v2_{name}", num_classes=20).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            close(ours(x), theirs(x))


def test_activation_of_mobilenet() -> None:
    x = 20 * torch.randn(1, 3, 64, 64)
    outputs = []
    for activation, function in (("relu6", tF.relu6), ("relu", torch.relu)):
        torch.manual_seed(0)
        model = lively(models.mobilenet_v1(0.25, num_classes=5, activation=activation))
        with torch.no_grad():
            outputs.append(model(x))
            close(outputs[-1], Plain(model.state_dict()).mobilenet_v1(x.double(), function))
    assert not torch.allclose(*outputs, rtol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_channels_last_and_seeded(name: str) -> None:
    torch.manual_seed(3)
    model = models.create(name)
    torch.manual_seed(3)
    assert all(map(torch.equal, model.parameters(), models.create(name).parameters())) and model.training
    for key, p in model.named_parameters():
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=torch.channels_last) and p.stride(1) == 1, key
            assert p.stride(3) == p.shape[1], key
    x = torch.randn(1, 3, 32, 32)
    first = next(iter(model.eval().children()))
    assert first(x).is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------------- how they run


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_in_eval_mode(backend: str, name: str) -> None:
    model = lively(models.create(name, num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    truth = Plain(model.state_dict())
    wanted = {k: truth.tensors[k].requires_grad_() for k, _ in model.named_parameters()}
    groups = (3,) if "_g3" in name else ()
    getattr(truth, "_".join(name.split("_")[:2]))(x.double(), *groups).pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    for key, p in model.named_parameters():
        expected = wanted[key].grad
        # a rounding may take a value over the edge of an activation
        assert (p.grad - expected).norm() <= 1e-2 * expected.norm() + 1e-6, key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_is_that_of_the_children(backend: str, name: str) -> None:
    """Statistics and new weights with this package's layers and with torch alone: as near to float64."""
    first = models.create(name, num_classes=10)
    for module in first.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # draws other numbers in float64
    second, truth = copy.deepcopy(first), copy.deepcopy(first).double()
    x, target = torch.randn(4, 3, 64, 64), torch.tensor([1, 2, 3, 4])
    for model, tier in ((first, fastblocks.current_backend()), (second, "reference"), (truth, "reference")):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with fastblocks.use_backend(tier):
            tF.cross_entropy(model(x.to(next(model.parameters()).dtype)), target).backward()
        optimizer.step()
    for (key, p), q, true in zip(
        first.state_dict().items(), second.state_dict().values(), truth.state_dict().values(), strict=True
    ):
        if true.is_floating_point():
            assert error(p, true, 1.0) <= max(1e-4, 3 * error(q, true, 1.0)), key
        else:
            assert torch.equal(p, true), key


@pytest.mark.parametrize("name", FAMILIES)
def test_tracers_and_copies(backend: str, name: str) -> None:
    """fx, jit.trace, deepcopy and pickle of a whole network that was used."""
    model, x = lively(models.create(name, num_classes=5)), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        for _ in range(3):
            want = model(x)
        for other in (
            torch.fx.symbolic_trace(model),
            torch.jit.trace(model, (x,), check_trace=False),  # the outputs are compared below
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
        ):
            for _ in range(2):
                close(other(x), want)


@native
@pytest.mark.parametrize("name", FAMILIES[2:])
def test_the_trunk_is_one_chain(name: str) -> None:
    """Stem, pooling and stages, as long as nobody looks in."""
    model, x = lively(models.create(name, num_classes=5)), torch.randn(2, 3, 64, 64)
    seen: list[int] = []

    def chained() -> bool:
        """Whether the remembered chain takes the input."""
        with torch.no_grad():
            return model._network(x) is not None

    def calls() -> Tensor:
        with torch.no_grad():
            for _ in range(3):
                y: Tensor = model(x)
                close(y, plainly(name, model, x))
        return y

    calls()
    assert chained()
    for path in ("maxpool", "stage3", "stage3.2", "stage3.2.depthwise.1" if "v1" in name else "stage3.2.branch2.3"):
        seen.clear()
        handle = model.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
        calls()
        assert seen == [1, 1, 1] and not chained(), path
        handle.remove()
        calls()
        assert chained()
    # a child exchanged, at every depth
    model.maxpool = nn.MaxPool2d(3, 2, 1)
    calls()
    assert not chained()
    model.maxpool = fastblocks.MaxPool2d(3, 2, 1)
    calls()
    assert chained()
    model.stage4[1] = copy.deepcopy(model.stage4[2])
    calls()
    model.stage3 = copy.deepcopy(model.stage3)
    with torch.no_grad():
        next(model.stage3.parameters()).mul_(2)
    calls()
    assert chained()
    model.stage2.forward = lambda y: (seen.append(2), type(model.stage2).forward(model.stage2, y))[1]
    seen.clear()
    calls()
    assert seen == [2, 2, 2] and not chained()
    del model.stage2.forward
    model.stage2 = nn.Sequential(*model.stage2)
    calls()
    assert not chained()


def test_several_networks_share_nothing(backend: str) -> None:
    x = torch.randn(1, 3, 64, 64)
    nets = [lively(models.create(name, num_classes=n)) for n, name in enumerate(FAMILIES * 2, 3)]
    with torch.no_grad():
        first = [net(x) for net in nets]
        for _ in range(2):
            for net, y in zip(nets, first, strict=True):
                torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (
            r"width_mult: expected a quarter .* groups = 2, got 0\.5: .* 100 / 4 = 25 is not",
            lambda: models.shufflenet_v1(2, 0.5),
        ),
        (r"width_mult: .* groups = 4, got 0\.5: .* 136 / 4 = 34 is not", lambda: models.shufflenet_v1(4, 0.5)),
        (r"width_mult: .* whole number .*got 0\.33", lambda: models.shufflenet_v1(3, 0.33)),
        (r"width_mult: expected a number above 0 and up to 100, got 0", lambda: models.shufflenet_v1(3, 0)),
        (r"groups: expected a positive int, got 0", lambda: models.shufflenet_v1(0)),
        (r"groups: expected one of 1, 2, 3, 4, 8, got 5", lambda: models.shufflenet_v1(5)),
        (r"groups: expected an int, got float 3\.0", lambda: models.shufflenet_v1(3.0)),
        (r"shuffle: expected 'gn' or 'ng', got 'nn'", lambda: models.shufflenet_v1(3, shuffle="nn")),
        (r"num_classes: expected a positive int, got 0", lambda: models.shufflenet_v1_g3(0)),
        (r"weights: expected None, a name or a path, got int", lambda: models.shufflenet_v1_g3(weights=1)),
        (r"width_mult: expected a number above 0", lambda: models.mobilenet_v1(-1)),
        (r"width_mult: expected a number, got str '1'", lambda: models.mobilenet_v1("1")),
        (r"activation: expected 'relu6' or 'relu', got 'gelu'", lambda: models.mobilenet_v1(activation="gelu")),
        (r"num_classes: expected a positive int, got -1", lambda: models.mobilenet_v1(num_classes=-1)),
        (r"weights: expected None, a name or a path, got float", lambda: models.mobilenet_v1(weights=1.0)),
        (r"depth_mult: expected a number above 0", lambda: models.mobilenet_v2(depth_mult=0)),
        (r"num_classes: expected a positive int, got 0", lambda: models.shufflenet_v2_x0_5(0)),
        (r"widths: expected even numbers, .*got \(48, 97, 192\)", lambda: models.ShuffleNetV2((48, 97, 192))),
        (r"widths: expected 3 numbers of channels, got \(48,\)", lambda: models.ShuffleNetV2((48,))),
    ],
)
def test_networks_refuse_arguments(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()
