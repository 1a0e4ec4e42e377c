"""Depthwise convolution: an item is a band of output rows of an image, read through a ring of input rows."""

from __future__ import annotations

from typing import Any

from fastblocks.backends.numba_kernels import round_up
from fastblocks.backends.numba_pool import first_of, kernel
from fastblocks.backends.numba_vector import (
    WIDTH,
    beyond,
    clamp,
    doubles_at,
    floats_at,
    fma,
    get,
    inlined,
    int64s_at,
    opaque,
    put,
    splat,
    sub,
)

__all__ = ["depthwise", "depthwise_weight"]


@inlined
def zero(to: Any, at: int, count: int) -> None:
    """Write zeros, whole vectors of them."""
    nothing = splat(0.0)
    for i in range(0, count, WIDTH):
        put(to, at + i, nothing, WIDTH)


@inlined
def load_row(
    ring: Any, to: int, x: Any, of: int, pixel: int, width: int, channels: int, scale: Any, shift: Any, normed: bool,
    center: Any, centered: bool, low: Any, high: Any, order: Any, ordered: bool, room: Any,
) -> None:  # fmt: skip
    """A row of an input as it is read: normalised, activated, its channels in an order of their own."""
    line = round_up(channels)
    for j in range(width):
        at = of + j * pixel
        for c in range(0, channels, WIDTH):
            v = get(x, at + c, channels - c)
            if centered:
                v = sub(v, get(center, c, WIDTH))
            if normed:
                v = clamp(fma(v, get(scale, c, WIDTH), get(shift, c, WIDTH)), low, high)
            if ordered:
                put(room, c, v, WIDTH)
            else:
                put(ring, to + c, v, WIDTH)
        if ordered:
            for c in range(channels):
                ring[to + c] = room[order[c]]
            for c in range(channels, line):
                ring[to + c] = 0.0
        to += line


@inlined
def load_gradient_row(
    ring: Any, to: int, g: Any, of: int, pixel: int, z: Any, z_of: int, z_pixel: int, width: int, spread: int,
    channels: int, center: Any, factors: Any,
) -> None:  # fmt: skip
    """A row of dz, made of a gradient and z, with room for `spread - 1` zeros behind each pixel."""
    line = round_up(channels)
    for j in range(width):
        for c in range(0, channels, WIDTH):
            count = channels - c
            v = sub(get(z, z_of + j * z_pixel + c, count), get(center, c, WIDTH))
            v = fma(v, get(factors, line + c, WIDTH), get(factors, 2 * line + c, WIDTH))
            v = fma(get(g, of + j * pixel + c, count), get(factors, c, WIDTH), v)
            put(ring, to + j * spread * line + c, v, WIDTH)


@inlined
def _row_of_nine(
    ring: Any, r0: int, r1: int, r2: int, step: int, apart: int, taps: Any, start: Any, started: bool, channels: int,
    low: Any, high: Any, y: Any, to: int, y_pixel: int, width: int,
) -> None:  # fmt: skip
    """One output row of a 3x3 kernel, its taps in registers."""
    line = round_up(channels)
    for c in range(0, channels, WIDTH):
        count = channels - c
        w0, w1, w2 = get(taps, c, WIDTH), get(taps, line + c, WIDTH), get(taps, 2 * line + c, WIDTH)
        w3, w4, w5 = get(taps, 3 * line + c, WIDTH), get(taps, 4 * line + c, WIDTH), get(taps, 5 * line + c, WIDTH)
        w6, w7, w8 = get(taps, 6 * line + c, WIDTH), get(taps, 7 * line + c, WIDTH), get(taps, 8 * line + c, WIDTH)
        base = get(start, c, WIDTH) if started else splat(0.0)
        p0, p1, p2 = beyond(ring, r0 + c), beyond(ring, r0 + apart + c), beyond(ring, r0 + 2 * apart + c)
        p3, p4, p5 = beyond(ring, r1 + c), beyond(ring, r1 + apart + c), beyond(ring, r1 + 2 * apart + c)
        p6, p7, p8 = beyond(ring, r2 + c), beyond(ring, r2 + apart + c), beyond(ring, r2 + 2 * apart + c)
        at = 0
        for j in range(width):
            v = fma(get(p0, at, WIDTH), w0, base)
            v = fma(get(p1, at, WIDTH), w1, v)
            v = fma(get(p2, at, WIDTH), w2, v)
            v = fma(get(p3, at, WIDTH), w3, v)
            v = fma(get(p4, at, WIDTH), w4, v)
            v = fma(get(p5, at, WIDTH), w5, v)
            v = fma(get(p6, at, WIDTH), w6, v)
            v = fma(get(p7, at, WIDTH), w7, v)
            v = fma(get(p8, at, WIDTH), w8, v)
            at = opaque(at + step)
            put(y, to + j * y_pixel + c, clamp(v, low, high), count)


