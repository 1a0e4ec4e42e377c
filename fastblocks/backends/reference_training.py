"""Chains of layers in training, as plain torch calls: what the other tiers' numbers are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.backends.program import Kind, Node, Program, Tensors
from fastblocks.backends.reference import channel_shuffle


def _activate(x: Tensor, activation: int) -> Tensor:
    return x if activation == 0 else F.relu(x) if activation == 1 else F.relu6(x)


def _conv(x: Tensor, node: Node, tensors: Tensors, index: int, update: bool) -> Tensor:
    if node.channels >= 0:
        x = x[:, node.first : node.first + node.channels]
    x = channel_shuffle(x, node.shuffle) if node.shuffle > 1 else x
    groups = x.shape[1] if node.kind == Kind.DEPTHWISE else node.groups
    z = F.conv2d(x, tensors.weights[index], None, node.stride, node.padding, node.dilation, groups)
    mean, var = tensors.running[2 * index : 2 * index + 2] if node.frozen or (node.update and update) else (None, None)
    weight, bias = tensors.affine[2 * index : 2 * index + 2]
    y = F.batch_norm(z, mean, var, weight, bias, not node.frozen, tensors.momenta[index], node.eps)
    return _activate(y, node.activation)


def chain(program: Program, x: Tensor, tensors: Tensors, update: bool = True) -> Tensor:
    """The output of a chain; torch differentiates it.

    Args:
        program: the nodes.
        x: the input.
        tensors: of the convolutions.
        update: whether running statistics are updated where the program says so.
    """
    values = [x]
    index = 0
    for node in program:
        x = values[node.input]
        if node.kind <= Kind.DENSE:
            values.append(_conv(x, node, tensors, index, update))
            index += 1
        elif node.kind == Kind.ADD:
            values.append(_activate(x + values[node.other], node.activation))
        elif node.kind == Kind.POOL_CAT:
            values.append(torch.cat((F.avg_pool2d(x, node.kernel, node.stride, node.padding), values[node.other]), 1))
        elif node.kind == Kind.INTERLEAVE:
            left = x if node.channels < 0 else x[:, node.first : node.first + node.channels]
            values.append(channel_shuffle(torch.cat((left, values[node.other]), 1), 2))
        elif node.kind == Kind.MAX_POOL:
            values.append(F.max_pool2d(x, node.kernel, node.stride, node.padding))
        elif node.kind == Kind.MEAN:
            values.append(F.adaptive_avg_pool2d(x, (1, 1)))
        else:
            values.append(x)
    return values[-1]
