"""From what the user typed to a network, and to what fastblocks has beside it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from fastblocks import models
from fastblocks.bench.errors import BenchError
from fastblocks.bench.stock import stock_model

__all__ = ["Subject", "calm", "has_fused_layers", "load", "one_line", "told_of"]

EXPECTED = "a name of fastblocks.models, torchvision or timm, or module:callable"
SIZE = 224


class Subject(NamedTuple):
    """A network to profile, in eval mode with random weights."""

    name: str
    source: str
    """"fastblocks", "torchvision", "timm" or "module:callable"."""
    stock: nn.Module
    """As plain torch runs it; where it holds fused layers itself, under the reference backend."""
    fused: nn.Module | None
    """The same network on fused layers, with the same weights and paths; None where there is none."""
    size: tuple[int, int]
    """Height and width that it was made for, as far as is known."""


def load(name: str) -> Subject:
    """Find a network by its name and build it, without any download.

    Args:
        name: looked up in fastblocks.models, torchvision and timm, in this order; ``torchvision/NAME`` and
            ``timm/NAME`` look there only. ``module:callable`` is imported, with the current directory first, and
            called without arguments.

    Raises:
        BenchError: there is no such network, or building it failed.

    Example:
        >>> subject = load("mobilenet_v2")
        >>> subject.source, subject.size
        ('fastblocks', (224, 224))
    """
    if ":" in name:
        model = _own(name)
        source, size = "module:callable", (SIZE, SIZE)
    else:
        source, short = _source(name)
        if source == "fastblocks":
            fused = models.create(short).eval()
            return Subject(name, source, stock_model(fused.state_dict()), fused, (SIZE, SIZE))
        with calm(), told_of(name, f"building {short} failed"):
            model = (_torchvision if source == "torchvision" else _timm)(short)
        size = _size(model)
    model.eval()
    return Subject(name, source, model, model if has_fused_layers(model) else _counterpart(model), size)


def has_fused_layers(model: nn.Module) -> bool:
    """Whether layers of fastblocks are among a network's modules."""
    return any(type(module).__module__.startswith("fastblocks.layers.") for module in model.modules())


def _source(name: str) -> tuple[str, str]:
    """Which package has a network of this name, and its name there."""
    where, slash, short = name.rpartition("/")
    if slash and where not in ("torchvision", "timm"):
        raise BenchError(f"MODEL {name!r}: expected torchvision/NAME or timm/NAME before a slash, or {EXPECTED}")
    known: dict[str, list[str]] = {} if slash else {"fastblocks": models.list()}
    if short in known.get("fastblocks", ()):
        return "fastblocks", short
    for package in (where,) if slash else ("torchvision", "timm"):
        if find_spec(package) is None:
            if slash:
                raise BenchError(f"MODEL {name!r}: {package} is not installed (pip install {package})")
            continue
        known[package] = _names(package)
        if short in known[package] or (package == "timm" and short.partition(".")[0] in known[package]):
            return package, short
    close = difflib.get_close_matches(short, sorted({n for names in known.values() for n in names}), 3)
    missing = [] if slash else [package for package in ("torchvision", "timm") if package not in known]
    hints = [f"close to it: {', '.join(close)}"] if close else []
    hints += [f"{package} is not installed" for package in missing]
    raise BenchError("; ".join([f"MODEL {name!r}: expected {EXPECTED}; none has this name", *hints]))


def _names(package: str) -> list[str]:
    with calm():
        if package == "torchvision":
            import torchvision

            return [str(name) for name in torchvision.models.list_models()]
        import timm

        return [str(name) for name in timm.list_models()]


def _torchvision(name: str) -> nn.Module:
    """Random weights, in the backbones of detectors and segmentation networks, too."""
    import torchvision

    options: dict[str, Any] = {"weights": None}
    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in builder.__annotations__:
        options["weights_backbone"] = None
    model: nn.Module = builder(**options)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _size(model: nn.Module) -> tuple[int, int]:
    """Timm's networks say for which input they were made."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return (size[1], size[2]) if size and len(size) == 3 else (SIZE, SIZE)


def _own(name: str) -> nn.Module:
    """The user's own network."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise BenchError(f"MODEL {name!r}: expected module:callable, such as my_models:small_net")
    with _current_directory():
        with told_of(name, f"importing {module} failed"):
            imported = importlib.import_module(module)
        try:
            build: Callable[[], Any] = attrgetter(function)(imported)
        except AttributeError:
            raise BenchError(f"MODEL {name!r}: {module} has no {function}") from None
        if not callable(build):
            raise BenchError(f"MODEL {name!r}: {function} is a {type(build).__name__}, expected a callable")
        with told_of(name, f"{function}() failed"):
            model = build()
    if not isinstance(model, nn.Module):
        raise BenchError(f"MODEL {name!r}: {function}() gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _counterpart(model: nn.Module) -> nn.Module | None:
    """The network of fastblocks that is this network of torchvision: of the same class, keys and shapes."""
    families = {"torchvision.models.mobilenetv2": "mobilenet_v2", "torchvision.models.shufflenetv2": "shufflenet_v2"}
    family = families.get(type(model).__module__)
    if family is None:
        return None
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    classes = next((shape[0] for shape in reversed(shapes.values()) if shape), 1000)
    for name in models.list():
        if not name.startswith(family):
            continue
        ours = models.create(name, num_classes=classes)
        if {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes:
            ours.load_state_dict(model.state_dict())
            return ours.eval()
    return None


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """The current directory in front of where modules are looked for."""
    path = os.getcwd()
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """No warnings: those that imports, building and copying raise say nothing of the profile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def told_of(name: str, what: str) -> Iterator[None]:
    """Whatever foreign code raises, as one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise BenchError(f"MODEL {name!r}: {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    r"""An error's type and the first line of its text.

    >>> one_line(ValueError("bad width\nand more"))
    'ValueError: bad width'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
