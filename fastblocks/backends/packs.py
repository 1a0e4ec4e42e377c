"""Packed weights: one slot a weight tensor, in a weak-keyed table.

A pack depends on the weight alone (BatchNorm is folded per call), so training and evaluation share it and running
statistics cannot make one stale. A slot is good while the tensor's address and version are those it was made from; it
holds the storage, so that the address cannot be given to another tensor meanwhile. Edits through ``.data`` and numpy
change no version: ``fastblocks.refresh`` forgets.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fastblocks import _C

_slots: dict[int, tuple[Any, ...]] = {}


def _store(weight: Tensor, kind: str, pack: _C.Pack) -> None:
    key = id(weight)
    old = _slots.get(key)
    version = weight._version
    packs = {kind: pack}
    if old is not None and old[0]() is weight and old[1] == weight.data_ptr() and old[2] == version:
        packs = {**old[4], **packs}
    reference = weakref.ref(weight, lambda _: _slots.pop(key, None))
    _slots[key] = (reference, weight.data_ptr(), version, weight.untyped_storage(), packs)


def get(weight: Tensor, kind: str) -> _C.Pack:
    """The pack of a convolution weight; kind: "conv", "conv_planar" (for NCHW input), "depthwise" or "linear"."""
    slot = _slots.get(id(weight))
    if slot is not None and slot[0]() is weight and slot[1] == weight.data_ptr() and slot[2] == weight._version:
        pack = slot[4].get(kind)
        if pack is not None and pack.level == _C.current_level():
            return pack
    out, inner, kh, kw = weight.shape if kind != "linear" else (*weight.shape, 1, 1)
    s0, s1, s2, s3 = weight.stride() if kind != "linear" else (*weight.stride(), 0, 0)
    if kind == "depthwise":
        pack = _C.pack_depthwise(weight.data_ptr(), out, kh, kw, s0, s2, s3)
    else:
        pack = _C.pack_conv(weight.data_ptr(), out, inner, kh, kw, s0, s1, s2, s3, kind == "conv_planar")
    # A tensor of inference mode carries no version, so nothing would tell that it was changed: packed at each call.
    if not weight.is_inference():
        _store(weight, kind, pack)
    return pack


def forget(module: torch.nn.Module | None = None) -> None:
    """Drop the packs of a module's parameters, or all."""
    if module is None:
        _slots.clear()
        return
    for parameter in module.parameters():
        _slots.pop(id(parameter), None)
