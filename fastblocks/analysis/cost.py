"""What each operator of one run costs: multiply-adds, bytes that it reads and writes, memory that is in use."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastblocks.analysis.operators import has_formula, kind_of, multiply_adds, product_of

__all__ = ["Operator", "Product", "count", "total"]


class Product(NamedTuple):
    """The sizes of a convolution, or of a matrix product with a weight as a 1x1 convolution of its rows."""

    in_channels: int
    out_channels: int
    groups: int
    taps: int
    """Positions of the kernel: 9 of a 3x3."""
    positions: int
    """Positions of the output: images x height x width, or rows."""
    item: int
    """Bytes of one number."""

    @property
    def depthwise(self) -> bool:
        """Whether each output channel sees one input channel only."""
        return self.groups == self.in_channels > 1


class Operator(NamedTuple):
    """One call of a torch operator that moves data; views are none."""

    module: str
    """Path of the innermost module that was running; "" is the network itself."""
    name: str
    """As torch has it: "convolution", "native_batch_norm", "add", "relu_"."""
    kind: str
    """"product" (has multiply-adds), "element-wise" (BatchNorm in eval mode is), "copy", "other" (pooling, reductions)
    or "uncounted" (reads a matrix of weights, but no formula for its multiply-adds is known)."""
    multiply_adds: int
    read: int
    """Bytes of activations."""
    written: int
    weights: int
    """Bytes of parameters and buffers read."""
    live: int
    """Bytes of activations in memory when it has just run, the network's input among them."""
    seconds: float
    """What this call took, by the clock, without what counts it."""
    product: Product | None = None

    @property
    def moved(self) -> int:
        """The memory access cost in bytes (Ma et al. 2018, section 2)."""
        return self.read + self.written + self.weights


def count(model: nn.Module, *args: Any, **kwargs: Any) -> list[Operator]:
    """Run a model once, without gradients, and list its operators in order.

    Multiply-adds are those of convolutions, matrix products and attention: torch's own flop formulas, halved. Bytes
    are those of the tensors that an operator is given and makes: what is read twice is counted once, broadcast
    dimensions are one number wide, and views move nothing. Memory is that of the inputs, and of what operators have
    made and is still referenced; scratch inside an operator is not seen.

    Modules are known by hooks for the time of the run, in which fused layers run their children one by one.

    Args:
        model: any module, in the mode in which it is to be counted.
        *args: its inputs.
        **kwargs: likewise.

    Raises:
        Exception: whatever the model raises.

    Example:
        >>> import torch
        >>> conv, relu = count(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.ones(1, 3, 6, 6))
        >>> conv.module, conv.multiply_adds == 8 * 4 * 4 * 27, (relu.read, relu.written)
        ('0', True, (512, 512))
    """
    with torch.no_grad(), _paths(model) as path, _Counter(model, path, (args, kwargs)) as counter:
        model(*args, **kwargs)
    return counter.operators


def total(operators: Iterable[Operator]) -> dict[str, int]:
    """Sums over operators, and the highest memory: ``multiply_adds``, ``moved``, ``peak`` (bytes).

    Example:
        >>> import torch
        >>> total(count(nn.Conv2d(3, 8, 1, bias=False), torch.ones(1, 3, 2, 2)))
        {'multiply_adds': 96, 'moved': 272, 'peak': 176}
    """
    operators = list(operators)
    return {
        "multiply_adds": sum(operator.multiply_adds for operator in operators),
        "moved": sum(operator.moved for operator in operators),
        "peak": max((operator.live for operator in operators), default=0),
    }


@contextlib.contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are running, outermost first, kept up to date by hooks."""
    stack = [""]
    handles = []
    for name, module in model.named_modules():
        if not name or isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            continue

        def enter(_: Any, args: Any, path: str = name) -> None:
            stack.append(path)

        def leave(_: Any, args: Any, output: Any, path: str = name) -> None:
            while len(stack) > 1 and stack.pop() != path:
                pass  # modules that an exception left, and that are not entered any more

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Counter(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, path: list[str], inputs: Any) -> None:
        super().__init__()
        self.path = path
        self.operators: list[Operator] = []
        self.weights = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())} - {None}
        self.sizes: dict[int, int] = {}  # of the storages in memory
        self.live = 0
        for tensor in _tensors(inputs):
            self.born(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        if not has_formula(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        start = time.perf_counter()
        out = func(*args, **kwargs)
        self.record(func, args, kwargs, out, time.perf_counter() - start)
        return out

    def record(self, func: OpOverload, args: Any, kwargs: Any, out: Any, seconds: float) -> None:
        mutated, passed_over = _mutated(func, args, kwargs)
        inputs = {id(tensor): tensor for tensor in _tensors((args, kwargs))}
        known = {_key(tensor) for tensor in inputs.values()}
        made = [tensor for tensor in _tensors(out) if _key(tensor) not in known or _key(tensor) is None]
        for tensor in made:
            self.born(tensor)
        if not made and not mutated and _tensors(out):
            return  # a view
        name = func._schema.name.partition("::")[2]
        if name.startswith(("empty", "new_empty")):
            return
        reading = [tensor for key, tensor in inputs.items() if key not in passed_over]
        weights = [tensor for tensor in reading if _key(tensor) in self.weights]
        flops = multiply_adds(func, args, kwargs, out)
        fields = product_of(func, args, out)
        self.operators.append(
            Operator(
                module=self.path[-1],
                name=name,
                kind=kind_of(func, flops, any(_is_matrix(tensor) for tensor in weights)),
                multiply_adds=flops or 0,
                read=sum(_bytes(tensor) for tensor in reading if _key(tensor) not in self.weights),
                written=sum(map(_bytes, made)) + sum(map(_bytes, mutated)),
                weights=sum(map(_bytes, weights)),
                live=self.live,
                seconds=seconds,
                product=None if fields is None else Product(*fields),
            )
        )

    def born(self, tensor: Tensor) -> None:
        """Count a storage as memory from now on until it is freed."""
        key = _key(tensor)
        if key is None or key in self.weights or key in self.sizes:
            return
        storage = tensor.untyped_storage()
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        weakref.finalize(storage, self.gone, key).atexit = False

    def gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _mutated(func: OpOverload, args: Any, kwargs: Any) -> tuple[list[Tensor], set[int]]:
    """The tensors that an operator writes into, and the ids of those among them that it does not read."""
    written: list[Tensor] = []
    unread: set[int] = set()
    name = func._schema.name.partition("::")[2]
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[place] if place < len(args) else None)
        tensors = _tensors(value)
        written += tensors
        if argument.is_out or name in ("copy_", "fill_", "zero_", "set_"):
            unread |= set(map(id, tensors))
    return written, unread


def _key(tensor: Tensor) -> int | None:
    """What tells storages apart; None for a tensor without one (sparse, opaque, not initialised)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def _bytes(tensor: Tensor) -> int:
    """Bytes of the numbers in a tensor; along broadcast dimensions there is one."""
    numbers = 1
    try:
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numbers *= size if stride or not size else 1
    except (NotImplementedError, RuntimeError):  # sparse
        numbers = tensor.numel()
    return numbers * tensor.element_size()


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.is_floating_point()
