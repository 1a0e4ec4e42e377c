// A panel of one or two vectors and a half of channels on cores that split a vector in two (Zen 4): half vectors cost half
// there, and a panel of 24 channels is three of them. Pairs of pixels (pairs-inl.h) spare the same multiply-adds, but their
// blends take slots of their own: a step of the depth for eight pairs takes 30 to 32 cycles with them, and 24 in halves.
#pragma once

#include "pairs-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Pixels a tile, beside W whole vectors: 24 or 25 sums of half a vector, 2 W + 1 of weights, one of a pixel.
FASTBLOCKS_INLINE constexpr int most_split(int whole) { return whole == 1 ? 8 : 5; }

#if FASTBLOCKS_VECTOR_BYTES == 64
typedef float HalfVec __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES / 2)));
typedef float HalfInMemory __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES / 2), aligned(4), may_alias));

FASTBLOCKS_INLINE HalfVec load_split(const float* p) { return *reinterpret_cast<const HalfInMemory*>(p); }
FASTBLOCKS_INLINE void store_split(float* p, HalfVec v) { *reinterpret_cast<HalfInMemory*>(p) = v; }

// The first n lanes, 0 < n <= kHalf.
FASTBLOCKS_INLINE HalfVec load_split(const float* p, int n) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (HalfVec)_mm256_maskz_loadu_ps((__mmask8)((1u << n) - 1), p);
#else
  HalfVec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

FASTBLOCKS_INLINE void store_split(float* p, int n, HalfVec v) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  _mm256_mask_storeu_ps(p, (__mmask8)((1u << n) - 1), (__m256)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

FASTBLOCKS_INLINE HalfVec clamp_split(HalfVec v, HalfVec low, HalfVec high) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (HalfVec)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
#else
  v = low > v ? low : v;
  return high < v ? high : v;
#endif
}

template <int M, int H>
FASTBLOCKS_INLINE const float* split_sum(HalfVec (&sum)[M][H], const float* first, int64_t a_stride, const float* w,
                                         int64_t depth, Fetching& fetching) {
  constexpr int kPanel = (H + 1) * kHalf;
  const float* a[(M + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < (M + 2) / 3; ++i) a[i] = first + 3 * i * a_stride;
  const auto steps = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      HalfVec b[H];
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) b[h] = load_split(w + u * kPanel + h * kHalf);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const HalfVec x = a[m / 3][(m % 3) * a_stride + u] - HalfVec{};
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) sum[m][h] += x * b[h];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < (M + 2) / 3; ++i) a[i] += kCount;
    w += kCount * kPanel;
  };
  for (; depth >= 4; depth -= 4) steps(Number<4>()), fetching.after_four_steps();
  for (; depth > 0; --depth) steps(Number<1>());
  return w;
}

template <int M, int H>
FASTBLOCKS_INLINE void add_split(HalfVec (&sum)[M][H], const TileRun& t, const float* residual) {
  const int rest = t.used - (H - 1) * kHalf;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int h = 0; h + 1 < H; ++h) sum[m][h] += load_split(residual + h * kHalf);
    sum[m][H - 1] += load_split(residual + (H - 1) * kHalf, rest);
    residual += t.residual_stride, hide(residual);
  }
}

// As pair_run, for M pixels of W vectors and a half. Where whole vectors are to be stored, padding lanes take any number.
template <int M, int W>
inline void split_run(TileRun& state, int64_t tiles) {
  constexpr int H = 2 * W + 1;
  const TileRun t = state;  // a copy that no store through a pointer can change: its members stay in registers
  const int64_t a_stride = t.a.pixel_stride, straight = 0;
  const int64_t* const runs = t.a.run_offsets ? t.a.run_offsets : &straight;
  const int rest = t.used - (H - 1) * kHalf;
  const bool padded = t.valid > t.used;
  const float *a = t.a.data, *residual = t.residual;
  Walk walk(t.to);
  Fetching fetching(state.ahead, t.a.run_count * (t.a.run_length / 4), t.w);
  for (; tiles > 0; --tiles) {
    fetching.begin_tile();
    if (t.to.far) fetch_for_writing<M, W + 1>(walk.out, t.to.pixel_stride);
    HalfVec sum[M][H];
    const float* const begin = t.scale ? kNothing : t.shift;
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      const HalfVec start = load_split(begin + h * kHalf);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m][h] = start;
    }
    if (!t.scale && residual)
      add_split(sum, t, residual);  // where a tile adds it: a pixel's bits do not depend on which it falls into
    const float* w = t.w;
    for (int64_t run = 0; run < t.a.run_count; ++run) w = split_sum(sum, a + runs[run], a_stride, w, t.a.run_length, fetching);
    const float *scale = t.scale, *shift = t.shift;
    const Clamp* clamp = &t.clamp;
    hide(scale), hide(shift), hide(clamp);
    if (t.scale) {
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const HalfVec by = load_split(scale + h * kHalf), plus = load_split(shift + h * kHalf);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum[m][h] = sum[m][h] * by + plus;
      }
      if (residual) add_split(sum, t, residual);
    }
    const HalfVec low = clamp->low - HalfVec{}, high = clamp->high - HalfVec{};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float* const here = walk.next();
#pragma GCC unroll 8
      for (int h = 0; h + 1 < H; ++h) store_split(here + h * kHalf, clamp_split(sum[m][h], low, high));
      const HalfVec last = clamp_split(sum[m][H - 1], low, high);
      if (padded)
        store_split(here + (H - 1) * kHalf, last), store_split(here + H * kHalf, last);
      else
        store_split(here + (H - 1) * kHalf, rest, last);
    }
    a += M * a_stride;
    if (residual) residual += M * t.residual_stride;
  }
  state.a.data = a, state.residual = residual;
  walk.leave(&state.to);
}

// As many pixels of a panel as its tiles take, which is all but a few; returns how many.
inline int64_t split_panel(TileRun& t, int64_t pixels, int vectors) {
  const auto run = [&](TileFunction function, int64_t tiles) {
    if (tiles) function(t, tiles);
  };
  if (vectors == 3) {
    run(split_run<5, 2>, pixels / 5);
    return pixels / 5 * 5;
  }
  run(split_run<8, 1>, pixels / 8);
  run(split_run<4, 1>, pixels % 8 / 4);
  return pixels / 4 * 4;
}
#else
inline int64_t split_panel(TileRun&, int64_t, int) { return 0; }
#endif

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
