"""The four guidelines of ShuffleNetV2 (Ma et al. 2018, section 2) as advice on a network's blocks, with its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from fastblocks.analysis.cost import Operator

__all__ = ["Advice", "Rates", "advise"]

Blocks = Mapping[str, Sequence[Operator]]


class Rates(NamedTuple):
    """What the machine needs for what the guidelines count."""

    bytes_per_second: float
    product_call: float
    """Seconds of a convolution so small that all of it is overhead."""


class Advice(NamedTuple):
    """What a guideline says of some blocks. Costs of different guidelines overlap: they are not to be summed."""

    guideline: str
    """"G1" to "G4"."""
    title: str
    """What was found."""
    remedy: str
    """What would make it cheaper."""
    blocks: tuple[str, ...]
    """Where, the most expensive first."""
    examples: tuple[str, ...]
    """What was found in these blocks, in the same order."""
    extra_bytes: int
    """Memory access that an efficient design would not have; for G4 that of the element-wise operators and copies."""
    extra_calls: int
    """Of G3: convolutions beyond the first of a block; of G4: element-wise operators and copies."""
    seconds: float | None
    """Estimated; None where nothing was measured."""
    how: str
    """How the seconds were estimated."""


class _Found(NamedTuple):
    block: str
    example: str
    extra_bytes: int = 0
    extra_calls: int = 0
    seconds: float = 0.0


def advise(blocks: Blocks, rates: Rates | None = None, *, timed: bool = True) -> list[Advice]:
    """What the guidelines say, the most expensive first; a guideline that no block offends is left out.

    - **G1** equal channel widths minimise memory access: a 1x1 convolution from c1 to c2 channels at p positions moves
      p (c1 + c2) numbers, one of equal widths with as many multiply-adds 2 p sqrt(c1 c2).
    - **G2** group convolution raises memory access: with g groups the same multiply-adds make g times as many output
      channels; the extra is p c2 (1 - 1/g) numbers. Depthwise convolutions are left out: there, groups are the point.
    - **G3** fragmentation: each further convolution of a block costs a call's overhead.
    - **G4** element-wise operators (activations, BatchNorm, additions) and copies (concatenation, channel shuffle):
      the time that they were measured to take.

    Args:
        blocks: the operators of each block, by the block's name.
        rates: of the machine; None gives no seconds, and the order G1 to G4.
        timed: whether the operators' `seconds` are measurements good enough for G4.

    Example:
        >>> from fastblocks.analysis.cost import Operator, Product
        >>> conv = Product(in_channels=16, out_channels=64, groups=1, taps=1, positions=100, item=4)
        >>> block = [Operator("conv", "convolution", "product", 102400, 6400, 25600, 4096, 32000, 1e-5, conv)]
        >>> [(advice.guideline, advice.extra_bytes) for advice in advise({"stem": block})]
        [('G1', 6400)]
    """
    advice = []
    for guideline, (title, remedy, find, how) in GUIDELINES.items():
        found = [entry for name, operators in blocks.items() for entry in find(name, operators)]
        if not found:
            continue
        if rates is not None:
            found = [entry._replace(seconds=_seconds(entry, guideline, rates)) for entry in found]
        found.sort(key=lambda entry: (entry.seconds, entry.extra_bytes, entry.extra_calls), reverse=True)
        known = rates is not None and (timed or guideline != "G4")
        advice.append(
            Advice(
                guideline,
                title,
                remedy,
                tuple(entry.block for entry in found),
                tuple(entry.example for entry in found),
                sum(entry.extra_bytes for entry in found),
                sum(entry.extra_calls for entry in found),
                sum(entry.seconds for entry in found) if known else None,
                how,
            )
        )
    return sorted(advice, key=lambda entry: entry.seconds or 0.0, reverse=True)


def _seconds(found: _Found, guideline: str, rates: Rates) -> float:
    if guideline == "G4":
        return found.seconds
    return found.extra_bytes / rates.bytes_per_second + found.extra_calls * rates.product_call


def _widths(block: str, operators: Sequence[Operator]) -> Iterable[_Found]:
    extra, examples = 0, []
    for operator in operators:
        product = operator.product
        if product is None or product.taps > 1 or product.groups > 1:
            continue
        c1, c2 = product.in_channels, product.out_channels
        more = round(product.item * product.positions * (c1 + c2 - 2 * math.sqrt(c1 * c2)))
        if more:
            extra += more
            examples.append((more, f"{c1} to {c2}"))
    if examples:
        yield _Found(block, max(examples)[1], extra)


def _groups(block: str, operators: Sequence[Operator]) -> Iterable[_Found]:
    extra, examples = 0, []
    for operator in operators:
        product = operator.product
        if product is None or product.groups == 1 or product.depthwise:
            continue
        more = round(product.item * product.positions * product.out_channels * (1 - 1 / product.groups))
        extra += more
        examples.append((more, f"{product.groups} groups"))
    if examples:
        yield _Found(block, max(examples)[1], extra)


def _fragments(block: str, operators: Sequence[Operator]) -> Iterable[_Found]:
    calls = sum(operator.product is not None for operator in operators)
    if calls > 1:
        yield _Found(block, f"{calls} convolutions", 0, calls - 1)


def _element_wise(block: str, operators: Sequence[Operator]) -> Iterable[_Found]:
    found = [operator for operator in operators if operator.kind in ("element-wise", "copy")]
    if found:
        yield _Found(
            block,
            f"{len(found)} operators",
            sum(operator.moved for operator in found),
            len(found),
            sum(operator.seconds for operator in found),
        )


Finder = Callable[[str, Sequence[Operator]], Iterable[_Found]]

GUIDELINES: dict[str, tuple[str, str, Finder, str]] = {
    "G1": (
        "unequal channel widths of 1x1 convolutions",
        "widths nearer to each other, at the same multiply-adds",
        _widths,
        "memory access beyond that of equal widths, over the measured bandwidth",
    ),
    "G2": (
        "group convolution",
        "fewer groups, at the same multiply-adds",
        _groups,
        "memory access beyond that of one group, over the measured bandwidth",
    ),
    "G3": (
        "fragmentation",
        "fewer and larger convolutions in a block",
        _fragments,
        "convolutions of a block beyond the first, times the measured time of a tiny one",
    ),
    "G4": (
        "element-wise operators and copies",
        "leave them out, or fuse them into the convolutions beside them",
        _element_wise,
        "measured time of these operators, one by one in plain torch",
    ),
}
"""What is found, what would help, what finds it in a block, and how its seconds are estimated."""
