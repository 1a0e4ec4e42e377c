"""Pooling with a window, as an op where it may be."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastblocks.functional import checks
from fastblocks.layers.base import Fused, Op
from fastblocks.layers.fuse import Unit
from fastblocks.layers.train import Builder


class MaxPool2d(Fused, nn.MaxPool2d):
    """torch's ``nn.MaxPool2d``, with all of its arguments, by the op where it may be.

    The op has neither dilation nor indices, and rounds the output's size down.

    Args:
        kernel_size: pixels, one int or two (height, width).
        stride: pixels, one int or two; None is `kernel_size`.
        padding: pixels on each side that never win; at most half of the kernel.
        dilation: pixels between those that are compared.
        return_indices: whether the output is a tuple, with the places of the largest values.
        ceil_mode: whether the output's size is rounded up.

    Shape:
        ``(N, C, H, W)`` to ``(N, C, H', W')`` with ``H' = (H + 2 padding - kernel_size) // stride + 1``.

    Example:
        >>> import torch
        >>> MaxPool2d(3, 2, 1)(torch.arange(16.0).view(1, 1, 4, 4)).flatten().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """

    def _units(self) -> tuple[Unit, ...]:
        return ()

    def _op(self, units: tuple[Unit, ...]) -> Op | str:
        kernel, stride, padding, dilation = (
            checks.pair(name, getattr(self, name)) for name in ("kernel_size", "stride", "padding", "dilation")
        )
        if dilation != (1, 1):
            return f"dilation is {self.dilation}"
        if self.return_indices:
            return "indices are wanted"
        if self.ceil_mode:
            return "the output's size is rounded up"
        height, width = (max(1, k - 2 * p) for k, p in zip(kernel, padding, strict=True))
        return Op("max_pool2d", (kernel, stride, padding), least=(height, width))

    def _describe(self, builder: Builder, value: int, units: tuple[Unit, ...]) -> int:
        kernel, stride, padding = (checks.pair(n, getattr(self, n)) for n in ("kernel_size", "stride", "padding"))
        return builder.max_pool(value, kernel, stride, padding)

    def _run_children(self, x: Any) -> Any:
        return nn.MaxPool2d.forward(self, x)
