"""`fastblocks info`: what runs here, on what, and why."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import torch

import fastblocks
from fastblocks.bench.machine import cpu_name
from fastblocks.models.weights import IMAGENET, cached_path

__all__ = ["collect"]


def collect() -> dict[str, Any]:
    """Versions, machine, backend and the state of the weights' cache, as plain strings and numbers."""
    return {
        "fastblocks": fastblocks.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "backend": fastblocks.backend_info(),
        "weights": {name: {"path": str(cached_path(name)), "cached": cached_path(name).exists()} for name in IMAGENET},
    }
