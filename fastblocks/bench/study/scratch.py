"""A process of its own that says what an inverted residual takes of fastblocks' memory."""

from __future__ import annotations

import sys

import torch

import fastblocks
from fastblocks.bench.process import reply


def scratch(size: int, inputs: int, outputs: int, stride: int, ratio: int) -> dict[str, int] | None:
    """Bytes that a block takes beside its input, output and packed weights; None where no tier counts them.

    The peak that memory_stats tells is the process's: call this before anything larger has run.
    """
    block = fastblocks.InvertedResidual(inputs, outputs, stride, ratio).eval()
    with torch.no_grad():
        block(torch.zeros(1, inputs, 4, 4))  # packs the weights
        x = torch.randn(1, inputs, size, size).contiguous(memory_format=torch.channels_last)
        before = fastblocks.memory_stats()
        y = block(x)
        after = fastblocks.memory_stats()
    if not after:
        return None
    return {
        "scratch": after["peak_active_bytes"] - after["active_bytes"],
        "output": after["active_bytes"] - before["active_bytes"],
        "output_numbers": y.numel(),
    }


if __name__ == "__main__":
    threads, *block = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    reply(scratch=scratch(*block))
