"""Weights that take no value near a kink of an activation, so that gradients in float32 compare with float64's.

Where a value lies at a kink, float32 may take the other side than float64 does, and one such value outweighs all
rounding a thousand times, in torch as here. So the shifts of BatchNorm are moved a little beforehand, such that no
value of the float64 pass is near a kink.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from training import State, stock

FURTHEST_MOVE, MOVES = 0.1, 401  # how far a shift of BatchNorm may be moved, and how many places are tried

KINKS: dict[Callable[..., Any], tuple[float, ...]] = {
    F.relu: (0.0,),
    F.relu_: (0.0,),
    torch.relu_: (0.0,),
    F.relu6: (0.0, 6.0),
    F.hardtanh: (0.0, 6.0),  # which nn.ReLU6 calls
}


class AwayFromKinks(TorchFunctionMode):
    """Moves each BatchNorm's shift during a pass, such that what the next activation gets is not near its kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.empty(0)
        self.margin = float("inf")
        """How near the nearest value is."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            self.shift = kwargs["bias"]
        elif function in KINKS:
            self._move(args[0], KINKS[function])
        return function(*args, **(kwargs or {}))

    def _move(self, x: Tensor, kinks: tuple[float, ...]) -> None:
        """Add the best of some moves, a channel each, to `x` and to the shift that is in it."""
        values = x.transpose(0, 1).flatten(1).sort(1).values
        moves = torch.linspace(-FURTHEST_MOVE, FURTHEST_MOVE, MOVES, dtype=x.dtype)
        margins = torch.stack([_distance(values, kink - moves) for kink in kinks]).amin(0)
        best, place = margins.max(1)
        moved = (self.shift + moves[place]).float().to(x.dtype)  # a number that float32 has, too
        x += (moved - self.shift).view(1, -1, 1, 1)
        self.shift.copy_(moved)
        self.margin = min(self.margin, best.min().item())


def _distance(values: Tensor, points: Tensor) -> Tensor:
    """How far each point is from the nearest of each row's values, which are sorted."""
    points = points.expand(len(values), -1).contiguous()
    above = torch.searchsorted(values, points)
    near = [values.gather(1, (above - back).clamp(0, values.shape[1] - 1)) for back in (0, 1)]
    return torch.minimum((near[0] - points).abs(), (near[1] - points).abs())


def away_from_kinks(state: State, x: Tensor) -> tuple[State, float]:
    """The weights with shifts moved away from kinks for this batch, and how near the nearest value is."""
    model = stock(state).double()
    with torch.no_grad(), AwayFromKinks() as mode:
        model(x.double())
    return {key: v.float() if v.is_floating_point() else v for key, v in model.state_dict().items()}, mode.margin
