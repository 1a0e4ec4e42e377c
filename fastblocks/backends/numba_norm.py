"""BatchNorm in training, as compiled loops: statistics, what is read through them, and their gradients.

A BatchNorm's constants are a block of `ROWS` rows of floats, each with room for a last vector: center, scale, shift,
1 / deviation, and the mean minus the center. ``(z - center) * scale + shift`` is the normalised value; the center is
the mean, rounded, so that nothing cancels where the mean is large.
"""

from __future__ import annotations

import math
from typing import Any

from fastblocks.backends.numba_kernels import round_up
from fastblocks.backends.numba_pool import first_of, kernel
from fastblocks.backends.numba_vector import (
    WIDTH,
    add,
    clamp,
    doubles_at,
    floats_at,
    fma,
    get,
    inlined,
    int64s_at,
    interleave,
    mul,
    put,
    select_inside,
    splat,
    sub,
)

__all__ = ["ROWS", "gradient_of_z", "join", "moments", "norm_backward", "norm_forward", "normalised", "receive"]

ROWS = 5
BLOCK = 128
"""Pixels that are summed in float32 before they are added to a double."""
CHANNELS = 64
"""Of an item of the loops over channels."""


@inlined
def normalised(v: Any, norm: Any, line: int, c: int) -> Any:
    """A vector of channels from `c` on, through a BatchNorm's constants."""
    return fma(sub(v, get(norm, c, WIDTH)), get(norm, line + c, WIDTH), get(norm, 2 * line + c, WIDTH))


@kernel
def moments(begin: int, end: int, context: Any) -> None:
    """Count, means and sums of squared distances from them, of the pixels of each item.

    Words: pixels, pixels an item, channels; z and its stride; where to write doubles, ``1 + 2 * channels`` an item;
    scratch of two lines of doubles and three of floats a slice.
    """
    words = int64s_at(context)
    pixels, step, channels = words[2], words[3], words[4]
    z, stride = floats_at(words[5]), words[6]
    line = round_up(channels)
    for slice_ in range(begin, end):
        lines = floats_at(words[8] + 12 * slice_ * line)
        for item in range(first_of(words, slice_), first_of(words, slice_ + 1)):
            out = doubles_at(words[7] + 8 * item * (1 + 2 * channels))
            mean, squares = (
                doubles_at(words[7] + 8 * (item * (1 + 2 * channels) + 1)),
                doubles_at(words[7] + 8 * (item * (1 + 2 * channels) + 1 + channels)),
            )
            have = 0.0
            for c in range(channels):
                mean[c] = 0.0
                squares[c] = 0.0
            last = min(pixels, (item + 1) * step)
            for first in range(item * step, last, BLOCK):
                stop = min(last, first + BLOCK)
                count = float(stop - first)
                part = splat(1.0 / count)
                for c in range(0, channels, WIDTH):
                    lanes = channels - c
                    total = splat(0.0)
                    for pixel in range(first, stop):
                        total = add(total, get(z, pixel * stride + c, lanes))
                    center = mul(total, part)
                    near, far = splat(0.0), splat(0.0)
                    for pixel in range(first, stop):
                        d = sub(get(z, pixel * stride + c, lanes), center)
                        near = add(near, d)
                        far = fma(d, d, far)
                    put(lines, c, center, WIDTH)
                    put(lines, line + c, near, WIDTH)
                    put(lines, 2 * line + c, far, WIDTH)
                share = count / (have + count)
                for c in range(channels):
                    off = lines[line + c] / count
                    d = (lines[c] + off) - mean[c]
                    mean[c] += d * share
                    squares[c] += lines[2 * line + c] - off * off * count + d * d * have * share
                have += count
            out[0] = have


