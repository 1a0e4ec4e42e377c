// Gradients of a dense k x k convolution, meant for a stem, whose input has three channels. That of the weight is a product
// over pixels, one input value times a vector of dy, straight from the image's rows. For that of the input the convolution is a
// 1x1 one of windows laid out in rows, (channel, row, column) each.
#pragma once

#include "outer-inl.h"
#include "pool-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// The input rows under output row `oy`, with zeros at both sides, as the image has them: [channel][kernel row][width], or
// [kernel row][width][channel].
inline void window_rows(const DenseGrad& p, int64_t image, int64_t oy, float* out) {
  const ConvParams& q = p.conv;
  const int64_t planes = q.planar ? q.in_channels : 1, values = q.planar ? 1 : q.in_channels;
  const int64_t width = smaller(q.width, p.row_width - q.padding[1]);
  const bool together = q.planar || q.x.pixel_stride == values;
  for (int64_t c = 0; c < planes; ++c)
    for (int64_t ky = 0; ky < q.kernel[0]; ++ky, out += p.row_width * values) {
      const int64_t iy = oy * q.stride[0] - q.padding[0] + ky * q.dilation[0];
      float* to = out + q.padding[1] * values;
      if (iy < 0 || iy >= q.height) {
        __builtin_memset(to, 0, width * values * sizeof(float));
        continue;
      }
      const float* row = q.x.data + image * q.x.image_stride + iy * q.x.row_stride + c * q.x.pixel_stride;
      if (together)
        __builtin_memcpy(to, row, width * values * sizeof(float));
      else
        for (int64_t x = 0; x < width; ++x)
          for (int64_t v = 0; v < values; ++v) to[x * values + v] = row[x * q.x.pixel_stride + v];
    }
}

constexpr int kTapRows = kRegisters == 32 ? 9 : 6;

// sums[tap][channel] += x[tap][pixel] * dy[pixel][channel] for R taps and V vectors of channels.
template <int R, int V>
inline void tap_tile(const float* const* x, int64_t x_step, const float* dy, int64_t dy_stride, int64_t pixels, float* sums,
                     int64_t sums_stride, Stream* soon) {
  const float* at[R];
  Vec sum[R][V];
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r) {
    at[r] = x[r];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = load(sums + r * sums_stride + v * kLanes);
  }
  Stream first = soon[0], second = soon[1];
  for (int64_t m = 0, i = 0; m < pixels; ++m, dy += dy_stride, i += x_step) {
    __builtin_prefetch(first.at), first.at += first.step;
    __builtin_prefetch(second.at), second.at += second.step;
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = load(dy + v * kLanes);
#pragma GCC unroll 9
    for (int r = 0; r < R; ++r) {
      const Vec a = broadcast(at[r][i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) add_product(sum[r][v], a, b[v]);
    }
  }
  soon[0].at = first.at, soon[1].at = second.at;
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(sums + r * sums_stride + v * kLanes, sum[r][v]);
}

template <int V>
FASTBLOCKS_INLINE void tap_columns(const DenseGrad& p, const float* const* taps, int64_t depth, const float* dy, int64_t pixels,
                                   float* sums, Stream* soon) {
  const int64_t step = p.conv.stride[1] * (p.conv.planar ? 1 : p.conv.in_channels);
  int64_t k = 0;
  for (; k + kTapRows <= depth; k += kTapRows)
    tap_tile<kTapRows, V>(taps + k, step, dy, p.dy_stride, pixels, sums + k * p.weight_stride, p.weight_stride, soon);
  for (; k + 3 <= depth; k += 3)
    tap_tile<3, V>(taps + k, step, dy, p.dy_stride, pixels, sums + k * p.weight_stride, p.weight_stride, soon);
  for (; k < depth; ++k)
    tap_tile<1, V>(taps + k, step, dy, p.dy_stride, pixels, sums + k * p.weight_stride, p.weight_stride, soon);
}

// The share of one output row in the gradient of the weight. The next row's g and z are fetched meanwhile.
inline void add_taps(const DenseGrad& p, const float* const* taps, int64_t depth, const float* dy, int64_t pixel,
                     int64_t pixels, float* sums) {
  const ConvParams& q = p.conv;
  const int64_t steps = larger(1, divide_up(q.out_channels, 2 * kLanes) * (depth / kTapRows) * pixels), next = pixel + pixels;
  const bool there = next + pixels <= q.images * q.out_height * q.out_width;
  Stream soon[2] = {{dy, 0}, {dy, 0}};
  if (there && p.dy.scale) soon[0] = {p.dy.z + next * q.out_channels, divide_up(pixels * q.out_channels, steps)};
  if (there && !p.pooled) soon[1] = {p.dy.g + next * p.dy.stride, divide_up(pixels * p.dy.stride, steps)};
  int64_t c = 0;
  for (; c + kLanes < q.out_channels; c += 2 * kLanes) tap_columns<2>(p, taps, depth, dy + c, pixels, sums + c, soon);
  if (c < q.out_channels) tap_columns<1>(p, taps, depth, dy + c, pixels, sums + c, soon);
}

