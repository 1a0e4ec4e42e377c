"""Whether a layer's children may run as one op, and the op's arguments from them.

A fused layer is a container of ordinary torch modules. It may run the fused op only while that does exactly what the
children one after the other would do, so this module looks for everything that could make a difference. Where it
finds something, the layer runs its children: never wrong, only not faster.

All of that on every call would cost more than a small kernel. So a layer keeps a call site (``functional/site.py``),
which compares what was found good with what there is. The one thing that it takes for granted is that nobody exchanges
the dictionaries of a child's hooks, parameters and buffers for new ones (torch itself only changes their contents).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastblocks import functional as F
from fastblocks.functional.plain import functorch_level
from fastblocks.functional.site import Modules, Place

ACTIVATIONS: dict[type[nn.Module], str | None] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Identity: None}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode")
_BN = ("training", "eps")
_RELU6 = ("min_val", "max_val")
_SIX = (0.0, 6.0)
_NONE: Place = ({"": None}, "")


SITES = ("_site", "_chain", "_network", "_training", "_pooled_training", "_again")
"""Entries of a module's ``__dict__`` that remember calls."""


class HasSites:
    """A module with call sites in its ``__dict__``; they stay behind when it is copied or pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in SITES}


class Unit(NamedTuple):
    """A convolution of a layer, with what follows it. `name` is for messages."""

    name: str
    conv: nn.Module
    bn: nn.Module | None
    act: nn.Module | None

    def prefix(self) -> str:
        """What stands before its parts in messages."""
        return f"{self.name}." if self.name else ""

    def modules(self) -> Iterator[nn.Module]:
        """The modules of this unit."""
        for child in self[1:]:
            if child is not None:
                yield child  # type: ignore[misc]

    def eps(self) -> float:
        """Of the BatchNorm; any where there is none."""
        return 0.0 if self.bn is None else self.bn.eps  # type: ignore[return-value]

    def activation(self) -> str | None:
        """The op's name for the activation."""
        return None if self.act is None else ACTIVATIONS[type(self.act)]

    def record(self) -> F.ConvBN:
        """The tensors, by plain attribute access, which tracers understand."""
        conv: Any = self.conv
        if self.bn is None:
            return F.ConvBN(conv.weight, conv.bias)
        bn: Any = self.bn
        return F.ConvBN(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)

    def places(self) -> tuple[Place, ...]:
        """Where the tensors of the record stand."""
        parameters = self.conv._parameters
        weight = ((parameters, "weight"), (parameters, "bias"))
        if self.bn is None:
            return (*weight, *[_NONE] * 4)
        buffers, parameters = self.bn._buffers, self.bn._parameters
        statistics = ((buffers, "running_mean"), (buffers, "running_var"))
        return (*weight, *statistics, (parameters, "weight"), (parameters, "bias"))


def is_depthwise(conv: Any) -> bool:
    """One filter for each channel. A single channel counts as dense."""
    return bool(conv.groups > 1 and tuple(conv.weight.shape[:2]) == (conv.groups, 1))


