// Pooling in training: the maximum remembers which tap won, a byte a value; the mean counts padding, as zeros.
#pragma once

#include "finish-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

typedef int32_t Indices __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES)));
typedef unsigned char Bytes __attribute__((vector_size(kLanes)));

FASTBLOCKS_INLINE void store_places(unsigned char* to, Indices place) {
  const Bytes bytes = __builtin_convertvector(place, Bytes);
  __builtin_memcpy(to, &bytes, kLanes);
}

FASTBLOCKS_INLINE Indices load_places(const unsigned char* from) {
  Bytes bytes;
  __builtin_memcpy(&bytes, from, kLanes);
  return __builtin_convertvector(bytes, Indices);
}

// The taps of a window that lie inside: rows [row, row_end), columns [column, column_end).
struct Window {
  int64_t row, row_end, column, column_end;
};

// A row of means of windows of three columns, two apart: neighbours share a column, and each is summed once.
inline void average_shared_columns(const TrainPool& p, const float* const* rows, int64_t row_stride, const Window& w,
                                   float* out) {
  const Vec share = broadcast(1.0f / (float)(3 * p.kernel[0]));
  for_channels(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    const auto column = [&](int64_t x) __attribute__((always_inline)) {
      Vec sum{};
      if (x < 0 || x >= p.width) return sum;
      for (int64_t ky = w.row; ky < w.row_end; ++ky) sum += load_some(rows[ky] + x * row_stride + c, lanes);
      return sum;
    };
    int64_t x = -p.padding[1];
    Vec left = column(x);
    for (int64_t ox = 0; ox < p.out_width; ++ox, x += 2) {
      const Vec middle = column(x + 1), right = column(x + 2);
      store_some(out + ox * p.y_stride + c, lanes, (left + middle + right) * share);
      left = right;
    }
  });
}

// One output pixel whose window begins at column `x`, which may lie outside.
template <bool kAverage>
FASTBLOCKS_INLINE void pool_pixel(const TrainPool& p, const float* const* rows, int64_t row_stride, int64_t x, const Window& w,
                                  const float* signs, float* out, unsigned char* places) {
  const Vec share = broadcast(1.0f / (float)(p.kernel[0] * p.kernel[1]));
  for_channels(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    // Where all are -inf, the first tap that is there wins.
    Vec best = kAverage ? Vec{} : load_some(rows[w.row] + (x + w.column) * row_stride + c, lanes);
    Indices place = Indices{} + (int)(w.row * p.kernel[1] + w.column);
    const Vec sign = kAverage ? Vec{} : load(signs + c);
    Vec best_key = best * sign;
    for (int64_t ky = w.row; ky < w.row_end; ++ky) {
      const float* at = rows[ky] + (x + w.column) * row_stride + c;
      int tap = (int)(ky * p.kernel[1] + w.column);
      for (int64_t kx = w.column; kx < w.column_end; ++kx, ++tap, at += row_stride) {
        const Vec v = load_some(at, lanes);
        if (kAverage) {
          best += v;
          continue;
        }
        const Vec key = v * sign;
        const auto wins = (key > best_key) | (key != key);
        best = wins ? v : best;
        best_key = wins ? key : best_key;
        place = wins ? Indices{} + tap : place;
      }
    }
    store_some(out + c, lanes, kAverage ? best * share : best);
    if (!kAverage) store_places(places + c, place);
  });
}

FASTBLOCKS_INLINE void pool_rows(const TrainPool& p, int64_t item, int64_t height, int64_t* image, int64_t* from, int64_t* to) {
  const int64_t band = item % p.bands;
  *image = item / p.bands;
  *from = band * height / p.bands;
  *to = (band + 1) * height / p.bands;
}

FASTBLOCKS_INLINE float sign_of(float v) { return v > 0.0f ? 1.0f : v < 0.0f ? -1.0f : v; }

