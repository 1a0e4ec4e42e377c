"""Compiled loops around the products: BatchNorm, residual and activation; shuffles; pools.

Tensors come as an address and strides in floats, channels dense. Indices are 64 bits wide.
"""

from __future__ import annotations

import math
from typing import Any

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
    maximum,
    mul,
    put,
    splat,
)

__all__ = ["finish", "fold", "global_mean", "pack_taps", "permute", "pool", "round_up"]

FOLD_WORDS = 8


@inlined
def round_up(channels: int) -> int:
    """Channels with room for a last vector."""
    return (channels + WIDTH - 1) // WIDTH * WIDTH


@kernel
def fold(begin: int, end: int, context: Any) -> None:
    """Scale and shift of convolutions with BatchNorm by its running statistics.

    An item has the words: channels, bias, mean, variance, weight, bias of the BatchNorm (0 for none; no mean: no
    BatchNorm), eps, and where to write: the scale, and the shift behind it.
    """
    words = int64s_at(context)
    reals = doubles_at(context)
    for item in range(words[0]):
        at = 2 + item * FOLD_WORDS
        channels = words[at]
        bias, mean, var = floats_at(words[at + 1]), floats_at(words[at + 2]), floats_at(words[at + 3])
        gamma, beta = floats_at(words[at + 4]), floats_at(words[at + 5])
        eps = reals[at + 6]
        scales = floats_at(words[at + 7])
        room = round_up(channels)
        for c in range(channels):
            scale = 1.0
            shift = 0.0
            if words[at + 1] != 0:
                shift = float(bias[c])
            if words[at + 2] != 0:
                scale = 1.0 / math.sqrt(float(var[c]) + eps)
                if words[at + 4] != 0:
                    scale *= gamma[c]
                shift = (shift - mean[c]) * scale
                if words[at + 5] != 0:
                    shift += beta[c]
            scales[c] = scale
            scales[room + c] = shift
        for c in range(channels, room):
            scales[c] = 0.0
            scales[room + c] = 0.0


@kernel
def pack_taps(begin: int, end: int, context: Any) -> None:
    """The taps of a depthwise weight, channels dense: an item is a tap.

    Words: weight, its strides over channels, rows and columns, columns, channels, scale (0: none), where to write.
    """
    words = int64s_at(context)
    weight = floats_at(words[2])
    columns, channels = words[6], words[7]
    room = round_up(channels)
    scale = floats_at(words[8])
    taps = floats_at(words[9])
    for tap in range(words[0]):
        at = tap // columns * words[4] + tap % columns * words[5]
        to = tap * room
        for c in range(channels):
            taps[to + c] = weight[at + c * words[3]]
        if words[8] != 0:
            for c in range(channels):
                taps[to + c] *= scale[c]
        for c in range(channels, room):
            taps[to + c] = 0.0


@kernel
def finish(begin: int, end: int, context: Any) -> None:
    """``clamp(z * scale + shift + residual)`` of pixels, the channels in an order of their own where there is one.

    Words: pixels, pixels an item, channels; z and stride; scale and shift (0: none); residual (0: none) and stride;
    output and stride; low, high; order (0: none) and room for a pixel of each slice.
    """
    words = int64s_at(context)
    reals = doubles_at(context)
    pixels, step, channels = words[2], words[3], words[4]
    z, z_stride = floats_at(words[5]), words[6]
    scale, shift = floats_at(words[7]), floats_at(words[8])
    residual, residual_stride = floats_at(words[9]), words[10]
    out, out_stride = floats_at(words[11]), words[12]
    low, high = splat(reals[13]), splat(reals[14])
    order = int64s_at(words[15])
    for slice_ in range(begin, end):
        room = floats_at(words[16] + 4 * slice_ * round_up(channels))
        for item in range(first_of(words, slice_), first_of(words, slice_ + 1)):
            for pixel in range(item * step, min(pixels, (item + 1) * step)):
                of = pixel * z_stride
                to = pixel * out_stride
                add_of = pixel * residual_stride
                for c in range(0, channels, WIDTH):
                    count = channels - c
                    v = get(z, of + c, count)
                    if words[7] != 0:
                        v = fma(v, get(scale, c, WIDTH), get(shift, c, WIDTH))
                    if words[9] != 0:
                        v = add(v, get(residual, add_of + c, count))
                    v = clamp(v, low, high)
                    if words[15] != 0:
                        put(room, c, v, count)
                    else:
                        put(out, to + c, v, count)
                if words[15] != 0:
                    for c in range(channels):
                        out[to + c] = room[order[c]]


