// Pooling: global (the mean of all pixels of each channel), and over windows (mean or maximum).
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

inline void pool_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const PoolParams& p = *static_cast<const PoolParams*>(params);
  const Vec count = broadcast((float)p.pixels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.channel_blocks, first = item % p.channel_blocks * p.channel_block;
    const int64_t limit = smaller(first + p.channel_block, p.channels);
    const float* x = p.x + image * p.image_stride;
    float* out = p.out + image * p.channels;
    int64_t c = first;
    for (; c + 4 * kLanes <= limit; c += 4 * kLanes) {
      Vec sum[4] = {Vec{}, Vec{}, Vec{}, Vec{}};
      for (int64_t m = 0; m < p.pixels; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[v] += load(x + m * p.pixel_stride + c + v * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store(out + c + v * kLanes, sum[v] / count);
    }
    for (; c < limit; c += kLanes) {
      const int lanes = (int)smaller(kLanes, limit - c);
      Vec sum{};
      for (int64_t m = 0; m < p.pixels; ++m) {
        const float* at = x + m * p.pixel_stride + c;
        sum += lanes == kLanes ? load(at) : load_partial(at, lanes);
      }
      if (lanes == kLanes)
        store(out + c, sum / count);
      else
        store_partial(out + c, lanes, sum / count);
    }
  }
}

inline void pool_prepare(void* params, int threads, Work* work) {
  PoolParams& p = *static_cast<PoolParams*>(params);
  const int64_t parts = threads > 1 ? divide_up(2 * (int64_t)threads, p.images) : 1;
  p.channel_block = round_up(divide_up(p.channels, parts), 4 * kLanes);
  p.channel_blocks = divide_up(p.channels, p.channel_block);
  work->count = 1;
  work->phases[0] = {pool_run, &p, p.images * p.channel_blocks};
  work->worker_bytes = 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

// max(a, b) that is NaN where either is, as torch's max-pool has it.
FASTBLOCKS_INLINE Vec larger_or_nan(Vec a, Vec b) {
  const Vec most = at_least(a, b);  // b where either is NaN
  return a != a ? a : most;
}

struct PoolWindow {
  const float* x;  // the first pixel inside the map
  int64_t rows, columns, row_stride, pixel_stride;
  float divisor;
};

template <bool kAverage>
FASTBLOCKS_INLINE Vec pool_vector(const PoolWindow& w, int64_t rows, int64_t columns, int64_t c, int lanes) {
  Vec result = kAverage ? Vec{} : broadcast(-__builtin_inff());
#pragma GCC unroll 3
  for (int64_t y = 0; y < rows; ++y)
#pragma GCC unroll 3
    for (int64_t x = 0; x < columns; ++x) {
      const float* at = w.x + y * w.row_stride + x * w.pixel_stride + c;
      const Vec v = lanes == kLanes ? load(at) : load_partial(at, lanes);
      result = kAverage ? result + v : larger_or_nan(result, v);
    }
  return kAverage ? result / w.divisor : result;
}

// All channels of one output pixel.
template <bool kAverage>
FASTBLOCKS_INLINE void pool_pixel(const PoolWindow& w, int64_t rows, int64_t columns, int64_t channels, float* out) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(out + c, pool_vector<kAverage>(w, rows, columns, c, kLanes));
  if (c == channels) return;
  const int lanes = (int)(channels - c);
  store_partial(out + c, lanes, pool_vector<kAverage>(w, rows, columns, c, lanes));
}

// Output rows [begin, end) of one image.
template <bool kAverage>
inline void pool_rows(const WindowPoolParams& p, int64_t image, int64_t begin, int64_t end) {
  PoolWindow w = {nullptr, 0, 0, p.x.row_stride, p.x.pixel_stride, (float)(p.kernel[0] * p.kernel[1])};
  for (int64_t oy = begin; oy < end; ++oy) {
    const int64_t top = oy * p.stride[0] - p.padding[0], y = larger(top, 0);
    w.rows = smaller(top + p.kernel[0], p.height) - y;
    float* out = p.out.data + image * p.out.image_stride + oy * p.out.row_stride;
    for (int64_t ox = 0; ox < p.out_width; ++ox, out += p.out.pixel_stride) {
      const int64_t left = ox * p.stride[1] - p.padding[1], x = larger(left, 0);
      w.columns = smaller(left + p.kernel[1], p.width) - x;
      w.x = p.x.data + image * p.x.image_stride + y * p.x.row_stride + x * p.x.pixel_stride;
      if (w.rows == 3 && w.columns == 3)
        pool_pixel<kAverage>(w, 3, 3, p.channels, out);
      else
        pool_pixel<kAverage>(w, w.rows, w.columns, p.channels, out);
    }
  }
}

inline void window_pool_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const WindowPoolParams& p = *static_cast<const WindowPoolParams*>(params);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * p.out_height / p.bands, to = (band + 1) * p.out_height / p.bands;
    if (p.average)
      pool_rows<true>(p, image, from, to);
    else
      pool_rows<false>(p, image, from, to);
  }
}

inline void window_pool_prepare(void* params, int threads, Work* work) {
  WindowPoolParams& p = *static_cast<WindowPoolParams*>(params);
  p.bands = threads > 1 ? smaller(p.out_height, divide_up(4 * (int64_t)threads, p.images)) : 1;
  work->count = 1;
  work->phases[0] = {window_pool_run, &p, p.images * p.bands};
  work->worker_bytes = 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
