// A panel of one or two vectors and a half of channels, two pixels at a time: the halves of both make one vector. A panel of 24
// channels then takes three multiply-adds for two pixels instead of four, one of 40 channels five instead of six. The halves of
// the pixels' values are blended at each step: where that takes the pipe of a multiply-add, nothing is gained (Pipes::kShared).
#pragma once

#include "tiles-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Pairs a tile, beside W whole vectors: 24 or 25 sums, W + 1 vectors of weights, 3 of pixels.
FASTBLOCKS_INLINE constexpr int most_pairs(int whole) { return whole == 1 ? 8 : 5; }

// Whether the last half of a panel is to be computed as one, rather than as a vector.
FASTBLOCKS_INLINE bool halves_pay(const TileRun& t, int64_t pixels, int vectors) {
  const int rest = t.used - (vectors - 1) * kLanes;
  return kRegisters == 32 && vectors >= 2 && rest > 0 && rest <= kHalf && pixels >= 2 * most_pairs(vectors - 1);
}

// The sums of a pair of pixels: those of the whole vectors of channels for each, and the rest for both.
template <int W>
struct PairSums {
  Vec first[W], second[W], rest;
};

template <int P, int W>
FASTBLOCKS_INLINE void pair_step(PairSums<W> (&sum)[P], const float* const (&a)[P], int64_t a_stride, int64_t k,
                                 const float* w) {
  Vec whole[W];
#pragma GCC unroll 2
  for (int v = 0; v < W; ++v) whole[v] = load(w + v * kLanes);
  const Vec half = load_half_twice(w + W * kLanes);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const Vec x = broadcast(a[p][k]), y = broadcast(a[p][a_stride + k]);
#pragma GCC unroll 2
    for (int v = 0; v < W; ++v) {
      sum[p].first[v] += x * whole[v];
      sum[p].second[v] += y * whole[v];
    }
    sum[p].rest += halves(x, y) * half;
  }
}

// One run; returns where the next one's weights begin.
template <int P, int W>
FASTBLOCKS_INLINE const float* pair_sum(PairSums<W> (&sum)[P], const float* first, int64_t a_stride, const float* w,
                                        int64_t depth, Fetching& fetching) {
  constexpr int kPanel = (W + 1) * kLanes;
  const float* a[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) a[p] = first + 2 * p * a_stride;
  const auto steps = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) pair_step<P, W>(sum, a, a_stride, u, w + u * kPanel);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) a[p] += kCount;
    w += kCount * kPanel;
  };
  for (; depth >= 4; depth -= 4) steps(Number<4>()), fetching.after_four_steps();
  if (depth & 2) steps(Number<2>());
  if (depth & 1) steps(Number<1>());
  return w;
}

template <int W>
FASTBLOCKS_INLINE void add_residual(PairSums<W>& sum, const TileRun& t, const float*& residual) {
  constexpr int kWhole = W * kLanes;
  const float* const then = residual + t.residual_stride;
#pragma GCC unroll 2
  for (int v = 0; v < W; ++v) {
    sum.first[v] += load(residual + v * kLanes);
    sum.second[v] += load(then + v * kLanes);
  }
  sum.rest += load_halves(residual + kWhole, then + kWhole, t.used - kWhole);
  residual = then + t.residual_stride, hide(residual);
}

// What sums begin at that a scale is still to be multiplied with.
alignas(64) static constexpr float kNothing[kMaxPanelVectors * kLanes] = {};

// Whether there is a scale or a residual is asked once a tile: a variant for each was no faster, and five times the code.
template <int P, int W>
inline void pair_run(TileRun& state, int64_t tiles) {
  const TileRun t = state;  // a copy that no store through a pointer can change: its members stay in registers
  const int64_t a_stride = t.a.pixel_stride, straight = 0;
  const int64_t* const runs = t.a.run_offsets ? t.a.run_offsets : &straight;
  constexpr int kWhole = W * kLanes;
  const int rest = t.used - kWhole;
  const bool padded = t.valid > t.used;
  const float *a = t.a.data, *residual = t.residual;
  Walk walk(t.to);
  Fetching fetching(state.ahead, t.a.run_count * (t.a.run_length / 4), t.w);
  for (; tiles > 0; --tiles) {
    fetching.begin_tile();
    if (t.to.far) fetch_for_writing<2 * P, W + 1>(walk.out, t.to.pixel_stride);
    PairSums<W> sum[P];
    const float* const start = t.scale ? kNothing : t.shift;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < W; ++v) sum[p].first[v] = sum[p].second[v] = load(start + v * kLanes);
      sum[p].rest = load_half_twice(start + kWhole);
    }
    if (!t.scale && residual) {  // as in a tile, so that a pixel's bits do not depend on which of them it falls into
      const float* at = residual;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) add_residual(sum[p], t, at);
    }
    const float* w = t.w;
    for (int64_t run = 0; run < t.a.run_count; ++run)
      w = pair_sum<P, W>(sum, a + runs[run], a_stride, w, t.a.run_length, fetching);
    a += 2 * P * a_stride;
    if (t.scale) {
      const float *scale = t.scale, *shift = t.shift;
      hide(scale), hide(shift);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
        for (int v = 0; v < W; ++v) {
          sum[p].first[v] = sum[p].first[v] * load(scale + v * kLanes) + load(shift + v * kLanes);
          sum[p].second[v] = sum[p].second[v] * load(scale + v * kLanes) + load(shift + v * kLanes);
        }
        sum[p].rest = sum[p].rest * load_half_twice(scale + kWhole) + load_half_twice(shift + kWhole);
      }
      if (residual) {
        const float* at = residual;
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) add_residual(sum[p], t, at);
      }
    }
    const Clamp* clamp = &t.clamp;
    hide(clamp);
    const Vec low = broadcast(clamp->low), high = broadcast(clamp->high);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      float* const one = walk.next();
      float* const two = walk.next();
#pragma GCC unroll 2
      for (int v = 0; v < W; ++v) {
        store(one + v * kLanes, at_most(high, at_least(low, sum[p].first[v])));
        store(two + v * kLanes, at_most(high, at_least(low, sum[p].second[v])));
      }
      const Vec last = at_most(high, at_least(low, sum[p].rest));
      if (padded) {  // whole vectors are stored: padding lanes take any number
        store(one + kWhole, last);
        store(two + kWhole, swap_halves(last));
      } else {
        store_half(one + kWhole, rest, last, false);
        store_half(two + kWhole, rest, last, true);
      }
    }
    if (residual) residual += 2 * P * t.residual_stride;
  }
  state.a.data = a, state.residual = residual;
  walk.leave(&state.to);
}

// An even number of pixels; the last of an odd number is a tile of its own.
inline void pair_panel(TileRun& t, int64_t pairs, int vectors) {
#if FASTBLOCKS_VECTOR_BYTES == 64
  // An even split of as many pairs as pay never makes tiles of fewer than half of the most.
  static constexpr TileFunction kOne[] = {pair_run<4, 1>, pair_run<5, 1>, pair_run<6, 1>, pair_run<7, 1>, pair_run<8, 1>};
  static constexpr TileFunction kTwo[] = {pair_run<3, 2>, pair_run<4, 2>, pair_run<5, 2>};
  const int64_t tiles = divide_up(pairs, most_pairs(vectors - 1)), base = pairs / tiles, extra = pairs % tiles;
  const auto run = [&](int64_t size, int64_t count) { (vectors == 2 ? kOne[size - 4] : kTwo[size - 3])(t, count); };
  if (extra) run(base + 1, extra);
  run(base, tiles - extra);
#else
  (void)t, (void)pairs, (void)vectors;
#endif
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
