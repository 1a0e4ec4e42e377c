// A panel of one or two vectors and a half of channels, two pixels at a time: the halves of both make one vector. A panel of 24
// channels then takes three multiply-adds for two pixels instead of four, one of 40 channels five instead of six.
#pragma once

#include "tiles-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Pairs a tile, beside W whole vectors: 24 or 25 sums, W + 1 vectors of weights, 3 of pixels.
FASTBLOCKS_INLINE constexpr int most_pairs(int whole) { return whole == 1 ? 8 : 5; }

// Whether the last half of a panel is to be computed as one, rather than as a vector.
FASTBLOCKS_INLINE bool halves_pay(const TileRun& t, int64_t pixels, int vectors) {
  const int rest = t.used - (vectors - 1) * kLanes;
  return kRegisters == 32 && vectors >= 2 && rest > 0 && rest <= kHalf && pixels >= 2 * most_pairs(vectors - 1) &&
         !(t.a.run_offsets && (t.scale || t.residual)) && !(t.to.offsets && t.valid == t.used);
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

// `next`: the address of the first pixel's output, and of one after the other at each call. kPadded: whole vectors are stored,
// and padding lanes take any number.
template <int P, int W, bool kScaled, bool kAdded, bool kPadded, class Next>
FASTBLOCKS_INLINE void pair_store(const PairSums<W> (&sum)[P], const TileRun& t, const float* residual, Next next) {
  constexpr int kWhole = W * kLanes;
  const int rest = t.used - kWhole;
  const float *scale = t.scale, *shift = t.shift;
  const Clamp* clamp = &t.clamp;
  hide(scale), hide(shift), hide(clamp);
  const Vec low = broadcast(clamp->low), high = broadcast(clamp->high);
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    PairSums<W> y = sum[p];
    if (kScaled) {
#pragma GCC unroll 2
      for (int v = 0; v < W; ++v) {
        y.first[v] = y.first[v] * load(scale + v * kLanes) + load(shift + v * kLanes);
        y.second[v] = y.second[v] * load(scale + v * kLanes) + load(shift + v * kLanes);
      }
      y.rest = y.rest * load_half_twice(scale + kWhole) + load_half_twice(shift + kWhole);
    }
    if (kScaled && kAdded) add_residual(y, t, residual);
    float* const one = next();
    float* const two = next();
#pragma GCC unroll 2
    for (int v = 0; v < W; ++v) {
      store(one + v * kLanes, at_most(high, at_least(low, y.first[v])));
      store(two + v * kLanes, at_most(high, at_least(low, y.second[v])));
    }
    y.rest = at_most(high, at_least(low, y.rest));
    if (kPadded) {
      store(one + kWhole, y.rest);
      store(two + kWhole, swap_halves(y.rest));
    } else {
      store_half(one + kWhole, rest, y.rest, false);
      store_half(two + kWhole, rest, y.rest, true);
    }
  }
}

template <int P, int W, bool kScaled, bool kAdded, bool kRuns>
inline void pair_run(TileRun& state, int64_t tiles) {
  const TileRun t = state;  // a copy that no store through a pointer can change: its members stay in registers
  const int64_t a_stride = t.a.pixel_stride;
  constexpr int kWhole = W * kLanes;
  const float *a = t.a.data, *residual = t.residual;
  float* out = t.to.data;
  const int64_t* offsets = t.to.offsets;
  const auto straight = [&]() __attribute__((always_inline)) {
    float* const here = out;
    out += t.to.pixel_stride, hide(out);
    return here;
  };
  const auto anywhere = [&]() __attribute__((always_inline)) { return offsets ? out + *offsets++ : straight(); };
  Fetching fetching(t.ahead, t.a.run_count * (t.a.run_length / 4), t.w);
  for (; tiles > 0; --tiles) {
    fetching.begin_tile();
    if (t.to.far) fetch_for_writing<2 * P, W + 1>(out, t.to.pixel_stride);
    PairSums<W> sum[P];
    const Vec half = kScaled ? Vec{} : load_half_twice(t.shift + kWhole);
#pragma GCC unroll 2
    for (int v = 0; v < W; ++v) {
      const Vec start = kScaled ? Vec{} : load(t.shift + v * kLanes);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[p].first[v] = sum[p].second[v] = start;
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p].rest = half;
    if (!kScaled && kAdded) {  // as in a tile, so that a pixel's bits do not depend on which of them it falls into
      const float* at = residual;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) add_residual(sum[p], t, at);
    }
    if (kRuns) {
      const float* w = t.w;
      for (int64_t run = 0; run < t.a.run_count; ++run)
        w = pair_sum<P, W>(sum, a + t.a.run_offsets[run], a_stride, w, t.a.run_length, fetching);
    } else {
      pair_sum<P, W>(sum, a, a_stride, t.w, t.a.run_length, fetching);
    }
    a += 2 * P * a_stride;
    if (t.valid > t.used)
      pair_store<P, W, kScaled, kAdded, true>(sum, t, residual, anywhere);
    else
      pair_store<P, W, kScaled, kAdded, false>(sum, t, residual, straight);
    if (kAdded) residual += 2 * P * t.residual_stride;
  }
  state.a.data = a, state.residual = residual, state.ahead = fetching.ahead;
  state.to.data = out, state.to.offsets = offsets;
}

// The variants of one size.
typedef void (*PairFunction)(TileRun&, int64_t);
struct PairFunctions {
  PairFunction scaled, scaled_residual, folded, folded_residual, folded_runs;
};

FASTBLOCKS_INLINE PairFunction function_for(const PairFunctions& f, const TileRun& t) {
  return t.scale           ? t.residual ? f.scaled_residual : f.scaled
         : t.a.run_offsets ? f.folded_runs
         : t.residual      ? f.folded_residual
                           : f.folded;
}

#define FASTBLOCKS_PAIRS(W, P)                                                                                 \
  {pair_run<P, W, true, false, false>, pair_run<P, W, true, true, false>, pair_run<P, W, false, false, false>, \
   pair_run<P, W, false, true, false>, pair_run<P, W, false, false, true>}

// An even number of pixels; the last of an odd number is a tile of its own.
inline void pair_panel(TileRun& t, int64_t pairs, int vectors) {
#if FASTBLOCKS_VECTOR_BYTES == 64
  // An even split of as many pairs as pay never makes tiles of fewer than half of the most.
  static constexpr PairFunctions kOne[] = {FASTBLOCKS_PAIRS(1, 4), FASTBLOCKS_PAIRS(1, 5), FASTBLOCKS_PAIRS(1, 6),
                                           FASTBLOCKS_PAIRS(1, 7), FASTBLOCKS_PAIRS(1, 8)};
  static constexpr PairFunctions kTwo[] = {FASTBLOCKS_PAIRS(2, 3), FASTBLOCKS_PAIRS(2, 4), FASTBLOCKS_PAIRS(2, 5)};
  const int64_t tiles = divide_up(pairs, most_pairs(vectors - 1)), base = pairs / tiles, extra = pairs % tiles;
  const auto run = [&](int64_t size, int64_t count) {
    function_for(vectors == 2 ? kOne[size - 4] : kTwo[size - 3], t)(t, count);
  };
  if (extra) run(base + 1, extra);
  run(base, tiles - extra);
#else
  (void)t, (void)pairs, (void)vectors;
#endif
}
#undef FASTBLOCKS_PAIRS

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
