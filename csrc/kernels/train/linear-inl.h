// A fully connected layer in training, for batches of some rows. Its weight changes at every step: packing it would take five
// times as long as the product, so it is read as it lies, once for all rows.
#pragma once

#include "outer-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

FASTBLOCKS_INLINE float lanes_sum(Vec v) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// R rows by O outputs: both operands of each product lie along the sum.
template <int R, int O, bool kFetch>
inline void linear_tile(const TrainLinear& p, int64_t row, int64_t o) {
  const float *x = p.x + row * p.x_stride, *w = p.w + o * p.in;
  Vec sum[R][O] = {};
  const auto add = [&](int64_t k, auto lanes) __attribute__((always_inline)) {
    Vec b[O];
    if (kFetch && k % kLine == 0)
#pragma GCC unroll 4
      for (int j = 0; j < O; ++j) __builtin_prefetch(w + (O + j) * p.in + k);
#pragma GCC unroll 4
    for (int j = 0; j < O; ++j) b[j] = load_some(w + j * p.in + k, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Vec a = load_some(x + i * p.x_stride + k, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < O; ++j) add_product(sum[i][j], a, b[j]);
    }
  };
  for_channels(p.in, add);
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < O; ++j) p.y[(row + i) * p.out + o + j] = lanes_sum(sum[i][j]) + (p.bias ? p.bias[o + j] : 0.0f);
}

template <int O>
inline void linear_rows(const TrainLinear& p, int64_t o) {
  int64_t row = 0;
  if (p.rows >= 4) linear_tile<4, O, true>(p, 0, o), row = 4;
  for (; row + 4 <= p.rows; row += 4) linear_tile<4, O, false>(p, row, o);
  for (; row < p.rows; ++row) linear_tile<1, O, false>(p, row, o);
}

// An item is some outputs of all rows.
inline void linear_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const TrainLinear& p = *static_cast<const TrainLinear*>(params);
  int64_t o = begin * p.width;
  const int64_t to = smaller(end * p.width, p.out);
  for (; o + 3 <= to; o += 3) linear_rows<3>(p, o);
  for (; o < to; ++o) linear_rows<1>(p, o);
}

inline void linear_prepare(void* params, TrainWork* work) {
  TrainLinear& p = *static_cast<TrainLinear*>(params);
  p.width = 24;
  p.items = divide_up(p.out, p.width);
  *work = {p.items, 0};
}

constexpr int64_t kLinearDepth = 16, kLinearRows = 64;

// Adds `depth` products to some inputs of R rows of dx: g's columns, times rows of the weight, which lie in `panel`.
template <int R>
inline void linear_grad_tile(const float* g, int64_t g_stride, const float* panel, int64_t stride, int64_t depth, float* dx,
                             int64_t dx_stride, int64_t columns, bool add) {
  for_vectors(columns, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    Vec sum[R][V] = {};
    if (add)
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = load_some(dx + i * dx_stride + c + v * kLanes, lanes);
    for (int64_t k = 0; k < depth; ++k) {
      Vec b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b[v] = load(panel + k * stride + c + v * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const Vec a = broadcast(g[i * g_stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add_product(sum[i][v], a, b[v]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) store_some(dx + i * dx_stride + c + v * kLanes, lanes, sum[i][v]);
  });
}

inline void linear_grad_input(const TrainLinearGrad& p, int64_t first, int64_t columns, float* panel) {
  const int64_t stride = panel_row(p.width);
  for (int64_t o = 0; o < p.out; o += kLinearDepth) {
    const int64_t depth = smaller(kLinearDepth, p.out - o);
    for (int64_t k = 0; k < depth; ++k)
      for_channels(columns, [&](int64_t c, auto lanes) {
        if (c % kLine == 0) __builtin_prefetch(p.w + (o + kLinearDepth + k) * p.in + first + c);
        store(panel + k * stride + c, load_some(p.w + (o + k) * p.in + first + c, lanes));
      });
    int64_t row = 0;
    for (; row + 3 <= p.rows; row += 3)
      linear_grad_tile<3>(p.g + row * p.g_stride + o, p.g_stride, panel, stride, depth, p.dx + row * p.in + first, p.in,
                          columns, o > 0);
    for (; row < p.rows; ++row)
      linear_grad_tile<1>(p.g + row * p.g_stride + o, p.g_stride, panel, stride, depth, p.dx + row * p.in + first, p.in,
                          columns, o > 0);
  }
}

// Whole vectors of the weight's gradient go to where they belong, the rest through `sums`.
inline void linear_grad_weight(const TrainLinearGrad& p, int64_t first, int64_t columns, float* panel, float* sums) {
  const int64_t stride = panel_row(p.width), whole = columns / kLanes * kLanes, rest = columns - whole;
  const Range none[2] = {{nullptr, 0}, {nullptr, 0}};
  for (int64_t row = 0; row < p.rows; row += kLinearRows) {
    const int64_t rows = smaller(kLinearRows, p.rows - row);
    for (int64_t i = 0; i < rows; ++i)
      for_channels(columns, [&](int64_t c, auto lanes) {
        store(panel + i * stride + c, load_some(p.x + (row + i) * p.x_stride + first + c, lanes));
      });
    const float* g = p.g + row * p.g_stride;
    if (whole) outer(g, p.g_stride, p.out, panel, stride, whole, rows, p.dw + first, p.in, row > 0, none, 2);
    if (rest) outer(g, p.g_stride, p.out, panel + whole, stride, rest, rows, sums, kLanes, row > 0, none, 2);
  }
  for (int64_t o = 0; rest && o < p.out; ++o)
    for (int64_t c = 0; c < rest; ++c) p.dw[o * p.in + first + whole + c] = sums[o * kLanes + c];
}

inline void linear_grad_bias(const TrainLinearGrad& p) {
  for (int64_t o = 0; o < p.out; ++o) {
    double sum = 0.0;
    for (int64_t row = 0; row < p.rows; ++row) sum += p.g[row * p.g_stride + o];
    p.dbias[o] = (float)sum;
  }
}

// An item is some inputs of everything; the last one is the bias.
inline void linear_grad_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainLinearGrad& p = *static_cast<const TrainLinearGrad*>(params);
  Scratch scratch(memory);
  float* panel = scratch.take<float>(kLinearRows * panel_row(p.width) + kPadding);
  float* sums = scratch.take<float>(p.out * kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * p.width, columns = smaller(p.width, p.in - first);
    if (columns <= 0) {
      if (p.dbias) linear_grad_bias(p);
      continue;
    }
    if (p.dx) linear_grad_input(p, first, columns, panel);
    if (p.dw) linear_grad_weight(p, first, columns, panel, sums);
  }
}

inline void linear_grad_prepare(void* params, TrainWork* work) {
  TrainLinearGrad& p = *static_cast<TrainLinearGrad*>(params);
  p.width = 128;
  p.items = divide_up(p.in, p.width) + 1;
  *work = {p.items, room<float>(kLinearRows * panel_row(p.width) + kPadding) + room<float>(p.out * kLanes)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