@kernel
def norm_forward(begin: int, end: int, context: Any) -> None:
    """A BatchNorm's constants, of the moments of all items or of the running statistics; an item is some channels.

    Words: channels, count, items of moments (0: frozen) and where they are; weight and bias (0: none); running mean and
    variance (0: none); whether to update them, momentum, eps; the constants to write.
    """
    words = int64s_at(context)
    reals = doubles_at(context)
    channels, count, items = words[2], words[3], words[4]
    parts = doubles_at(words[5])
    gamma, beta = floats_at(words[6]), floats_at(words[7])
    running_mean, running_var = floats_at(words[8]), floats_at(words[9])
    update, momentum, eps = words[10] != 0, reals[11], reals[12]
    norm = floats_at(words[13])
    line = round_up(channels)
    for block in range(first_of(words, begin), first_of(words, end)):
        last = min(channels, (block + 1) * CHANNELS)
        for c in range(block * CHANNELS, last):
            mean, squares = 0.0, 0.0
            if items > 0:
                have = 0.0
                for item in range(items):
                    at = item * (1 + 2 * channels)
                    n = parts[at]
                    d = parts[at + 1 + c] - mean
                    share = n / (have + n)
                    mean += d * share
                    squares += parts[at + 1 + channels + c] + d * d * have * share
                    have += n
                var = squares / count
                if update:
                    unbiased = squares / (count - 1)
                    running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * mean
                    running_var[c] = (1.0 - momentum) * running_var[c] + momentum * unbiased
            else:
                mean, var = float(running_mean[c]), float(running_var[c])
            rate = 1.0 / math.sqrt(var + eps)
            scale, shift = rate, 0.0
            if words[6] != 0:
                scale *= gamma[c]
            if words[7] != 0:
                shift = float(beta[c])
            norm[c] = mean
            delta = mean - norm[c]
            norm[line + c] = scale
            norm[2 * line + c] = shift - delta * scale
            norm[3 * line + c] = rate
            norm[4 * line + c] = delta
        if last == channels:
            for row in range(ROWS):
                for c in range(channels, line):
                    norm[row * line + c] = 0.0


@kernel
def join(begin: int, end: int, context: Any) -> None:
    """``clamp(read(a) + read(b))`` of pixels, or the channels of the two by turns; one value alone is read.

    Words: pixels, pixels an item, channels; a, stride, constants of its BatchNorm (0: none), low, high; the same of b
    (no address: none); output, stride; low, high; whether by turns; four lines of scratch a slice.
    """
    words = int64s_at(context)
    reals = doubles_at(context)
    pixels, step, channels = words[2], words[3], words[4]
    a, a_stride, a_norm = floats_at(words[5]), words[6], floats_at(words[7])
    a_low, a_high = splat(reals[8]), splat(reals[9])
    b, b_stride, b_norm = floats_at(words[10]), words[11], floats_at(words[12])
    b_low, b_high = splat(reals[13]), splat(reals[14])
    y, y_stride = floats_at(words[15]), words[16]
    low, high = splat(reals[17]), splat(reals[18])
    line = round_up(channels)
    for slice_ in range(begin, end):
        room = floats_at(words[20] + 4 * slice_ * 4 * line)
        for item in range(first_of(words, slice_), first_of(words, slice_ + 1)):
            for pixel in range(item * step, min(pixels, (item + 1) * step)):
                of_a, of_b, to = pixel * a_stride, pixel * b_stride, pixel * y_stride
                for c in range(0, channels, WIDTH):
                    count = channels - c
                    v = get(a, of_a + c, count)
                    if words[7] != 0:
                        v = clamp(normalised(v, a_norm, line, c), a_low, a_high)
                    if words[10] != 0:
                        w = get(b, of_b + c, count)
                        if words[12] != 0:
                            w = clamp(normalised(w, b_norm, line, c), b_low, b_high)
                        if words[19] != 0:
                            put(room, line + c, w, WIDTH)
                        else:
                            v = add(v, w)
                    if words[19] != 0:
                        put(room, c, v, WIDTH)
                    else:
                        put(y, to + c, clamp(v, low, high), count)
                if words[19] != 0:
                    interleave(room, line, channels, room, 2 * line)
                    for c in range(0, 2 * channels, WIDTH):
                        put(y, to + c, get(room, 2 * line + c, WIDTH), 2 * channels - c)