@inlined
def _row(
    ring: Any, row: int, span: int, length: int, kernel_h: int, kernel_w: int, dilation_h: int, step: int, apart: int,
    taps: Any, start: Any, started: bool, channels: int, low: Any, high: Any, y: Any, to: int, y_pixel: int,
    width: int,
) -> None:  # fmt: skip
    """One output row of any kernel; `row` is the first input row, counted from the padding's."""
    line = round_up(channels)
    for c in range(0, channels, WIDTH):
        count = channels - c
        base = get(start, c, WIDTH) if started else splat(0.0)
        for j in range(width):
            v = base
            for ky in range(kernel_h):
                at = (row + ky * dilation_h) % span * length + j * step + c
                tap = ky * kernel_w * line + c
                for kx in range(kernel_w):
                    v = fma(get(ring, at + kx * apart, WIDTH), get(taps, tap + kx * line, WIDTH), v)
            put(y, to + j * y_pixel + c, clamp(v, low, high), count)


@kernel
def depthwise(begin: int, end: int, context: Any) -> None:
    """``clamp(conv(act(x * scale + shift)) + start)``.

    Words: input, strides of images, rows and pixels, height, width; channels; output, strides of images, rows and
    pixels, height, width; kernel, stride, padding and dilation, each twice; bands an image; taps; start (0: none);
    scale and shift (0: none), low, high of the input; order of its channels (0: none); low, high of the output;
    scratch and floats a slice; center of the input (0: none); z (0: none), strides of images, rows and pixels, factors;
    spread, twice.

    With z the input is a gradient, and what is convolved is dz, its pixels `spread` apart and zeros between them:
    height and width are dz's before that. So the gradient of the input is a convolution, too.
    """
    words = int64s_at(context)
    reals = doubles_at(context)
    x, x_image, x_row, x_pixel, height, width = floats_at(words[2]), words[3], words[4], words[5], words[6], words[7]
    channels = words[8]
    y, y_image, y_row, y_pixel, out_height, out_width = (
        floats_at(words[9]),
        words[10],
        words[11],
        words[12],
        words[13],
        words[14],
    )
    kernel_h, kernel_w, stride_h, stride_w = words[15], words[16], words[17], words[18]
    padding_h, padding_w, dilation_h, dilation_w = words[19], words[20], words[21], words[22]
    bands = words[23]
    taps, start, started = floats_at(words[24]), floats_at(words[25]), words[25] != 0
    scale, shift, normed = floats_at(words[26]), floats_at(words[27]), words[26] != 0
    in_low, in_high = splat(reals[28]), splat(reals[29])
    order, ordered = int64s_at(words[30]), words[30] != 0
    low, high = splat(reals[31]), splat(reals[32])
    line = round_up(channels)
    span = (kernel_h - 1) * dilation_h + 1
    center, centered = floats_at(words[35]), words[35] != 0
    z, z_image, z_row, z_pixel, factors = floats_at(words[36]), words[37], words[38], words[39], floats_at(words[40])
    spread_h, spread_w = words[41], words[42]
    rows = (height - 1) * spread_h + 1
    columns = (width - 1) * spread_w + 1
    # the gradient of what no output reads lies beyond dz and its padding
    length = max(columns + 2 * padding_w, (out_width - 1) * stride_w + (kernel_w - 1) * dilation_w + 1) * line
    for slice_ in range(begin, end):
        ring = floats_at(words[33] + 4 * slice_ * words[34])
        room = floats_at(words[33] + 4 * (slice_ * words[34] + span * length))
        for i in range(span):
            zero(ring, i * length, length)
        for item in range(first_of(words, slice_), first_of(words, slice_ + 1)):
            image, band = item // bands, item % bands
            have = 0  # rows before this one, counted from the padding's first, are in the ring or no longer needed
            for row in range(out_height * band // bands, out_height * (band + 1) // bands):
                first = row * stride_h
                for i in range(max(have, first), first + span):
                    to = i % span * length + padding_w * line
                    at = i - padding_h
                    if at < 0 or at >= rows or at % spread_h != 0:
                        zero(ring, to, columns * line)
                    elif words[36] != 0:
                        at = at // spread_h
                        load_gradient_row(
                            ring, to, x, image * x_image + at * x_row, x_pixel, z, image * z_image + at * z_row,
                            z_pixel, width, spread_w, channels, center, factors,
                        )  # fmt: skip
                    else:
                        load_row(
                            ring, to, x, image * x_image + at * x_row, x_pixel, width, channels, scale, shift, normed,
                            center, centered, in_low, in_high, order, ordered, room,
                        )  # fmt: skip
                have = first + span
                at = image * y_image + row * y_row
                if kernel_h == 3 and kernel_w == 3:
                    _row_of_nine(
                        ring, first % span * length, (first + dilation_h) % span * length,
                        (first + 2 * dilation_h) % span * length, stride_w * line, dilation_w * line, taps, start,
                        started, channels, low, high, y, at, y_pixel, out_width,
                    )  # fmt: skip
                else:
                    _row(
                        ring, first, span, length, kernel_h, kernel_w, dilation_h, stride_w * line, dilation_w * line,
                        taps, start, started, channels, low, high, y, at, y_pixel, out_width,
                    )  # fmt: skip


@inlined
def _weight_of_nine(
    ring: Any, r0: int, r1: int, r2: int, step: int, apart: int, dz: Any, width: int, channels: int, sums: Any
) -> None:
    """What one output row adds to the gradient of nine taps."""
    line = round_up(channels)
    for c in range(0, channels, WIDTH):
        w0, w1, w2 = get(sums, c, WIDTH), get(sums, line + c, WIDTH), get(sums, 2 * line + c, WIDTH)
        w3, w4, w5 = get(sums, 3 * line + c, WIDTH), get(sums, 4 * line + c, WIDTH), get(sums, 5 * line + c, WIDTH)
        w6, w7, w8 = get(sums, 6 * line + c, WIDTH), get(sums, 7 * line + c, WIDTH), get(sums, 8 * line + c, WIDTH)
        p0, p1, p2 = beyond(ring, r0 + c), beyond(ring, r0 + apart + c), beyond(ring, r0 + 2 * apart + c)
        p3, p4, p5 = beyond(ring, r1 + c), beyond(ring, r1 + apart + c), beyond(ring, r1 + 2 * apart + c)
        p6, p7, p8 = beyond(ring, r2 + c), beyond(ring, r2 + apart + c), beyond(ring, r2 + 2 * apart + c)
        at = 0
        for j in range(width):
            v = get(dz, j * line + c, WIDTH)
            w0 = fma(get(p0, at, WIDTH), v, w0)
            w1 = fma(get(p1, at, WIDTH), v, w1)
            w2 = fma(get(p2, at, WIDTH), v, w2)
            w3 = fma(get(p3, at, WIDTH), v, w3)
            w4 = fma(get(p4, at, WIDTH), v, w4)
            w5 = fma(get(p5, at, WIDTH), v, w5)
            w6 = fma(get(p6, at, WIDTH), v, w6)
            w7 = fma(get(p7, at, WIDTH), v, w7)
            w8 = fma(get(p8, at, WIDTH), v, w8)
            at = opaque(at + step)
        put(sums, c, w0, WIDTH)
        put(sums, line + c, w1, WIDTH)
        put(sums, 2 * line + c, w2, WIDTH)
        put(sums, 3 * line + c, w3, WIDTH)
        put(sums, 4 * line + c, w4, WIDTH)
        put(sums, 5 * line + c, w5, WIDTH)
        put(sums, 6 * line + c, w6, WIDTH)
        put(sums, 7 * line + c, w7, WIDTH)
        put(sums, 8 * line + c, w8, WIDTH)


@kernel
def depthwise_weight(begin: int, end: int, context: Any) -> None:
    """The gradient of a depthwise weight, in parts: an item is a band of output rows of an image.

    Words: input, strides of images, rows and pixels, height, width; channels; gradient, strides of images, rows and
    pixels, height, width; kernel, stride, padding and dilation, each twice; bands an image; scale and shift (0: none),
    center (0: none), low, high of the input; order of its channels (0: none); z, strides of images, rows and pixels,
    center, factors; where to write the parts, taps times channels each; scratch and floats a slice.
    """
    words = int64s_at(context)
    reals = doubles_at(context)
    x, x_image, x_row, x_pixel, height, width = floats_at(words[2]), words[3], words[4], words[5], words[6], words[7]
    channels = words[8]
    g, g_image, g_row, g_pixel, out_height, out_width = (
        floats_at(words[9]),
        words[10],
        words[11],
        words[12],
        words[13],
        words[14],
    )
    kernel_h, kernel_w, stride_h, stride_w = words[15], words[16], words[17], words[18]
    padding_h, padding_w, dilation_h, dilation_w = words[19], words[20], words[21], words[22]
    bands = words[23]
    scale, shift, normed = floats_at(words[24]), floats_at(words[25]), words[24] != 0
    center, centered = floats_at(words[26]), words[26] != 0
    low, high = splat(reals[27]), splat(reals[28])
    order, ordered = int64s_at(words[29]), words[29] != 0
    z, z_image, z_row, z_pixel = floats_at(words[30]), words[31], words[32], words[33]
    z_center, factors = floats_at(words[34]), floats_at(words[35])
    line = round_up(channels)
    length = (width + 2 * padding_w) * line
    span = (kernel_h - 1) * dilation_h + 1
    step, apart = stride_w * line, dilation_w * line
    for slice_ in range(begin, end):
        memory = words[37] + 4 * slice_ * words[38]
        ring = floats_at(memory)
        room = floats_at(memory + 4 * span * length)
        dz = floats_at(memory + 4 * (span * length + line))
        zero(ring, 0, span * length)
        for item in range(first_of(words, slice_), first_of(words, slice_ + 1)):
            image, band = item // bands, item % bands
            sums = floats_at(words[36] + 4 * item * kernel_h * kernel_w * line)
            zero(sums, 0, kernel_h * kernel_w * line)
            have = 0
            for row in range(out_height * band // bands, out_height * (band + 1) // bands):
                first = row * stride_h
                for i in range(max(have, first), first + span):
                    to = i % span * length + padding_w * line
                    at = i - padding_h
                    if at < 0 or at >= height:
                        zero(ring, to, width * line)
                    else:
                        load_row(
                            ring, to, x, image * x_image + at * x_row, x_pixel, width, channels, scale, shift, normed,
                            center, centered, low, high, order, ordered, room,
                        )  # fmt: skip
                have = first + span
                load_gradient_row(
                    dz, 0, g, image * g_image + row * g_row, g_pixel, z, image * z_image + row * z_row, z_pixel,
                    out_width, 1, channels, z_center, factors,
                )  # fmt: skip
                if kernel_h == 3 and kernel_w == 3:
                    _weight_of_nine(
                        ring, first % span * length, (first + dilation_h) % span * length,
                        (first + 2 * dilation_h) % span * length, step, apart, dz, out_width, channels, sums,
                    )  # fmt: skip
                else:
                    for tap in range(kernel_h * kernel_w):
                        of = (first + tap // kernel_w * dilation_h) % span * length + tap % kernel_w * apart
                        for c in range(0, channels, WIDTH):
                            v = get(sums, tap * line + c, WIDTH)
                            for j in range(out_width):
                                v = fma(get(ring, of + j * step + c, WIDTH), get(dz, j * line + c, WIDTH), v)
                            put(sums, tap * line + c, v, WIDTH)
