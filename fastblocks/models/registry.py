"""The networks by name."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register(function: Builder) -> Builder:
    """Make a function known to `create` under its own name."""
    _MODELS[function.__name__] = function
    return function


def list() -> builtins.list[str]:
    """The names that `create` takes, in alphabetical order.

    Example:
        >>> import fastblocks
        >>> "mobilenet_v2" in fastblocks.models.list()
        True
    """
    return sorted(_MODELS)


def create(name: str, num_classes: int = 1000, weights: Any = None, **options: Any) -> nn.Module:
    """Build a network by its name.

    Args:
        name: one of `list()`.
        num_classes: outputs of the classifier.
        weights: None, ``"imagenet"``, or the path of a ``.pth`` or ``.safetensors`` file.
        **options: further arguments of the network's own function.

    Raises:
        ValueError: no network has this name.

    Example:
        >>> import fastblocks
        >>> fastblocks.models.create("mobilenet_v2", num_classes=10).classifier[1].out_features
        10
    """
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(list())}, got {name!r}")
    return _MODELS[name](num_classes=num_classes, weights=weights, **options)
