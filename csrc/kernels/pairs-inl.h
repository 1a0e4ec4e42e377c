// A panel of one vector and a half of channels, two pixels at a time: the halves of both make one vector. A panel of 24
// channels then takes three multiply-adds for two pixels instead of four.
#pragma once

#include "tiles-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int kMostPairs = 8;  // 24 sums, 2 vectors of weights, 3 of pixels

FASTBLOCKS_INLINE bool pairs_pay(const TileRun& t, int64_t pixels, int vectors) {
  return kRegisters == 32 && vectors == 2 && t.valid > kLanes && t.valid <= kLanes + kHalf && pixels >= kMostPairs &&
         !t.a.run_offsets && !t.to.offsets;
}

// The sums of a pair of pixels: those of the first vector of channels for each, and the rest for both.
struct PairSums {
  Vec first, second, rest;
};

template <int P>
FASTBLOCKS_INLINE void pair_step(PairSums (&sum)[P], const float* const (&a)[P], int64_t a_stride, int64_t k, const float* w) {
  const Vec whole = load(w), half = load_half_twice(w + kLanes);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const Vec x = broadcast(a[p][k]), y = broadcast(a[p][a_stride + k]);
    sum[p].first += x * whole;
    sum[p].second += y * whole;
    sum[p].rest += halves(x, y) * half;
  }
}

template <int P>
FASTBLOCKS_INLINE void pair_sum(PairSums (&sum)[P], const float* first, int64_t a_stride, const float* w, int64_t depth) {
  const float* a[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) a[p] = first + 2 * p * a_stride;
  const auto steps = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) pair_step<P>(sum, a, a_stride, u, w + u * 2 * kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) a[p] += kCount;
    w += kCount * 2 * kLanes;
  };
  for (; depth >= 4; depth -= 4) steps(Number<4>());
  if (depth & 2) steps(Number<2>());
  if (depth & 1) steps(Number<1>());
}

template <int P>
inline void pair_run(TileRun& state, int64_t tiles) {
  const TileRun t = state;  // a copy that no store through a pointer can change: its members stay in registers
  const int64_t a_stride = t.a.pixel_stride, out_stride = t.to.pixel_stride;
  const int rest = t.valid - kLanes;
  const float *a = t.a.data, *residual = t.residual;
  float* out = t.to.data;
  Ahead ahead = t.ahead;
  for (; tiles > 0; --tiles) {
    fetch(ahead);
    PairSums sum[P];
    const bool folded = !t.scale;
    const Vec whole = folded ? load(t.shift) : Vec{}, half = folded ? load_half_twice(t.shift + kLanes) : Vec{};
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] = {whole, whole, half};
    pair_sum<P>(sum, a, a_stride, t.w, t.a.run_length);
    a += 2 * P * a_stride;
    const float *scale = t.scale, *shift = t.shift;
    const Clamp* clamp = &t.clamp;
    hide(scale), hide(shift), hide(clamp);
    const Vec low = broadcast(clamp->low), high = broadcast(clamp->high);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      PairSums y = sum[p];
      if (!folded) {
        y.first = y.first * load(scale) + load(shift);
        y.second = y.second * load(scale) + load(shift);
        y.rest = y.rest * load_half_twice(scale + kLanes) + load_half_twice(shift + kLanes);
      }
      if (residual) {
        const float* next = residual + t.residual_stride;
        y.first += load(residual);
        y.second += load(next);
        y.rest += load_halves(residual + kLanes, next + kLanes, rest);
        residual = next + t.residual_stride;
      }
      store(out, at_most(high, at_least(low, y.first)));
      store(out + out_stride, at_most(high, at_least(low, y.second)));
      y.rest = at_most(high, at_least(low, y.rest));
      store_half(out + kLanes, rest, y.rest, false);
      store_half(out + out_stride + kLanes, rest, y.rest, true);
      out += 2 * out_stride, hide(out);
    }
  }
  state.a.data = a, state.residual = residual, state.ahead = ahead;
  state.to.data = out;
}

inline void pair_panel(TileRun& t, int64_t pairs) {
  static constexpr void (*kRuns[])(TileRun&, int64_t) = {
#if FASTBLOCKS_VECTOR_BYTES == 64
      pair_run<1>, pair_run<2>, pair_run<3>, pair_run<4>, pair_run<5>,
      pair_run<6>, pair_run<7>, pair_run<8>
#endif
  };
  const int64_t tiles = divide_up(pairs, kMostPairs), base = pairs / tiles, extra = pairs % tiles;
  if (extra) kRuns[base](t, extra);
  kRuns[base - 1](t, tiles - extra);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
