"""One problem for all: weights, an input and what float64 makes of them; and who solves it.

The contenders are torch eager on an NCHW input, torch eager in channels_last, torch.compile (Inductor, freezing) in
channels_last, and fastblocks under its current tier.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from shapes import Output, Shape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastblocks
from fastblocks.models.common import channels_last

CONTENDERS = ("eager", "channels_last", "compile", "fastblocks")
TORCH = CONTENDERS[:3]
TOLERANCE = 1e-4
"""Of the largest value. Rounding in float32 makes up to 1e-5 of it, in torch as in fastblocks; a channel, a tap or a
mean left out in any one layer makes 4e-3 or more."""


class Problem(NamedTuple):
    """Weights under the keys that both sides have, an input, the outputs in float64, and multiply-adds of one call."""

    state: dict[str, Tensor]
    x: Tensor
    truth: tuple[Tensor, ...]
    multiply_adds: int


def tensors(output: Output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def _settle(model: nn.Module, x: Tensor) -> None:
    """Give the BatchNorms weights that are not at identity, and the statistics of what they get from this input.

    As in a trained network, each channel is alive. With any other statistics, values would vanish on their way through
    a network of random weights, and its output would hardly depend on what the first layers compute.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, 0.0, 0.1)
        layer.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        model.eval()


@functools.lru_cache(maxsize=2)
def problem(shape: Shape, batch: int) -> Problem:
    """The same numbers at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = shape.stock()
        x = torch.randn(batch, *shape.size)
        _settle(stock, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        truth = copy.deepcopy(stock).double()(x.double())
    return Problem(stock.state_dict(), x, tensors(truth), counter.get_total_flops() // 2)


def runner(shape: Shape, contender: str, state: dict[str, Tensor], x: Tensor) -> Callable[[], Output]:
    """A call of the contender on `x`, in the layout that suits it."""
    model = (shape.ours if contender == "fastblocks" else shape.stock)().eval()
    model.load_state_dict(state)
    nchw = contender == "eager" or (contender == "fastblocks" and shape.image)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.contiguous_format if nchw else torch.channels_last)
    if contender == "fastblocks":
        if not shape.nchw_weights:
            channels_last(model)
    elif contender != "eager":
        model = model.to(memory_format=torch.channels_last)
    call = torch.compile(model, dynamic=False) if contender == "compile" else model
    return lambda: call(x)


def check(found: Output, truth: tuple[Tensor, ...]) -> None:
    """Raises an AssertionError if an output is not what float64 says, up to float32's rounding."""
    assert len(tensors(found)) == len(truth)
    for tensor, true in zip(tensors(found), truth, strict=True):
        assert tensor.shape == true.shape, (tensor.shape, true.shape)
        error = ((tensor.double() - true).abs().max() / true.abs().max()).item()
        assert error <= TOLERANCE, f"the output is off by {error:.2g} of the largest value"


@contextlib.contextmanager
def compiling(*, freezing: bool) -> Iterator[None]:
    """Inductor starts from nothing, and leaves nothing; its caches of graphs are off.

    The number of threads is part of the generated code, so no graph may come from a run with another number.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(freezing=freezing, fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@contextlib.contextmanager
def nothing_left_to_torch() -> Iterator[None]:
    """A row of the native tier may not be plain torch under fastblocks' name. (The numba tier leaves it some ops.)"""
    before = fastblocks.backend_info(counts=True)["fallbacks"]
    yield
    after = fastblocks.backend_info(counts=True)
    assert after["backend"] != "native" or after["fallbacks"] == before, after["fallbacks"]
