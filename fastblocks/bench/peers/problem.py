"""What the contenders are given: one network with random weights, an input, and what torch makes of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastblocks
from fastblocks.analysis import count
from fastblocks.analysis.cost import total
from fastblocks.bench.stock import stock_model

__all__ = ["RESOLUTION", "cost", "write_problem"]

RESOLUTION = 224


def write_problem(name: str, batch: int, reads: set[str], folder: Path) -> dict[str, str]:
    """Fill a folder for the workers.

    Args:
        name: a network of `fastblocks.models.list`.
        batch: images in the input.
        reads: of "weights", "onnx" and "torchscript", what the contenders start from.
        folder: it gets ``about.json``, ``weights.pth``, ``x.npy`` (N, 3, 224, 224), ``expected.npy`` (N, classes), and
            ``model.onnx`` or ``model.pt`` as asked for.

    Returns:
        Of `reads`, what could not be written, and why.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = fastblocks.models.create(name).eval()
        for module in model.modules():  # statistics of a trained network: every channel alive, none at identity
            if isinstance(module, nn.BatchNorm2d):
                for statistic, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                    assert statistic is not None
                    nn.init.uniform_(statistic, low, high)
        x = torch.randn(batch, 3, RESOLUTION, RESOLUTION)
        plain = stock_model(model.state_dict())
        np.save(folder / "x.npy", x.numpy())
        np.save(folder / "expected.npy", plain(x).numpy())
        torch.save(model.state_dict(), folder / "weights.pth")
        (folder / "about.json").write_text(json.dumps({"model": name, "batch": batch}))
        writers = {"onnx": _write_onnx, "torchscript": _write_torchscript}
        failures = {}
        for kind in sorted(reads & writers.keys()):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # old exporters call themselves old; their formats are current
                    writers[kind](plain, x, folder)
            except Exception as error:  # an exporter's failure, of whatever kind, is its peers' and nobody else's
                failures[kind] = f"export to {kind} failed: {' '.join(str(error).split()) or type(error).__name__}"
    return failures


def _write_onnx(plain: nn.Module, x: torch.Tensor, folder: Path) -> None:
    torch.onnx.export(
        plain, (x,), str(folder / "model.onnx"), dynamo=False, input_names=["x"], opset_version=17, verbose=False
    )


def _write_torchscript(plain: nn.Module, x: torch.Tensor, folder: Path) -> None:
    torch.jit.save(torch.jit.trace(plain, x[:1]), str(folder / "model.pt"))


def cost(name: str) -> dict[str, int]:
    """Multiply-adds of convolutions and classifier for an image, and parameters.

    Example:
        >>> cost("mobilenet_v2")
        {'multiply_adds': 300774272, 'parameters': 3504872}
    """
    model = fastblocks.models.create(name)
    plain = stock_model(model.state_dict()).to("meta")
    return {
        "multiply_adds": total(count(plain, torch.empty(1, 3, RESOLUTION, RESOLUTION, device="meta")))["multiply_adds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
