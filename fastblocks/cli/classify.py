"""`fastblocks classify`: photographs to labels, with fastblocks and with stock torch, as one plain dictionary."""

from __future__ import annotations

import functools
import math
import statistics
import sys
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastblocks
from fastblocks.bench.machine import cpu_name
from fastblocks.bench.stock import stock_model
from fastblocks.bench.timing import AGREEMENT, difference, interleaved, speed_up
from fastblocks.cli.errors import Disagreement, UserError
from fastblocks.cli.photo import Photo, default_photo, preprocess, read_photo
from fastblocks.models.weights import IMAGENET, WeightsError, load_state_dict

__all__ = ["class_names", "classify"]


def classify(
    photos: Sequence[str],
    *,
    model: str = "mobilenet_v2",
    weights: str | None = None,
    threads: int | None = None,
    rounds: int = 30,
    top: int = 5,
) -> dict[str, Any]:
    """Classify the photographs at these paths (none: the default one), and time the first of them.

    The result holds plain numbers and strings, ready for json; `report.print_classification` lays it out. What the user
    can mend is raised as UserError.
    """
    if model not in fastblocks.models.list():
        raise UserError(f"no network {model!r}, expected one of {', '.join(fastblocks.models.list())}")
    pictures = [read_photo(path) for path in photos] or [default_photo()]  # before any download
    if threads is not None:
        torch.set_num_threads(threads)
    network, origin = _build(model, weights)
    with torch.no_grad():
        inputs = [preprocess(picture.image) for picture in pictures]
        logits = [network(x) for x in inputs]
        result: dict[str, Any] = {
            "model": model,
            "weights": origin,
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "backend": fastblocks.backend_info(),
            "photos": [_labels(*pair, top) for pair in zip(pictures, logits, strict=True)],
        }
        result |= _compare(network, inputs, logits, rounds)
    return result


@functools.cache
def class_names() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, in torchvision's order."""
    return tuple((files("fastblocks.cli") / "data" / "imagenet_classes.txt").read_text("utf-8").splitlines())


def _build(name: str, weights: str | None) -> tuple[nn.Module, str]:
    """The network in eval mode, and where its weights are from."""
    if weights is None and name not in IMAGENET:
        print(f"fastblocks: no ImageNet weights for {name}: with random ones the labels mean nothing", file=sys.stderr)
        return fastblocks.models.create(name).eval(), "random"
    try:
        state_dict = load_state_dict(weights or "imagenet", name)
    except (WeightsError, OSError, ValueError) as error:
        raise UserError(str(error)) from error
    matrices = [tensor for tensor in state_dict.values() if tensor.ndim == 2]  # the classifier's is the last
    options = {"fc_bias": "fc.bias" in state_dict} if name.startswith("shufflenet_v1") else {}
    network = fastblocks.models.create(name, num_classes=len(matrices[-1]) if matrices else 1000, **options)
    try:
        network.load_state_dict(state_dict)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[min(1, len(lines) - 1)]  # below torch's heading
        raise UserError(f"{weights} does not fit {name}: {textwrap.shorten(reason, 160)}") from error
    return network.eval(), Path(weights).name if weights else "ImageNet"


def _labels(photo: Photo, logits: Tensor, top: int) -> dict[str, Any]:
    classes = logits.shape[1]
    names = class_names() if classes == len(class_names()) else [f"class {index}" for index in range(classes)]
    best = logits[0].softmax(0).topk(min(top, classes))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    labels = [{"label": names[index], "index": index, "probability": probability} for index, probability in rows]
    return {"photo": photo.title, "size": photo.image.size, "labels": labels}


def _compare(network: nn.Module, inputs: list[Tensor], logits: list[Tensor], rounds: int) -> dict[str, Any]:
    """Check the logits against stock torch's, then time the three on the first picture."""
    weights = network.state_dict()
    eager, channels_last = stock_model(weights), stock_model(weights, torch.channels_last)
    expected = [eager(x) for x in inputs]
    worst = max(map(difference, logits, expected), key=lambda off: (math.isnan(off), off))
    if not worst <= AGREEMENT:
        raise Disagreement(
            f"{worst:.1e} of the largest logit lies between fastblocks and torch, allowed is {AGREEMENT:.0e}"
        )
    result: dict[str, Any] = {"largest_difference": worst, "timing": None}
    if rounds:
        x = inputs[0]
        x_channels_last = x.to(memory_format=torch.channels_last)
        runners = {
            "torch eager": lambda: eager(x),
            "torch channels_last": lambda: channels_last(x_channels_last),
            "fastblocks": lambda: network(x),
        }
        seconds = interleaved(runners, rounds)
        rows = [
            {
                "name": name,
                "milliseconds": 1e3 * statistics.median(times),
                "fastblocks_speed_up": speed_up(times, seconds["fastblocks"]),
            }
            for name, times in seconds.items()
        ]
        result["timing"] = {"rounds": rounds, "batch": 1, "rows": rows}
    return result