// The way back: adds such rows to the image they were taken from, dense NHWC.
inline void add_window_rows(const ConvParams& p, int64_t oy, int64_t column, int64_t pixels, const float* rows, int64_t stride,
                            float* image) {
  for (int64_t i = 0; i < pixels; ++i, rows += stride)
    for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
      const int64_t iy = oy * p.stride[0] - p.padding[0] + ky * p.dilation[0];
      if (iy < 0 || iy >= p.height) continue;
      for (int64_t kx = 0; kx < p.kernel[1]; ++kx) {
        const int64_t ix = (column + i) * p.stride[1] - p.padding[1] + kx * p.dilation[1];
        if (ix < 0 || ix >= p.width) continue;
        float* to = image + (iy * p.width + ix) * p.in_channels;
        for (int64_t c = 0; c < p.in_channels; ++c) to[c] += rows[(c * p.kernel[0] + ky) * p.kernel[1] + kx];
      }
    }
}

inline void dense_grad_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const DenseGrad& p = *static_cast<const DenseGrad*>(params);
  const ConvParams& q = p.conv;
  Scratch scratch(memory);
  const int64_t depth = q.in_channels * q.kernel[0] * q.kernel[1], window = q.kernel[0] * q.kernel[1];
  float* dy = scratch.take<float>(q.out_width * p.dy_stride + kPadding);
  float* windows = scratch.take<float>(q.out_width * p.x_stride + kPadding);
  float* rows = scratch.take<float>(q.in_channels * q.kernel[0] * p.row_width);
  const float** taps = scratch.take<const float*>(depth);
  float* g = scratch.take<float>(p.pooled ? q.out_width * p.dy_stride + kPadding : 0);
  __builtin_memset(rows, 0, q.in_channels * q.kernel[0] * p.row_width * sizeof(float));
  for (int64_t k = 0; k < depth; ++k) {  // (channel, row, column)
    const int64_t c = k / window, ky = k % window / q.kernel[1], kx = k % q.kernel[1] * q.dilation[1];
    taps[k] = rows + (q.planar ? (c * q.kernel[0] + ky) * p.row_width + kx : (ky * p.row_width + kx) * q.in_channels + c);
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * q.out_height / p.bands, to = (band + 1) * q.out_height / p.bands;
    float* dx = p.dx ? p.dx + image * q.height * q.width * q.in_channels : nullptr;
    if (dx && !p.accumulate) __builtin_memset(dx, 0, q.height * q.width * q.in_channels * sizeof(float));
    float* sums = p.weight_partials ? p.weight_partials + item * depth * p.weight_stride : nullptr;
    if (sums) __builtin_memset(sums, 0, depth * p.weight_stride * sizeof(float));
    for (int64_t oy = from; oy < to; ++oy) {
      const int64_t pixel = (image * q.out_height + oy) * q.out_width;
      if (p.pooled) {
        __builtin_memset(g, 0, q.out_width * p.dy_stride * sizeof(float));
        add_pool_grad(p.pool, image, oy, g, p.dy_stride);
        read_gradient_from(g, p.dy_stride, p.dy.z + pixel * q.out_channels, q.out_channels, p.dy, q.out_width, 0,
                           q.out_channels, dy, p.dy_stride);
      } else {
        read_gradient(p.dy, pixel, q.out_width, q.out_channels, 0, q.out_channels, dy, p.dy_stride);
      }
      if (sums) {
        window_rows(p, image, oy, rows);
        add_taps(p, taps, depth, dy, pixel, q.out_width, sums);
      }
      if (dx) {
        product({dy, q.out_channels, p.dy_stride, 1, nullptr}, q.out_width, depth, p.weight, p.zeros, nullptr, 0, windows,
                p.x_stride, {});
        add_window_rows(q, oy, 0, q.out_width, windows, p.x_stride, dx);
      }
    }
  }
}

inline void dense_grad_prepare(void* params, TrainWork* work) {
  DenseGrad& p = *static_cast<DenseGrad*>(params);
  const ConvParams& q = p.conv;
  const int64_t depth = q.in_channels * q.kernel[0] * q.kernel[1];
  p.dy_stride = panel_row(q.out_channels);
  p.x_stride = panel_row(depth);
  p.weight_stride = padded(q.out_channels);
  p.row_width = q.padding[1] + larger(q.width, (q.out_width - 1) * q.stride[1] + (q.kernel[1] - 1) * q.dilation[1] + 1);
  p.bands = p.dx ? 1 : larger(1, smaller(q.out_height / 4, divide_up(16, q.images)));
  p.items = q.images * p.bands;
  *work = {p.items, room<float>(q.out_width * p.dy_stride + kPadding) + room<float>(q.out_width * p.x_stride + kPadding) +
                        room<float>(q.in_channels * q.kernel[0] * p.row_width) + room<float*>(depth) +
                        room<float>(p.pooled ? q.out_width * p.dy_stride + kPadding : 0)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
