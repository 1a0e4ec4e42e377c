// Gradients of a dense k x k convolution: the windows of some output pixels are laid out in rows, (channel, row, column) each,
// and the convolution is a 1x1 one. Meant for a stem, whose input has three channels.
#pragma once

#include "outer-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// The windows of output pixels [column, column + pixels) of row `oy`, to rows of `stride` floats.
inline void window_rows(const ConvParams& p, int64_t image, int64_t oy, int64_t column, int64_t pixels, float* out,
                        int64_t stride) {
  const int64_t step = p.planar ? 1 : p.x.pixel_stride, plane = p.planar ? p.x.pixel_stride : 1;
  for (int64_t c = 0; c < p.in_channels; ++c)
    for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
      const int64_t iy = oy * p.stride[0] - p.padding[0] + ky * p.dilation[0];
      const bool inside = iy >= 0 && iy < p.height;
      const float* row = p.x.data + image * p.x.image_stride + (inside ? iy : 0) * p.x.row_stride + c * plane;
      for (int64_t kx = 0; kx < p.kernel[1]; ++kx) {
        float* to = out + (c * p.kernel[0] + ky) * p.kernel[1] + kx;
        int64_t ix = column * p.stride[1] - p.padding[1] + kx * p.dilation[1];
        for (int64_t i = 0; i < pixels; ++i, to += stride, ix += p.stride[1])
          *to = inside && ix >= 0 && ix < p.width ? row[ix * step] : 0.0f;
      }
    }
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
  const int64_t depth = q.in_channels * q.kernel[0] * q.kernel[1];
  float* dy = scratch.take<float>(p.block * p.dy_stride + kPadding);
  float* x = scratch.take<float>(p.block * p.x_stride + kPadding);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * q.out_height / p.bands, to = (band + 1) * q.out_height / p.bands;
    float* dx = p.dx ? p.dx + image * q.height * q.width * q.in_channels : nullptr;
    if (dx && !p.accumulate) __builtin_memset(dx, 0, q.height * q.width * q.in_channels * sizeof(float));
    bool add = false;
    for (int64_t oy = from; oy < to; ++oy)
      for (int64_t column = 0; column < q.out_width; column += p.block) {
        const int64_t pixels = smaller(p.block, q.out_width - column);
        read_gradient(p.dy, (image * q.out_height + oy) * q.out_width + column, pixels, q.out_channels, 0, q.out_channels, dy,
                      p.dy_stride);
        if (p.weight_partials) {
          window_rows(q, image, oy, column, pixels, x, p.x_stride);
          outer(dy, p.dy_stride, q.out_channels, x, p.x_stride, depth, pixels,
                p.weight_partials + item * q.out_channels * p.weight_stride, p.weight_stride, add);
          add = true;
        }
        if (dx) {
          product({dy, q.out_channels, p.dy_stride, 1, nullptr}, pixels, depth, p.weight, p.zeros, nullptr, 0, x, p.x_stride,
                  {});
          add_window_rows(q, oy, column, pixels, x, p.x_stride, dx);
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
  p.weight_stride = padded(depth);
  p.block = smaller(q.out_width, 128);
  p.bands = p.dx ? 1 : larger(1, smaller(q.out_height / 4, divide_up(16, q.images)));
  p.items = q.images * p.bands;
  *work = {p.items, room<float>(p.block * p.dy_stride + kPadding) + room<float>(p.block * p.x_stride + kPadding)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
