// Pooling: global (the mean of all pixels of each channel), and over windows (mean or maximum).
#pragma once

#include "conv-inl.h"

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
  work->phases[0] = {pool_run, &p, p.images * p.channel_blocks, p.images};
  work->worker_bytes = 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

template <bool kAverage>
FASTBLOCKS_INLINE Vec pool_start() {
  return kAverage ? Vec{} : broadcast(-__builtin_inff());
}

template <bool kAverage>
FASTBLOCKS_INLINE Vec pool_two(Vec a, Vec b) {
  return kAverage ? a + b : larger_or_nan(a, b);
}

struct PoolWindow {
  const float* x;  // the first pixel inside the map
  int64_t rows, columns, row_stride, pixel_stride;
  float divisor;
};

template <bool kAverage>
FASTBLOCKS_INLINE Vec pool_vector(const PoolWindow& w, int64_t rows, int64_t columns, int64_t c, int lanes) {
  Vec result = pool_start<kAverage>();
#pragma GCC unroll 3
  for (int64_t y = 0; y < rows; ++y)
#pragma GCC unroll 3
    for (int64_t x = 0; x < columns; ++x) {
      const float* at = w.x + y * w.row_stride + x * w.pixel_stride + c;
      const Vec v = lanes == kLanes ? load(at) : load_partial(at, lanes);
      result = pool_two<kAverage>(result, v);
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

// A row of windows three columns wide and two apart, of `rows` rows each: neighbours share a column, and each column is reduced
// once. `x`: column 0 of the first row.
template <bool kAverage>
FASTBLOCKS_INLINE void pool_shared_columns(const WindowPoolParams& p, const float* x, int64_t rows, float* out) {
  const float divisor = (float)(3 * p.kernel[0]);
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const int lanes = (int)smaller(kLanes, p.channels - c);
    const auto column = [&](int64_t ix) __attribute__((always_inline)) {
      if (ix < 0 || ix >= p.width) return pool_start<kAverage>();
      const float* at = x + ix * p.x.pixel_stride + c;
      Vec result = load_up_to(at, lanes);
#pragma GCC unroll 3
      for (int64_t y = 1; y < rows; ++y) result = pool_two<kAverage>(result, load_up_to(at + y * p.x.row_stride, lanes));
      return result;
    };
    int64_t ix = -p.padding[1];
    Vec left = column(ix);
    for (int64_t ox = 0; ox < p.out_width; ++ox, ix += 2) {
      const Vec middle = column(ix + 1), right = column(ix + 2);
      const Vec result = pool_two<kAverage>(pool_two<kAverage>(left, middle), right);
      store_up_to(out + ox * p.out.pixel_stride + c, lanes, kAverage ? result / divisor : result);
      left = right;
    }
  }
}

// Output rows [begin, end) of one image.
template <bool kAverage>
inline void pool_rows(const WindowPoolParams& p, int64_t image, int64_t begin, int64_t end) {
  PoolWindow w = {nullptr, 0, 0, p.x.row_stride, p.x.pixel_stride, (float)(p.kernel[0] * p.kernel[1])};
  for (int64_t oy = begin; oy < end; ++oy) {
    const int64_t top = oy * p.stride[0] - p.padding[0], y = larger(top, 0);
    w.rows = smaller(top + p.kernel[0], p.height) - y;
    float* out = p.out.data + image * p.out.image_stride + oy * p.out.row_stride;
    if (p.kernel[1] == 3 && p.stride[1] == 2 && w.rows > 0) {
      const float* x = p.x.data + image * p.x.image_stride + y * p.x.row_stride;
      if (w.rows == 3)
        pool_shared_columns<kAverage>(p, x, 3, out);
      else
        pool_shared_columns<kAverage>(p, x, w.rows, out);
      continue;
    }
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

FASTBLOCKS_INLINE void pool_band(const WindowPoolParams& p, int64_t item, int64_t* image, int64_t* from, int64_t* to) {
  const int64_t band = item % p.bands;
  *image = item / p.bands, *from = band * p.out_height / p.bands, *to = (band + 1) * p.out_height / p.bands;
}

inline void window_pool_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const WindowPoolParams& p = *static_cast<const WindowPoolParams*>(params);
  for (int64_t item = begin; item < end; ++item) {
    int64_t image, from, to;
    pool_band(p, item, &image, &from, &to);
    if (p.average)
      pool_rows<true>(p, image, from, to);
    else
      pool_rows<false>(p, image, from, to);
  }
}

// The rows of a stem's output under some rows of the pool's, in scratch that stays in L2; windows that overlap share some.
struct StemRows {
  ConvScratch conv;
  float* rows;
  int64_t pixel_stride, row_stride, out_rows;
  size_t bytes;  // of all scratch
};

FASTBLOCKS_INLINE StemRows stem_rows(const WindowPoolParams& p, char* memory) {
  StemRows s;
  size_t bytes;
  s.conv = conv_scratch(*p.stem, memory, &bytes);
  bytes = round_up(bytes, 64);
  s.rows = reinterpret_cast<float*>(memory + bytes);
  s.pixel_stride = round_up(p.channels, kLanes), s.row_stride = p.width * s.pixel_stride;
  const int64_t fitting = 32 * 1024 / s.row_stride;
  s.out_rows = larger(1, (fitting - p.kernel[0]) / p.stride[0] + 1);
  const int64_t most = smaller(p.height, (s.out_rows - 1) * p.stride[0] + p.kernel[0]);
  s.bytes = bytes + most * s.row_stride * sizeof(float);
  return s;
}

inline void stem_pool_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const WindowPoolParams& p = *static_cast<const WindowPoolParams*>(params);
  const StemRows s = stem_rows(p, memory);
  const int64_t panels = Panels(p.channels).count;
  conv_clear(s.conv);
  WindowPoolParams part = p;
  part.x = {nullptr, 0, s.row_stride, s.pixel_stride};
  for (int64_t item = begin; item < end; ++item) {
    int64_t image, from, to;
    pool_band(p, item, &image, &from, &to);
    int64_t first = 0, made = 0, next = 0;  // rows [first, made) are there; of the image, those below `next`
    for (int64_t oy = from; oy < to; oy += s.out_rows) {
      const int64_t oy_end = smaller(to, oy + s.out_rows);
      const int64_t y = larger(0, oy * p.stride[0] - p.padding[0]);
      const int64_t y_end = smaller(p.height, (oy_end - 1) * p.stride[0] - p.padding[0] + p.kernel[0]);
      if (made > y) __builtin_memmove(s.rows, s.rows + (y - first) * s.row_stride, (made - y) * s.row_stride * sizeof(float));
      first = y;
      for (made = larger(made, y); made < y_end; ++made)
        next = conv_output_row(*p.stem, s.conv, image, made, next, 0, panels,
                               {s.rows + (made - first) * s.row_stride, s.pixel_stride, nullptr}, true);
      part.x.data = s.rows - first * s.row_stride;
      pool_rows<false>(part, image, oy, oy_end);
    }
  }
}

inline void window_pool_prepare(void* params, int threads, Work* work) {
  WindowPoolParams& p = *static_cast<WindowPoolParams*>(params);
  // At the seam of two bands a stem makes some rows twice.
  const int64_t parts = (p.stem ? 2 : 4) * (int64_t)threads, most = p.stem ? larger(1, p.out_height / 2) : p.out_height;
  p.bands = threads > 1 ? smaller(most, divide_up(parts, p.images)) : 1;
  work->count = 1;
  work->phases[0] = {p.stem ? stem_pool_run : window_pool_run, &p, p.images * p.bands, p.images};
  work->worker_bytes = p.stem ? stem_rows(p, nullptr).bytes : 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
