"""Whether a layer's children may run as one op, and the op's arguments from them.

A fused layer is a container of ordinary torch modules. It may run the fused op only while that does exactly what the
children one after the other would do, so this module looks for everything that could make a difference. Where it
finds something, the layer runs its children: never wrong, only not faster.

All of that on every call would cost more than a small kernel. So a layer keeps a `Plan`: what was found good, in a
form that one pass can compare. The one thing that it takes for granted is that nobody exchanges the hook dictionaries
of a child for new ones (torch itself only changes their contents).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastblocks import functional as F
from fastblocks.functional.plain import functorch_level
from fastblocks.functional.site import Site

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
_CONV = operator.itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_BN = operator.itemgetter("training", "eps")
_RELU6 = operator.itemgetter("min_val", "max_val")
_SIX = (0.0, 6.0)
_grad = torch.is_grad_enabled


class Unit(NamedTuple):
    """A convolution of a layer, with what follows it. `name` is for messages."""

    name: str
    conv: nn.Module
    bn: nn.Module | None
    act: nn.Module | None

    def modules(self) -> Iterator[nn.Module]:
        """The modules of this unit."""
        for child in self[1:]:
            if child is not None:
                yield child  # type: ignore[misc]

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


def is_depthwise(conv: Any) -> bool:
    """One filter for each channel. A single channel counts as dense."""
    return bool(conv.groups > 1 and tuple(conv.weight.shape[:2]) == (conv.groups, 1))


def is_pointwise(conv: Any) -> bool:
    """1x1, one group, stride 1, no padding."""
    plain = conv.groups == 1 and conv.stride == (1, 1) and conv.padding == (0, 0)
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
    if conv.groups != 1 and not is_depthwise(conv):
        return f"has {conv.groups} groups"
    return None


def _bn_reason(bn: nn.Module) -> str | None:
    if type(bn) is not nn.BatchNorm2d:
        return f"is a {type(bn).__name__}, not an nn.BatchNorm2d"
    reason = tensors_reason(bn, ("weight", "bias", "running_mean", "running_var"))
    if reason is not None:
        return reason
    if bn.training:
        return "is in training mode"
    if bn.running_mean is None or bn.running_var is None:
        return "has no running statistics"
    return None


def _act_reason(act: nn.Module) -> str | None:
    if type(act) not in ACTIVATIONS:
        return f"is a {type(act).__name__}, none of {', '.join(kind.__name__ for kind in ACTIVATIONS)}"
    if type(act) is nn.ReLU6 and (act.min_val, act.max_val) != _SIX:
        return f"clamps to {act.min_val} .. {act.max_val}"
    return None


def children_reason(units: tuple[Unit, ...], containers: tuple[tuple[str, nn.Module], ...]) -> str | None:
    """Why these children cannot be run as one op, or None."""
    if global_hooks():
        return "global module hooks are set"
    for unit in units:
        prefix = f"{unit.name}." if unit.name else ""
        for part, module, reason in (
            ("convolution", unit.conv, _conv_reason),
            ("normalisation", unit.bn, _bn_reason),
            ("activation", unit.act, _act_reason),
        ):
            found = None if module is None else watched(module) or reason(module)
            if found is not None:
                return f"{prefix}{part} {found}"
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


# ------------------------------------------------------------------------------------------------------------- plans


class Plan:
    """What a layer looked like when it was found fit for its op.

    Args:
        units: the convolutions, each with a BatchNorm and without a bias; else no plan can be kept.
        tables: the ``_modules`` of the layer and of its nested containers.
        containers: the nested containers.
        site: where the op is called from.
        first: the op's arguments in front of the records.
        last: the op's arguments behind them.
    """

    __slots__ = (
        "_acts",
        "_backward_hooks",
        "_children",
        "_first",
        "_hooks",
        "_last",
        "_site",
        "_size",
        "_states",
        "_tables",
        "_types",
        "_units",
    )

    def __init__(
        self,
        units: tuple[Unit, ...],
        tables: tuple[dict[str, Any], ...],
        containers: tuple[nn.Module, ...],
        site: Site,
        first: tuple[Any, ...],
        last: tuple[Any, ...],
    ) -> None:
        self._site = site
        self._first = first
        self._last = last
        self._tables = tables
        self._children = [child for table in tables for child in table.values()]
        self._types = list(map(type, self._children))
        watched = [*containers, *(child for unit in units for child in unit.modules())]
        self._states = [child.__dict__ for child in watched]
        # a forward patched into a module is one more entry of its __dict__
        self._size = sum(map(len, self._states))
        self._hooks, self._backward_hooks = hooks_of(self._states)
        self._units = [
            (unit.conv.__dict__, _CONV(unit.conv.__dict__), unit.bn.__dict__, _BN(unit.bn.__dict__))
            for unit in units
            if unit.bn is not None
        ]
        self._acts = [unit.act.__dict__ for unit in units if type(unit.act) is nn.ReLU6]

    @staticmethod
    def keeps(units: tuple[Unit, ...]) -> bool:
        """Whether a plan can be kept: the common case only, the others go the long way every time."""
        return all(u.bn is not None and u.conv.bias is None and u.bn.weight is not None for u in units)

    def __call__(self, input: Any) -> Tensor | None:
        """The op's result; None if anything has changed."""
        children: list[Any] = []
        for table in self._tables:
            children += table.values()
        if (
            children != self._children
            or [*map(type, children)] != self._types
            or any(self._hooks)
            or (_grad() and any(self._backward_hooks))
            or sum(map(len, self._states)) != self._size
        ):
            return None
        args: list[Any] = [input, *self._first]
        tensors: list[Any] = [input]
        try:
            for conv, setting, bn, state in self._units:
                if _CONV(conv) != setting or _BN(bn) != state:
                    return None
                parameters = conv["_parameters"]
                if parameters["bias"] is not None:
                    return None
                weight = parameters["weight"]
                parameters = bn["_parameters"]
                buffers = bn["_buffers"]
                mean = buffers["running_mean"]
                var = buffers["running_var"]
                scale = parameters["weight"]
                shift = parameters["bias"]
                args.append((weight, None, mean, var, scale, shift))
                tensors += (weight, mean, var, scale, shift)
            for act in self._acts:
                if _RELU6(act) != _SIX:
                    return None
        except KeyError:
            return None
        args += self._last
        return self._site.call(args, tensors)