@kernel
def permute(begin: int, end: int, context: Any) -> None:
    """Channels of one or two inputs together, in another order, to one or two outputs.

    Words: pixels, pixels an item; input, stride and channels, twice (second 0: none); the order, by which channel of
    the inputs each channel of the outputs is (0: the two halves by turns); output, stride and channels, twice; room for
    two pixels of each slice.
    """
    words = int64s_at(context)
    pixels, step = words[2], words[3]
    a, a_stride, a_channels = floats_at(words[4]), words[5], words[6]
    b, b_stride, b_channels = floats_at(words[7]), words[8], words[9]
    order = int64s_at(words[10])
    y, y_stride, y_channels = floats_at(words[11]), words[12], words[13]
    w, w_stride, w_channels = floats_at(words[14]), words[15], words[16]
    for slice_ in range(begin, end):
        # the second half of the inputs' channels may begin amid a vector, and reads and writes whole ones
        line = round_up(a_channels + b_channels) + 2 * WIDTH
        room = floats_at(words[17] + 4 * slice_ * 2 * line)
        turns = floats_at(words[17] + 4 * (slice_ * 2 + 1) * line)
        half = (a_channels + b_channels) // 2
        for item in range(first_of(words, slice_), first_of(words, slice_ + 1)):
            for pixel in range(item * step, min(pixels, (item + 1) * step)):
                of = pixel * a_stride
                for c in range(0, a_channels, WIDTH):
                    put(room, c, get(a, of + c, a_channels - c), a_channels - c)
                of = pixel * b_stride
                for c in range(0, b_channels, WIDTH):
                    put(room, a_channels + c, get(b, of + c, b_channels - c), b_channels - c)
                to = pixel * y_stride
                if words[10] == 0:
                    interleave(room, half, half, turns, 0)
                    for c in range(0, y_channels, WIDTH):
                        put(y, to + c, get(turns, c, WIDTH), y_channels - c)
                    to = pixel * w_stride
                    for c in range(0, w_channels, WIDTH):
                        put(w, to + c, get(turns, y_channels + c, WIDTH), w_channels - c)
                    continue
                for c in range(y_channels):
                    y[to + c] = room[order[c]]
                to = pixel * w_stride
                for c in range(w_channels):
                    w[to + c] = room[order[y_channels + c]]


@kernel
def pool(begin: int, end: int, context: Any) -> None:
    """The largest value or the mean of windows; an item is an output row of an image.

    Words: largest (else mean); input, strides of images, rows and pixels, height, width; channels; output, strides of
    images, rows and pixels, height, width; kernel, stride and padding, each twice.
    """
    words = int64s_at(context)
    x, x_image, x_row, x_pixel, height, width = floats_at(words[3]), words[4], words[5], words[6], words[7], words[8]
    channels = words[9]
    y, y_image, y_row, y_pixel, out_height, out_width = (
        floats_at(words[10]),
        words[11],
        words[12],
        words[13],
        words[14],
        words[15],
    )
    kernel_h, kernel_w, stride_h, stride_w = words[16], words[17], words[18], words[19]
    largest = words[2] != 0
    start = splat(-math.inf if largest else 0.0)
    part = splat(1.0 / (kernel_h * kernel_w))
    for item in range(first_of(words, begin), first_of(words, end)):
        image, row = item // out_height, item % out_height
        top = row * stride_h - words[20]
        first_row, last_row = max(top, 0), min(top + kernel_h, height)
        for column in range(out_width):
            left = column * stride_w - words[21]
            first_column, last_column = max(left, 0), min(left + kernel_w, width)
            to = image * y_image + row * y_row + column * y_pixel
            for c in range(0, channels, WIDTH):
                count = channels - c
                v = start
                for i in range(first_row, last_row):
                    of = image * x_image + i * x_row + c
                    for j in range(first_column, last_column):
                        found = get(x, of + j * x_pixel, count)
                        v = maximum(v, found) if largest else add(v, found)
                if not largest:
                    v = mul(v, part)
                put(y, to + c, v, count)


@kernel
def global_mean(begin: int, end: int, context: Any) -> None:
    """The mean of all pixels; an item is a vector of channels of an image.

    Words: input, strides of images, rows and pixels; height, width, channels; output and its stride of images.
    """
    words = int64s_at(context)
    x, x_image, x_row, x_pixel = floats_at(words[2]), words[3], words[4], words[5]
    height, width, channels = words[6], words[7], words[8]
    y, y_image = floats_at(words[9]), words[10]
    blocks = (channels + WIDTH - 1) // WIDTH
    part = splat(1.0 / (height * width))
    for item in range(first_of(words, begin), first_of(words, end)):
        image, c = item // blocks, item % blocks * WIDTH
        count = channels - c
        # rows are summed one by one: a long sum of floats would lose digits
        v = splat(0.0)
        for i in range(height):
            of = image * x_image + i * x_row + c
            line = splat(0.0)
            for j in range(width):
                line = add(line, get(x, of + j * x_pixel, count))
            v = add(v, line)
        put(y, image * y_image + c, mul(v, part), count)