def is_pointwise(conv: Any, grouped: bool = False) -> bool:
    """1x1, stride 1, no padding; one group, or with `grouped` any number of them."""
    plain = (grouped or conv.groups == 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
    return bool(plain and tuple(conv.weight.shape[2:]) == (1, 1))


# ----------------------------------------------------------------------------------------------- reasons against it


def global_hooks() -> bool:
    """Whether a hook is set on every module there is."""
    return any(_GLOBAL_HOOKS)


def hooks_of(states: list[dict[str, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The dictionaries in which hooks on these modules (their ``__dict__``) appear: of forward, and of backward."""
    forward, backward = (
        (*_GLOBAL_HOOKS[part], *(state[name] for state in states for name in _HOOKS[part]))
        for part in (slice(2), slice(2, None))
    )
    return forward, backward


def watched(module: nn.Module) -> str | None:
    """What makes a call of this module more than a call of its class's forward."""
    state = module.__dict__
    if any(state[hooks] for hooks in _HOOKS):
        return "has hooks"
    if "forward" in state:
        return "has a forward of its own"
    return None


def tensors_reason(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The module's tensors must be plain ones, where torch puts them. Parametrization moves them elsewhere."""
    state = module.__dict__
    for name in names:
        if name in state["_parameters"]:
            tensor = state["_parameters"][name]
        elif name in state["_buffers"]:
            tensor = state["_buffers"][name]
        else:
            return f"has no tensor {name!r} of its own"
        if tensor is None:
            continue
        if not torch.compiler.is_compiling() and type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"has a {name} of type {type(tensor).__name__}"
        if tensor.dtype is not torch.float32:
            return f"has a {name} of dtype {tensor.dtype}"
        if tensor.device.type != "cpu":
            return f"has a {name} on {tensor.device}"
    return None


def _conv_reason(conv: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__name__}, not an nn.Conv2d"
    reason = tensors_reason(conv, ("weight", "bias"))
    if reason is not None:
        return reason
    if conv.padding_mode != "zeros":
        return f"has padding_mode {conv.padding_mode!r}"
    for name in ("stride", "padding", "dilation"):
        value = getattr(conv, name)
        if type(value) is not tuple or len(value) != 2:
            return f"has {name} {value!r}, not a pair"
    return None


def groups_reason(unit: Unit) -> str:
    """The reason of an op that does not take this unit's groups."""
    conv: Any = unit.conv
    return f"{unit.prefix()}convolution has {conv.groups} groups"


def pointwise_reason(unit: Unit, grouped: bool = False) -> str | None:
    """Why a convolution is none that an op takes for 1x1, or None."""
    conv: Any = unit.conv
    if conv.groups != 1 and not grouped and not is_depthwise(conv):
        return groups_reason(unit)
    return None if is_pointwise(conv, grouped) else f"{unit.name} is no 1x1 convolution with stride 1"


def depthwise_reason(unit: Unit, *, same: bool = False) -> str | None:
    """Why a convolution is none that a block's op takes for depthwise, or None.

    With `same`, the kernel must be odd and padded so that stride 1 keeps height and width.
    """
    conv: Any = unit.conv
    if conv.groups != 1 and not is_depthwise(conv):
        return groups_reason(unit)
    if not is_depthwise(conv) and tuple(conv.weight.shape[:2]) != (1, 1):
        return f"{unit.name} is no depthwise convolution"
    kernel, width = conv.weight.shape[2:]
    (stride, other), (padding, pad) = conv.stride, conv.padding
    square = kernel == width and stride == other and padding == pad and conv.dilation == (1, 1)
    if not square or (same and 2 * padding != kernel - 1):
        return f"{unit.name} has a kernel, stride, padding or dilation that the op does not know"
    return None


def _bn_reason(bn: nn.Module, training: bool) -> str | None:
    if type(bn) is not nn.BatchNorm2d:
        return f"is a {type(bn).__name__}, not an nn.BatchNorm2d"
    reason = tensors_reason(bn, ("weight", "bias", "running_mean", "running_var"))
    if reason is not None or training:
        return reason
    if bn.training:
        return "is in training mode"
    if bn.running_mean is None or bn.running_var is None:
        return "has no running statistics"
    return None


def activation_reason(act: nn.Module) -> str | None:
    """Why an activation is none that an op has, or None."""
    if type(act) not in ACTIVATIONS:
        return f"is a {type(act).__name__}, none of {', '.join(kind.__name__ for kind in ACTIVATIONS)}"
    if type(act) is nn.ReLU6 and (act.min_val, act.max_val) != _SIX:
        return f"clamps to {act.min_val} .. {act.max_val}"
    return None


def children_reason(
    units: tuple[Unit, ...], containers: tuple[tuple[str, nn.Module], ...], *, training: bool = False
) -> str | None:
    """Why these children cannot be run as one op, or None; with `training`, as a part of a chain."""
    if global_hooks():
        return "global module hooks are set"
    for unit in units:
        for part, module, reason in (
            ("convolution", unit.conv, _conv_reason),
            ("normalisation", unit.bn, partial(_bn_reason, training=training)),
            ("activation", unit.act, activation_reason),
        ):
            found = None if module is None else watched(module) or reason(module)
            if found is not None:
                return f"{unit.prefix()}{part} {found}"
    for name, module in containers:
        found = watched(module)
        if found is not None:
            return f"{name} {found}"
    return None


def input_reason(x: Any) -> str | None:
    """Why an input, or the context it is used in, rules out every fused op, or None."""
    if not isinstance(x, Tensor):
        traced = type(x).__module__.startswith("torch.fx")
        return "fx is tracing" if traced else f"the input is a {type(x).__name__}"
    if not torch.compiler.is_compiling():
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the input is a {type(x).__name__}"
        if torch.jit.is_tracing():
            return "torch.jit is tracing"
        if functorch_level() is not None:
            return "a torch.func transform is active"
    if torch.onnx.is_in_onnx_export():
        return "an ONNX export is running"
    if x.dtype is not torch.float32:
        return f"the input's dtype is {x.dtype}, not torch.float32"
    if x.device.type != "cpu":
        return f"the input is on {x.device}, not on the CPU"
    if x.layout is not torch.strided:
        return f"the input's layout is {x.layout}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None


def modules_of(units: tuple[Unit, ...], layer: nn.Module, containers: tuple[nn.Module, ...]) -> Modules:
    """What a call site of a layer must remember of its modules."""
    states = [child.__dict__ for child in (*containers, *(child for unit in units for child in unit.modules()))]
    settings: list[tuple[dict[str, Any], str, Any]] = []
    for unit in units:
        for child, names in (
            (unit.conv, _CONV),
            (unit.bn, _BN),
            (unit.act, _RELU6 if type(unit.act) is nn.ReLU6 else ()),
        ):
            if child is not None:
                settings += [(child.__dict__, name, getattr(child, name)) for name in names]
    for module in containers:
        # a pooling's or a shuffle's; a container has none
        settings += [(module.__dict__, name, getattr(module, name)) for name in getattr(module, "__constants__", ())]
    return Modules(tuple(module._modules for module in (layer, *containers)), states, hooks_of(states), settings)
