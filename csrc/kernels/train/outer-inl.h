// The product of the weight gradient: out[n][k] (+)= sum over pixels of dy[pixel][n] * x[pixel][k]. Both operands lie as they
// are read, so nothing is transposed: a tile's rows are broadcast from dy, its columns are vectors of x.
#pragma once

#include "common-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int kOuterRows = kRegisters == 32 ? 12 : 6;
constexpr int kOuterPixels = 4;  // a step of the loop over pixels
constexpr int kOuterTiles = 16;  // of rows, whose part of dy stays in L1 while it is read for each pair of columns
constexpr int64_t kLine = 16;    // floats of a cache line

// A stream of memory that is needed soon: tiles fetch it line by line, so that reading it overlaps with computing all the time.
struct Stream {
  const float* at;
  int64_t step;  // floats a fetch
};

// Fetches some of all streams before every `segment` pixels. With 16 registers a pixel is 12 multiply-adds and 8 loads: a fetch
// for each pixel cost 4 to 8 % of them.
template <int S, int R, int V>
inline void outer_tile(const float* dy, int64_t dy_stride, const float* x, int64_t x_stride, int64_t pixels, float* out,
                       int64_t out_stride, bool add, Stream* soon, int64_t segment) {
  // One by one: the compiler puts the elements of an array into a vector register, which the sums need.
  const float *first = soon[0].at, *second = soon[1].at, *third = soon[S - 2].at, *fourth = soon[S - 1].at;
  const int64_t step0 = soon[0].step, step1 = soon[1].step, step2 = soon[S - 2].step, step3 = soon[S - 1].step;
  Vec sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  // What the sums are added to is far away where the weight is large: it comes while they are made.
  for (int r = 0; r < R; ++r) {
    __builtin_prefetch(out + r * out_stride, 1);
    if (V * kLanes > kLine) __builtin_prefetch(out + r * out_stride + kLine, 1);
  }
  const auto fetch = [&]() __attribute__((always_inline)) {
    __builtin_prefetch(first), first += step0;
    __builtin_prefetch(second), second += step1;
    if (S == 4) {
      __builtin_prefetch(third), third += step2;
      __builtin_prefetch(fourth), fourth += step3;
    }
  };
  const auto add_pixel = [&](const float* d, const float* at) __attribute__((always_inline)) {
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = load(at + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec a = broadcast(d[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) add_product(sum[r][v], a, b[v]);
    }
  };
  for (int64_t m = pixels; m > 0; m -= segment) {
    fetch();
    int64_t left = smaller(segment, m);
    for (; left >= kOuterPixels; left -= kOuterPixels) {
#pragma GCC unroll 4
      for (int i = 0; i < kOuterPixels; ++i) {
        add_pixel(dy, x);
        dy += dy_stride, x += x_stride;
        hide(dy), hide(x);  // or the compiler keeps, and spills, an offset for each operand of each pixel
      }
    }
    for (; left > 0; --left, dy += dy_stride, x += x_stride) add_pixel(dy, x);
  }
  soon[0].at = first, soon[1].at = second;
  if (S == 4) soon[S - 2].at = third, soon[S - 1].at = fourth;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = out + r * out_stride + v * kLanes;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

typedef void (*OuterTile)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool, Stream*, int64_t);

template <int S, int V>
FASTBLOCKS_INLINE OuterTile outer_tile_of(int64_t rows) {
  switch (rows) {
    case 1: return outer_tile<S, 1, V>;
    case 2: return outer_tile<S, 2, V>;
    case 3: return outer_tile<S, 3, V>;
    case 4: return outer_tile<S, 4, V>;
    case 5: return outer_tile<S, 5, V>;
    case 6: return outer_tile<S, 6, V>;
#if FASTBLOCKS_VECTOR_BYTES == 64
    case 7: return outer_tile<S, 7, V>;
    case 8: return outer_tile<S, 8, V>;
    case 9: return outer_tile<S, 9, V>;
    case 10: return outer_tile<S, 10, V>;
    case 11: return outer_tile<S, 11, V>;
    case 12: return outer_tile<S, 12, V>;
#endif
    default: return nullptr;
  }
}

template <int S>
inline void outer_with(const float* dy, int64_t dy_stride, int64_t rows, const float* x, int64_t x_stride, int64_t columns,
                       int64_t pixels, float* out, int64_t out_stride, bool add, const Range* soon) {
  const int64_t tiles = divide_up(rows, kOuterRows), base = rows / tiles, extra = rows % tiles;
  const int64_t all = tiles * divide_up(columns, 2 * kLanes);
  int64_t longest = 0;
  for (int i = 0; i < S; ++i)
    if (soon[i].data) longest = larger(longest, soon[i].floats);
  // As many fetches as there are lines, or one a pixel; whole steps of the loop where that leaves several.
  int64_t segment = larger(1, pixels / larger(1, divide_up(longest, kLine * all)));
  if (segment > kOuterPixels) segment -= segment % kOuterPixels;
  const int64_t steps = all * divide_up(pixels, segment);
  // Where there is nothing to fetch, the same line again and again costs nothing.
  Stream streams[S];
  for (int i = 0; i < S; ++i)
    streams[i] = soon[i].data ? Stream{soon[i].data, divide_up(soon[i].floats, steps)} : Stream{dy, 0};
  for (int64_t t = 0; t < tiles; t += kOuterTiles)
    for (int64_t c = 0; c < columns;) {
      const bool pair = c + kLanes < columns;
      const OuterTile large = pair ? outer_tile_of<S, 2>(base + 1) : outer_tile_of<S, 1>(base + 1);
      const OuterTile small = pair ? outer_tile_of<S, 2>(base) : outer_tile_of<S, 1>(base);
      int64_t r = t * base + smaller(t, extra);
      for (int64_t i = t; i < smaller(tiles, t + kOuterTiles); ++i) {
        const bool more = i < extra;
        (more ? large : small)(dy + r, dy_stride, x + c, x_stride, pixels, out + r * out_stride + c, out_stride, add, streams,
                               segment);
        r += base + more;
      }
      c += pair ? 2 * kLanes : kLanes;
    }
}

// Rows are split evenly over tiles; columns come in pairs of vectors. Writes whole vectors of columns. The two or four ranges
// of `soon` are fetched on the way.
inline void outer(const float* dy, int64_t dy_stride, int64_t rows, const float* x, int64_t x_stride, int64_t columns,
                  int64_t pixels, float* out, int64_t out_stride, bool add, const Range* soon, int ranges) {
  if (ranges > 2)
    outer_with<4>(dy, dy_stride, rows, x, x_stride, columns, pixels, out, out_stride, add, soon);
  else
    outer_with<2>(dy, dy_stride, rows, x, x_stride, columns, pixels, out, out_stride, add, soon);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