@kernel
def receive(begin: int, end: int, context: Any) -> None:
    """A gradient that arrives at a value: added to what was there, masked by the activation, summed for the BatchNorm.

    Words: pixels, pixels an item, channels; the gradient and stride; what is added and stride (0: nothing); z and
    stride (0: no mask), its constants (0: z is the value itself), low, high; output and stride (0: only sums); where
    to write sums (0: none), ``2 * channels`` doubles an item; order of the gradient's channels (0: none): which channel
    of the value each one is; two lines of scratch a slice.
    """
    words = int64s_at(context)
    reals = doubles_at(context)
    pixels, step, channels = words[2], words[3], words[4]
    g, g_stride = floats_at(words[5]), words[6]
    more, more_stride = floats_at(words[7]), words[8]
    z, z_stride, norm = floats_at(words[9]), words[10], floats_at(words[11])
    low, high = splat(reals[12]), splat(reals[13])
    y, y_stride = floats_at(words[14]), words[15]
    order = int64s_at(words[17])
    line = round_up(channels)
    for slice_ in range(begin, end):
        lines = floats_at(words[18] + 4 * slice_ * 3 * line)
        room = floats_at(words[18] + 4 * (slice_ * 3 + 2) * line)
        for item in range(first_of(words, slice_), first_of(words, slice_ + 1)):
            sums = doubles_at(words[16] + 8 * item * 2 * channels)
            if words[16] != 0:
                for c in range(2 * channels):
                    sums[c] = 0.0
            last = min(pixels, (item + 1) * step)
            for first in range(item * step, last, BLOCK):
                stop = min(last, first + BLOCK)
                for c in range(0, 2 * line, WIDTH):
                    put(lines, c, splat(0.0), WIDTH)
                for pixel in range(first, stop):
                    of = pixel * g_stride
                    if words[17] != 0:
                        for c in range(channels):
                            room[order[c]] = g[of + c]
                    for c in range(0, channels, WIDTH):
                        count = channels - c
                        v = get(room, c, count) if words[17] != 0 else get(g, of + c, count)
                        if words[7] != 0:
                            v = add(v, get(more, pixel * more_stride + c, count))
                        if words[9] != 0:
                            w = get(z, pixel * z_stride + c, count)
                            if words[11] != 0:
                                v = select_inside(normalised(w, norm, line, c), low, high, v)
                            else:
                                v = select_inside(w, low, high, v)
                            if words[16] != 0:
                                put(lines, c, add(get(lines, c, WIDTH), v), WIDTH)
                                far = fma(v, sub(w, get(norm, c, WIDTH)), get(lines, line + c, WIDTH))
                                put(lines, line + c, far, WIDTH)
                        if words[14] != 0:
                            put(y, pixel * y_stride + c, v, count)
                if words[16] != 0:
                    for c in range(channels):
                        sums[c] += lines[c]
                        sums[channels + c] += lines[line + c]


@kernel
def norm_backward(begin: int, end: int, context: Any) -> None:
    """What makes dz of a gradient and z, ``p * g + q * (z - center) + r``, and the gradients of weight and bias.

    An item is some channels. Words: channels, count, items of sums and where they are; the BatchNorm's constants;
    whether frozen; where to write p, q and r, the gradient of the weight and that of the bias (0: none).
    """
    words = int64s_at(context)
    channels, count, items = words[2], words[3], words[4]
    parts = doubles_at(words[5])
    norm = floats_at(words[6])
    out = floats_at(words[8])
    d_gamma, d_beta = floats_at(words[9]), floats_at(words[10])
    line = round_up(channels)
    for block in range(first_of(words, begin), first_of(words, end)):
        last = min(channels, (block + 1) * CHANNELS)
        for c in range(block * CHANNELS, last):
            near, far = 0.0, 0.0
            for item in range(items):
                near += parts[item * 2 * channels + c]
                far += parts[item * 2 * channels + channels + c]
            scale, rate, delta = float(norm[line + c]), float(norm[3 * line + c]), float(norm[4 * line + c])
            far = rate * (far - delta * near)
            if words[9] != 0:
                d_gamma[c] = far
            if words[10] != 0:
                d_beta[c] = near
            slope = 0.0 if words[7] != 0 else -scale * rate * far / count
            out[c] = scale
            out[line + c] = slope
            out[2 * line + c] = 0.0 if words[7] != 0 else -scale * near / count - slope * delta
        if last == channels:
            for row in range(3):
                for c in range(channels, line):
                    out[row * line + c] = 0.0


@kernel
def gradient_of_z(begin: int, end: int, context: Any) -> None:
    """``p * g + q * (z - center) + r`` of pixels.

    Words: pixels, pixels an item, channels; g and stride; z and stride; the BatchNorm's constants; p, q and r; output
    and stride.
    """
    words = int64s_at(context)
    pixels, step, channels = words[2], words[3], words[4]
    g, g_stride = floats_at(words[5]), words[6]
    z, z_stride = floats_at(words[7]), words[8]
    norm, factors = floats_at(words[9]), floats_at(words[10])
    y, y_stride = floats_at(words[11]), words[12]
    line = round_up(channels)
    for item in range(first_of(words, begin), first_of(words, end)):
        for pixel in range(item * step, min(pixels, (item + 1) * step)):
            for c in range(0, channels, WIDTH):
                count = channels - c
                v = sub(get(z, pixel * z_stride + c, count), get(norm, c, WIDTH))
                v = fma(v, get(factors, line + c, WIDTH), get(factors, 2 * line + c, WIDTH))
                v = fma(get(g, pixel * g_stride + c, count), get(factors, c, WIDTH), v)
                put(y, pixel * y_stride + c, v, count)