// Rows that are read through a BatchNorm lie in a ring, each read once.
inline void train_pool_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainPool& p = *static_cast<const TrainPool*>(params);
  Scratch scratch(memory);
  const bool plain = !p.x.norm.mean;
  const int64_t stride = plain ? p.x.stride : round_up(p.channels, kLanes);
  float* ring = scratch.take<float>(plain ? 0 : p.kernel[0] * p.width * stride + kPadding);
  const float** rows = scratch.take<const float*>(p.kernel[0]);
  float* signs = scratch.take<float>(padded(p.channels));
  for (int64_t c = 0; c < padded(p.channels); ++c) signs[c] = p.signs && c < p.channels ? sign_of(p.signs[c]) : 1.0f;
  for (int64_t item = begin; item < end; ++item) {
    int64_t image, from, to;
    pool_rows(p, item, p.out_height, &image, &from, &to);
    int64_t next = larger(0, from * p.stride[0] - p.padding[0]);
    for (int64_t oy = from; oy < to; ++oy) {
      const int64_t y = oy * p.stride[0] - p.padding[0];
      Window w = {larger(0, -y), smaller(p.kernel[0], p.height - y), 0, 0};
      for (int64_t ky = w.row; ky < w.row_end; ++ky) {
        const int64_t iy = y + ky;
        const int64_t begin = (image * p.height + iy) * p.width;
        float* row = plain ? nullptr : ring + iy % p.kernel[0] * p.width * stride;
        if (!plain && iy >= next) {
          read_source(p.x, begin, p.width, 0, p.channels, row, stride);
          next = iy + 1;
        }
        rows[ky] = plain ? p.x.data + begin * p.x.stride : row;
      }
      if (p.average && p.kernel[1] == 3 && p.stride[1] == 2) {
        average_shared_columns(p, rows, stride, w, p.y + (image * p.out_height + oy) * p.out_width * p.y_stride);
        continue;
      }
      for (int64_t ox = 0; ox < p.out_width; ++ox) {
        const int64_t pixel = (image * p.out_height + oy) * p.out_width + ox, x = ox * p.stride[1] - p.padding[1];
        w.column = larger(0, -x), w.column_end = smaller(p.kernel[1], p.width - x);
        if (p.average)
          pool_pixel<true>(p, rows, stride, x, w, signs, p.y + pixel * p.y_stride, nullptr);
        else
          pool_pixel<false>(p, rows, stride, x, w, signs, p.y + pixel * p.y_stride, p.places + pixel * padded(p.channels));
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
  *work = {p.items, room<float>(ring) + room<float*>(p.kernel[0]) + room<float>(padded(p.channels))};
}

// Where a window's gradient goes, in one row of the input: `ky` is that row's place in the window.
struct PoolRow {
  int64_t oy, ky;
};

// Adds the shares of an output row in a row of the input's gradient.
template <bool kAverage>
inline void add_pool_grad_row(const TrainPool& p, int64_t image, const PoolRow& from, float* row, int64_t stride) {
  const Vec share = broadcast(1.0f / (float)(p.kernel[0] * p.kernel[1]));
  const int64_t first = (image * p.out_height + from.oy) * p.out_width, all = padded(p.channels);
  for (int64_t ox = 0; ox < p.out_width; ++ox) {
    const int64_t x = ox * p.stride[1] - p.padding[1];
    const int64_t begin = larger(0, -x), end = smaller(p.kernel[1], p.width - x);
    const float* g = p.y + (first + ox) * p.y_stride;
    const unsigned char* places = kAverage ? nullptr : p.places + (first + ox) * all;
    float* to = row + (x + begin) * stride;
    for_channels(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      const Vec v = kAverage ? load_some(g + c, lanes) * share : load_some(g + c, lanes);
      const Indices place = kAverage ? Indices{} : load_places(places + c);
      float* at = to + c;
      int tap = (int)(from.ky * p.kernel[1] + begin);
      for (int64_t kx = begin; kx < end; ++kx, ++tap, at += stride)
        store(at, load(at) + (kAverage ? v : place == (Indices{} + tap) ? v : Vec{}));
    });
  }
}

// The same for windows of three columns, two apart, and the N output rows that reach this one at once: what neighbours put into
// the column they share waits in a register, and each column is written once.
template <bool kAverage, int N>
inline void add_shared_columns(const TrainPool& p, int64_t image, const PoolRow* from, float* row, int64_t stride) {
  const Vec share = broadcast(1.0f / (float)(3 * p.kernel[0]));
  const int64_t all = padded(p.channels);
  for_channels(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    const float* g[N];
    const unsigned char* places[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const int64_t first = (image * p.out_height + from[n].oy) * p.out_width;
      g[n] = p.y + first * p.y_stride + c, places[n] = kAverage ? nullptr : p.places + first * all + c;
    }
    const auto put = [&](int64_t x, Vec v) __attribute__((always_inline)) {
      if (x < 0 || x >= p.width) return;
      float* to = row + x * stride + c;
      store(to, load(to) + v);
    };
    Vec shared{};
    int64_t x = -p.padding[1];
    for (int64_t ox = 0; ox < p.out_width; ++ox, x += 2) {
      Vec part[3] = {shared, Vec{}, Vec{}};
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const Vec v = load_some(g[n], lanes);
        const Indices place = kAverage ? Indices{} : load_places(places[n]) - (int)(3 * from[n].ky);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) part[kx] += kAverage ? v * share : place == (Indices{} + kx) ? v : Vec{};
        g[n] += p.y_stride, places[n] += kAverage ? 0 : all;
      }
      put(x, part[0]), put(x + 1, part[1]);
      shared = part[2];
    }
    put(x, shared);
  });
}

template <bool kAverage>
inline void add_pool_grad_rows(const TrainPool& p, int64_t image, const PoolRow* from, int64_t count, float* row,
                               int64_t stride) {
  const bool shares = p.kernel[1] == 3 && p.stride[1] == 2;
  if (shares && count == 1) return add_shared_columns<kAverage, 1>(p, image, from, row, stride);
  if (shares && count == 2) return add_shared_columns<kAverage, 2>(p, image, from, row, stride);
  for (int64_t i = 0; i < count; ++i) add_pool_grad_row<kAverage>(p, image, from[i], row, stride);
}

// Row `y` of the input's gradient, but for what it is added to.
inline void add_pool_grad(const TrainPool& p, int64_t image, int64_t y, float* row, int64_t stride) {
  // The output rows whose windows reach this one, some at a time.
  int64_t oy = larger(0, divide_up(larger(0, y + p.padding[0] - p.kernel[0] + 1), p.stride[0]));
  const int64_t last = smaller(p.out_height - 1, (y + p.padding[0]) / p.stride[0]);
  while (oy <= last) {
    PoolRow from[2];
    int64_t count = 0;
    for (; oy <= last && count < 2; ++oy) from[count++] = {oy, y + p.padding[0] - oy * p.stride[0]};
    if (p.average)
      add_pool_grad_rows<true>(p, image, from, count, row, stride);
    else
      add_pool_grad_rows<false>(p, image, from, count, row, stride);
  }
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
      const int64_t pixel = (image * p.height + y) * p.width;
      if (p.addend)
        for (int64_t x = 0; x < p.width; ++x)
          for_channels(p.channels, [&](int64_t c, auto lanes) {
            store(row + x * stride + c, load_some(p.addend + (pixel + x) * p.addend_stride + c, lanes));
          });
      else
        __builtin_memset(row, 0, p.width * stride * sizeof(float));
      add_pool_grad(p, image, y, row, stride);
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
