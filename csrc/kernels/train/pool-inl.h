// Pooling in training: the maximum remembers which tap won, a byte a value; the mean counts padding, as zeros.
#pragma once

#include "common-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

typedef int32_t Indices __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES)));
typedef unsigned char Bytes __attribute__((vector_size(kLanes)));

FASTBLOCKS_INLINE void store_places(unsigned char* to, int lanes, Indices place) {
  const Bytes bytes = __builtin_convertvector(place, Bytes);
  __builtin_memcpy(to, &bytes, lanes);
}

FASTBLOCKS_INLINE Indices load_places(const unsigned char* from, int lanes) {
  Bytes bytes{};
  __builtin_memcpy(&bytes, from, lanes);
  return __builtin_convertvector(bytes, Indices);
}

// One output pixel whose window begins at column `x`, which may lie outside. rows: of the window, null where outside.
template <bool kAverage>
FASTBLOCKS_INLINE void pool_pixel(const TrainPool& p, const float* const* rows, int64_t row_stride, int64_t x, float* out,
                                  unsigned char* places) {
  const Vec share = broadcast(1.0f / (float)(p.kernel[0] * p.kernel[1]));
  const int64_t first = larger(0, -x), last = smaller(p.kernel[1], p.width - x);
  for_channels(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    Vec best = broadcast(kAverage ? 0.0f : -__builtin_inff());
    // Where all are -inf, the first tap that is there wins.
    Indices place = Indices{} - 1;
    for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
      if (!rows[ky]) continue;
      const float* at = rows[ky] + (x + first) * row_stride + c;
      for (int64_t kx = first; kx < last; ++kx, at += row_stride) {
        const Vec v = load_some(at, lanes);
        if (kAverage) {
          best += v;
          continue;
        }
        const Indices wins = (Indices)((v > best) | (v != v)) | (place < 0);
        best = (Vec)(((Indices)v & wins) | ((Indices)best & ~wins));
        place = ((Indices{} + (int)(ky * p.kernel[1] + kx)) & wins) | (place & ~wins);
      }
    }
    store_some(out + c, lanes, kAverage ? best * share : best);
    if (!kAverage) store_places(places + c, lanes, place);
  });
}

FASTBLOCKS_INLINE void pool_rows(const TrainPool& p, int64_t item, int64_t height, int64_t* image, int64_t* from, int64_t* to) {
  const int64_t band = item % p.bands;
  *image = item / p.bands;
  *from = band * height / p.bands;
  *to = (band + 1) * height / p.bands;
}

// Rows that are read through a BatchNorm lie in a ring, each read once.
inline void train_pool_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainPool& p = *static_cast<const TrainPool*>(params);
  Scratch scratch(memory);
  const bool plain = !p.x.norm.mean;
  const int64_t stride = plain ? p.x.stride : round_up(p.channels, kLanes);
  float* ring = scratch.take<float>(plain ? 0 : p.kernel[0] * p.width * stride + kPadding);
  const float** rows = scratch.take<const float*>(p.kernel[0]);
  for (int64_t item = begin; item < end; ++item) {
    int64_t image, from, to;
    pool_rows(p, item, p.out_height, &image, &from, &to);
    int64_t next = larger(0, from * p.stride[0] - p.padding[0]);
    for (int64_t oy = from; oy < to; ++oy) {
      const int64_t y = oy * p.stride[0] - p.padding[0];
      for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
        const int64_t iy = y + ky;
        rows[ky] = nullptr;
        if (iy < 0 || iy >= p.height) continue;
        const float* z = p.x.data + (image * p.height + iy) * p.width * p.x.stride;
        float* row = plain ? nullptr : ring + iy % p.kernel[0] * p.width * stride;
        if (!plain && iy >= next) {
          read_source(p.x, z, p.width, 0, p.channels, row, stride);
          next = iy + 1;
        }
        rows[ky] = plain ? z : row;
      }
      for (int64_t ox = 0; ox < p.out_width; ++ox) {
        const int64_t pixel = (image * p.out_height + oy) * p.out_width + ox, x = ox * p.stride[1] - p.padding[1];
        if (p.average)
          pool_pixel<true>(p, rows, stride, x, p.y + pixel * p.y_stride, nullptr);
        else
          pool_pixel<false>(p, rows, stride, x, p.y + pixel * p.y_stride, p.places + pixel * p.channels);
      }
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
  const int64_t ring = p.x.norm.mean ? p.kernel[0] * p.width * round_up(p.channels, kLanes) + kPadding : 0;
  *work = {p.items, room<float>(ring) + room<float*>(p.kernel[0])};
}

// The windows that reach an input column or row: output positions [*first, *last].
FASTBLOCKS_INLINE void pool_windows(int64_t at, int64_t kernel, int64_t stride, int64_t padding, int64_t out, int64_t* first,
                                    int64_t* last) {
  *first = larger(0, divide_up(larger(0, at + padding - kernel + 1), stride));
  *last = smaller(out - 1, (at + padding) / stride);
}

template <bool kAverage>
FASTBLOCKS_INLINE void pool_grad_pixel(const TrainPool& p, int64_t image, int64_t y, int64_t x, int64_t y0, int64_t y1,
                                       float* out) {
  int64_t x0, x1;
  pool_windows(x, p.kernel[1], p.stride[1], p.padding[1], p.out_width, &x0, &x1);
  const Vec share = broadcast(1.0f / (float)(p.kernel[0] * p.kernel[1]));
  const int64_t pixel = (image * p.height + y) * p.width + x;
  for_channels(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    Vec sum{};
    for (int64_t oy = y0; oy <= y1; ++oy)
      for (int64_t ox = x0; ox <= x1; ++ox) {
        const int64_t from = (image * p.out_height + oy) * p.out_width + ox;
        const Vec g = load_some(p.y + from * p.y_stride + c, lanes);
        if (kAverage) {
          sum += g * share;
          continue;
        }
        const int tap = (int)((y + p.padding[0] - oy * p.stride[0]) * p.kernel[1] + x + p.padding[1] - ox * p.stride[1]);
        sum += (Vec)((Indices)g & (Indices)(load_places(p.places + from * p.channels + c, lanes) == (Indices{} + tap)));
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
      int64_t y0, y1;
      pool_windows(y, p.kernel[0], p.stride[0], p.padding[0], p.out_height, &y0, &y1);
      for (int64_t x = 0; x < p.width; ++x) {
        if (p.average)
          pool_grad_pixel<true>(p, image, y, x, y0, y1, row + x * stride);
        else
          pool_grad_pixel<false>(p, image, y, x, y0, y1, row + x * stride);
      }
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
