"""One process or several: who this one is, and what they tell each other.

`torchrun` sets RANK and WORLD_SIZE. Without them, or with a size of 1, there is one process, and no process group.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastblocks.cli.errors import UserError

__all__ = ["World", "joined"]


@dataclass(frozen=True)
class World:
    """One process among `size`, counted from 0. All of them must call each method the same number of times."""

    rank: int = 0
    size: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network whose backward pass averages gradients over the processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, value: float) -> float:
        """The mean over the processes."""
        return value if self.size == 1 else float(self.sum(torch.tensor(value, dtype=torch.float64)) / self.size)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of the first, which are those that a checkpoint holds."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def random_states(self) -> list[Tensor]:
        """The state of torch's generator in every process, by rank."""
        mine = torch.get_rng_state()
        if self.size == 1:
            return [mine]
        states = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(states, mine)
        return states


@contextmanager
def joined() -> Iterator[World]:
    """The world that the environment describes, joined over gloo for the time of a `with` block.

    A UserError says what is wrong with the environment. What is raised in the block by a process other than the first
    says which one it was.
    """
    rank, size = (_number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {size}: expected a rank from 0 up to the size")
    if size == 1:
        yield World()
        return
    if not (dist.is_available() and dist.is_gloo_available()):
        raise UserError("this torch has no gloo, and several processes need it")
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
    except (ValueError, RuntimeError) as error:  # no MASTER_ADDR, nobody there
        raise UserError(f"the {size} processes cannot join ({str(error).splitlines()[0]})") from error
    try:
        yield World(rank, size)
        # Optimizers and schedulers hold each other, and the wrapped network's group would end with the interpreter, its
        # threads still running. And nobody leaves while others still speak.
        gc.collect()
        dist.barrier()
    except UserError as error:
        raise UserError(f"rank {rank}: {error.message}") if rank else error from None
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r} in the environment, expected a whole number") from None
