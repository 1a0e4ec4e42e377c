"""What the fused layers have in common: when the op runs, when the children run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from fastblocks.backends import state as backend
from fastblocks.functional import checks, dispatch
from fastblocks.functional.site import Site
from fastblocks.layers.fuse import Plan, Unit, children_reason, input_reason


class Fused(nn.Module):
    """A container of ordinary children that runs them as one op where it may.

    Subclasses say which children belong to which convolution (`_units`), which op they make (`_op`) and what happens
    without the op (`_run_children`).
    """

    _plan: Plan | None = None

    def _units(self) -> tuple[Unit, ...] | str:
        """The convolutions of the layer, or why the children are not those that the layer was built with."""
        raise NotImplementedError

    def _containers(self) -> tuple[tuple[str, nn.Module], ...]:
        """Nested containers between the layer and its convolutions, with their names."""
        return ()

    def _op(self, units: tuple[Unit, ...]) -> tuple[str, tuple[Any, ...], tuple[int, int]] | str:
        """The op's name, its last arguments, and the smallest input height and width; or why there is none."""
        raise NotImplementedError

    def _run_children(self, x: Any) -> Any:
        raise NotImplementedError

    def _tables(self) -> tuple[dict[str, Any], ...]:
        return (self._modules, *(container._modules for _, container in self._containers()))

    def _why_not(self, x: Any) -> str | None:
        """Why the fused op may not run on this input, or None."""
        reason = input_reason(x)
        if reason is not None:
            return reason
        units = self._units()
        if isinstance(units, str):
            return units
        reason = children_reason(units, self._containers())
        if reason is not None:
            return reason
        if x.dim() == 3 and all(unit.bn is None for unit in units):
            return "the input is not batched"
        op = self._op(units)
        return op if isinstance(op, str) else None

    def forward(self, input: Tensor) -> Tensor:
        """Runs the layer on ``(N, C, H, W)``."""
        if not is_compiling():
            plan = self._plan
            if plan is not None:
                found = plan.gather()
                if found is not None and plan.site.knows(input, found[1]):
                    return plan.site.run((input, *found[0], *plan.settings))
        return self._forward_checked(input)

    def _forward_checked(self, x: Any) -> Any:
        if self._why_not(x) is not None:
            self._refuse(x)
            return self._run_children(x)
        units: Any = self._units()
        name, settings, least = self._op(units)  # type: ignore[misc]
        records = [unit.record() for unit in units]
        if name == "inverted_residual" and len(records) == 2:
            args: tuple[Any, ...] = (x, (), *(record[:6] for record in records), *settings)
        else:
            args = (x, *(record[:6] for record in records), *settings)
        tensors = [tensor for record in records for tensor in record[:6] if tensor is not None]
        if is_compiling():
            checks.CHECKS[name](*args)
            return dispatch.run(name, args, (x, *tensors))
        if name == "inverted_residual" and len(records) == 2 or not Plan.keeps(units):
            self.__dict__.pop("_plan", None)
        site = Site(name, least)
        result = site.check_and_run(args, tensors)
        if Plan.keeps(units):
            containers = tuple(container for _, container in self._containers())
            lead = ((),) if len(args) - len(settings) - len(records) == 2 else ()
            self.__dict__["_plan"] = Plan(units, self._tables(), containers, site, settings)
        return result
