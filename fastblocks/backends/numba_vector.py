"""What the compiled loops are written in: pointers, and vectors of floats as wide as this CPU's registers.

Numba's own arrays wrap negative indices and are taken to overlap, so LLVM leaves loops over many of them scalar. Here a
pointer is indexed plainly, and a vector is one value: its width does not depend on what an optimizer recognises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "WIDTH",
    "add",
    "beyond",
    "clamp",
    "doubles_at",
    "floats_at",
    "fma",
    "get",
    "inlined",
    "int64s_at",
    "interleave",
    "maximum",
    "mul",
    "opaque",
    "put",
    "select_inside",
    "splat",
    "sub",
]


def _host_width() -> int:
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


WIDTH = _host_width()
"""Floats in a vector."""

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(_F32, WIDTH)
_MASK = ir.VectorType(ir.IntType(1), WIDTH)
_LANES = ir.VectorType(_I32, WIDTH)


def _intrinsic(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A function that kernels call; LLVM inlines it."""
    return njit(function)


class VectorType(types.Type):  # type: ignore[misc]
    """A vector of float32."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{WIDTH}")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _pointer(element: Any) -> Any:
    """A function that makes a pointer of an address (an integer, or the void* that a kernel is given)."""

    @_intrinsic
    def at(typing: Any, address: Any) -> Any:
        result = types.CPointer(element)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = context.get_value_type(result)
            if isinstance(signature.args[0], types.Integer):
                return builder.inttoptr(args[0], kind)
            return builder.bitcast(args[0], kind)

        return result(address), generate

    return at


floats_at = _pointer(types.float32)
doubles_at = _pointer(types.float64)
int64s_at = _pointer(types.int64)


@_intrinsic
def beyond(typing: Any, pointer: Any, index: Any) -> Any:
    """The pointer to the float at an index."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _place(builder, *args)

    return pointer(pointer, types.int64), generate


@_intrinsic
def opaque(typing: Any, value: Any) -> Any:
    """The same integer, of which LLVM knows nothing.

    Of an index into many rows it would make an address of each, count all of them up, and spill them.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64])
        return builder.call(ir.InlineAsm(kind, "", "=r,0"), args)

    return types.int64(types.int64), generate


def _place(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.gep(pointer, [index], source_etype=_F32)


def _mask(builder: Any, count: Any) -> Any:
    """The first `count` lanes."""
    lanes = ir.Constant(_LANES, list(range(WIDTH)))
    return builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(count, _I32), _LANES))


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_LANES, [0] * WIDTH))


def _call(builder: Any, name: str, result: Any, args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@_intrinsic
def _load(typing: Any, pointer: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(_place(builder, *args), _VECTOR.as_pointer())
        return builder.load(place, align=4)

    return vector(pointer, types.int64), generate


@_intrinsic
def _store(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(_place(builder, args[0], args[1]), _VECTOR.as_pointer())
        builder.store(args[2], place, align=4)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), generate


@_intrinsic
def _load_some(typing: Any, pointer: Any, index: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(_place(builder, args[0], args[1]), _VECTOR.as_pointer())
        zeros = ir.Constant(_VECTOR, [0.0] * WIDTH)
        parts = [place, ir.Constant(_I32, 4), _mask(builder, args[2]), zeros]
        return _call(builder, f"llvm.masked.load.v{WIDTH}f32.p0", _VECTOR, parts)

    return vector(pointer, types.int64, types.int64), generate


@_intrinsic
def _store_some(typing: Any, pointer: Any, index: Any, value: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(_place(builder, args[0], args[1]), _VECTOR.as_pointer())
        parts = [args[2], place, ir.Constant(_I32, 4), _mask(builder, args[3])]
        _call(builder, f"llvm.masked.store.v{WIDTH}f32.p0", ir.VoidType(), parts)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector, types.int64), generate


@_intrinsic
def splat(typing: Any, value: Any) -> Any:
    """A vector of one value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], _VECTOR)

    return vector(types.float32), generate


@_intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, f"llvm.fma.v{WIDTH}f32", _VECTOR, list(args))

    return vector(vector, vector, vector), generate


def _binary(name: str) -> Any:
    @_intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return vector(vector, vector), generate

    return operation


add = _binary("fadd")
sub = _binary("fsub")
mul = _binary("fmul")


def _interleaved(half: int) -> Any:
    @_intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = half * WIDTH // 2
            lanes = [first + i // 2 + i % 2 * WIDTH for i in range(WIDTH)]
            return builder.shuffle_vector(*args, ir.Constant(_LANES, lanes))

        return vector(vector, vector), generate

    return operation


interleaved_low = _interleaved(0)
interleaved_high = _interleaved(1)
"""The lanes of two vectors by turns: of their first halves, and of their second halves."""


@_intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """The larger of the two; NaN where `b` is, and where `a` already was: torch's order of a maximum over a window."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = args
        takes = builder.or_(builder.fcmp_ordered(">", b, a), builder.fcmp_unordered("uno", b, b))
        return builder.select(takes, b, a)

    return vector(vector, vector), generate


@_intrinsic
def clamp(typing: Any, value: Any, low: Any, high: Any) -> Any:
    """Between two bounds; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, low, high = args
        raised = builder.select(builder.fcmp_ordered("<", value, low), low, value)
        return builder.select(builder.fcmp_ordered(">", raised, high), high, raised)

    return vector(vector, vector, vector), generate


@_intrinsic
def select_inside(typing: Any, value: Any, low: Any, high: Any, then: Any) -> Any:
    """`then` where a value lies between two bounds or is NaN, else zero: how a gradient passes an activation."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, low, high, then = args
        outside = builder.or_(builder.fcmp_ordered("<=", value, low), builder.fcmp_ordered(">=", value, high))
        return builder.select(outside, ir.Constant(_VECTOR, [0.0] * WIDTH), then)

    return vector(vector, vector, vector, vector), generate


@inlined
def get(pointer: Any, index: int, count: int) -> Any:
    """The vector at an index, of which `count` floats are there; the others are zeros and not read."""
    if count >= WIDTH:
        return _load(pointer, index)
    return _load_some(pointer, index, count)


@inlined
def put(pointer: Any, index: int, value: Any, count: int) -> None:
    """Store the first `count` floats of a vector."""
    if count >= WIDTH:
        _store(pointer, index, value)
    else:
        _store_some(pointer, index, value, count)


@inlined
def interleave(room: Any, second: int, count: int, to: Any, at: int) -> None:
    """``room[:count]`` and ``room[second:][:count]`` by turns; whole vectors are read and written."""
    for c in range(0, count, WIDTH):
        a, b = get(room, c, WIDTH), get(room, second + c, WIDTH)
        put(to, at + 2 * c, interleaved_low(a, b), WIDTH)
        put(to, at + 2 * c + WIDTH, interleaved_high(a, b), WIDTH)
