// Pooling in training: the maximum remembers which tap won, a byte a value; the mean counts padding, as zeros.
#pragma once

#include "common-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

typedef int32_t Indices __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES)));

FASTBLOCKS_INLINE Vec read_vector(const Source& s, const float* z, int64_t c, int lanes, Vec low, Vec high) {
  const Vec v = load_some(z + c, lanes);
  return clamped(s.norm.mean ? normalised(v, s.norm, c) : v, low, high);
}

// One output pixel whose window begins at input pixel (y, x), which may lie outside.
inline void pool_pixel(const TrainPool& p, int64_t image, int64_t y, int64_t x, float* out, unsigned char* places) {
  const Vec low = broadcast(p.x.clamp.low), high = broadcast(p.x.clamp.high);
  const float share = 1.0f / (float)(p.kernel[0] * p.kernel[1]);
  for_channels(p.channels, [&](int64_t c, auto lanes) {
    Vec best = broadcast(p.average ? 0.0f : -__builtin_inff());
    Indices place{};
    bool none = true;
    for (int64_t ky = 0; ky < p.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < p.kernel[1]; ++kx) {
        const int64_t iy = y + ky, ix = x + kx;
        if (iy < 0 || iy >= p.height || ix < 0 || ix >= p.width) continue;
        const Vec v = read_vector(p.x, p.x.data + ((image * p.height + iy) * p.width + ix) * p.x.stride, c, lanes, low, high);
        if (p.average) {
          best += v;
          continue;
        }
        const int tap = (int)(ky * p.kernel[1] + kx);
        const Indices wins = none ? ~Indices{} : (Indices)((v > best) | (v != v));
        best = (Vec)(((Indices)v & wins) | ((Indices)best & ~wins));
        place = ((Indices{} + tap) & wins) | (place & ~wins);
        none = false;
      }
    store_some(out + c, lanes, p.average ? best * broadcast(share) : best);
    if (!p.average)
      for (int i = 0; i < lanes; ++i) places[c + i] = (unsigned char)place[i];
  });
}

FASTBLOCKS_INLINE void pool_rows(const TrainPool& p, int64_t item, int64_t height, int64_t* image, int64_t* from, int64_t* to) {
  const int64_t band = item % p.bands;
  *image = item / p.bands;
  *from = band * height / p.bands;
  *to = (band + 1) * height / p.bands;
}

inline void train_pool_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const TrainPool& p = *static_cast<const TrainPool*>(params);
  for (int64_t item = begin; item < end; ++item) {
    int64_t image, from, to;
    pool_rows(p, item, p.out_height, &image, &from, &to);
    for (int64_t oy = from; oy < to; ++oy)
      for (int64_t ox = 0; ox < p.out_width; ++ox) {
        const int64_t pixel = (image * p.out_height + oy) * p.out_width + ox;
        pool_pixel(p, image, oy * p.stride[0] - p.padding[0], ox * p.stride[1] - p.padding[1], p.y + pixel * p.y_stride,
                   p.places ? p.places + pixel * p.channels : nullptr);
      }
  }
}

FASTBLOCKS_INLINE void cut_pool(TrainPool& p, int64_t rows) {
  p.bands = larger(1, smaller(rows / 4, divide_up(16, p.images)));
  p.items = p.images * p.bands;
}

inline void train_pool_prepare(void* params, TrainWork* work) {
  TrainPool& p = *static_cast<TrainPool*>(params);
  cut_pool(p, p.out_height);
  *work = {p.items, 0};
}

// The windows that reach an input column or row: output positions [*first, *last].
FASTBLOCKS_INLINE void pool_windows(int64_t at, int64_t kernel, int64_t stride, int64_t padding, int64_t out, int64_t* first,
                                    int64_t* last) {
  *first = larger(0, divide_up(larger(0, at + padding - kernel + 1), stride));
  *last = smaller(out - 1, (at + padding) / stride);
}

inline void pool_grad_pixel(const TrainPool& p, int64_t image, int64_t y, int64_t x, float* out) {
  int64_t y0, y1, x0, x1;
  pool_windows(y, p.kernel[0], p.stride[0], p.padding[0], p.out_height, &y0, &y1);
  pool_windows(x, p.kernel[1], p.stride[1], p.padding[1], p.out_width, &x0, &x1);
  const float share = 1.0f / (float)(p.kernel[0] * p.kernel[1]);
  const int64_t pixel = (image * p.height + y) * p.width + x;
  for_channels(p.channels, [&](int64_t c, auto lanes) {
    Vec sum{};
    for (int64_t oy = y0; oy <= y1; ++oy)
      for (int64_t ox = x0; ox <= x1; ++ox) {
        const int64_t from = (image * p.out_height + oy) * p.out_width + ox;
        const Vec g = load_some(p.y + from * p.y_stride + c, lanes);
        if (p.average) {
          sum += g * broadcast(share);
          continue;
        }
        const int tap = (int)((y + p.padding[0] - oy * p.stride[0]) * p.kernel[1] + x + p.padding[1] - ox * p.stride[1]);
        Indices place = Indices{} - 1;
        for (int i = 0; i < lanes; ++i) place[i] = p.places[from * p.channels + c + i];
        sum += (Vec)((Indices)g & (Indices)(place == (Indices{} + tap)));
      }
    if (p.addend) sum += load_some(p.addend + pixel * p.addend_stride + c, lanes);
    store(out + c, sum);
  });
}

inline void pool_grad_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainPool& p = *static_cast<const TrainPool*>(params);
  Scratch scratch(memory);
  const int64_t stride = round_up(p.channels, kLanes);
  float* row = scratch.take<float>(p.width * stride + kPadding);
  Sums sums(p.channels, scratch);
  for (int64_t item = begin; item < end; ++item) {
    int64_t image, from, to;
    pool_rows(p, item, p.height, &image, &from, &to);
    sums.clear(p.channels);
    for (int64_t y = from; y < to; ++y) {
      for (int64_t x = 0; x < p.width; ++x) pool_grad_pixel(p, image, y, x, row + x * stride);
      const int64_t pixel = (image * p.height + y) * p.width;
      finish(p.finish, row, stride, p.dx + pixel * p.dx_stride, p.dx_stride, pixel, p.width, 0, p.channels, sums);
    }
    if (p.finish.partials) sums.write(p.channels, p.finish.partials + item * 2 * padded(p.channels));
  }
}

inline void pool_grad_prepare(void* params, TrainWork* work) {
  TrainPool& p = *static_cast<TrainPool*>(params);
  cut_pool(p, p.height);
  *work = {p.items, room<float>(p.width * round_up(p.channels, kLanes) + kPadding) + Sums::bytes(p.channels)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
