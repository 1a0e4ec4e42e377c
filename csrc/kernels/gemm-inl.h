// The matrix product at the heart of every dense and pointwise convolution: out[m][n] = epilogue(sum_k a[m][k] * w[k][n]).
//
// Weights are packed in panels of 2 vectors of output channels (the last of 3 or 1 where the count is odd), each [K][panel]. A
// tile is as many pixels as the register file allows beside one row of the panel: with 16 registers 6 x 2, 4 x 3 or 8 x 1
// accumulators: two FMA pipes of latency 4 need at least 8 independent ones, and a step of k loads 8 or fewer operands for
// 12 FMAs. Pixels are split evenly over tiles (49 = 4 x 6 + 5 x 5), so that no tile is a short remainder.
//
// A panel that outgrows L1 is streamed from L2 by every tile. Cutting the depth instead, with partial sums in a buffer, was
// slower at every depth of the networks (384, 576, 960: by 6 to 8 %).
#pragma once

#include "batch_norm-inl.h"
#include "panels-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

FASTBLOCKS_INLINE int max_tile_pixels(int vectors) {
  if (kRegisters == 32) return vectors == 3 ? 9 : vectors == 2 ? 14 : 8;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
}

// A product's BatchNorm, ready for the epilogue, and its weights. Where the sum is short and the pixels are many, the scale is
// multiplied into a copy of the packed weights: sums then begin at the shift and end without multiplication.
struct FoldedProduct {
  const float* scale;  // null: the weights have it in them
  const float* shift;
  const float* weight;
};

FASTBLOCKS_INLINE bool fold_pays(int64_t pixels, int64_t depth) { return depth <= 64 && pixels >= 16 * depth; }

FASTBLOCKS_INLINE int64_t folded_product_floats(int64_t channels, int64_t depth, bool fold) {
  return Panels(channels).padded() * (fold ? 2 + depth : 2);
}

FASTBLOCKS_INLINE FoldedProduct folded_product(const float* packed, int64_t channels, bool fold, const float* memory) {
  const int64_t padded = Panels(channels).padded();
  return {fold ? nullptr : memory + padded, memory, fold ? memory + 2 * padded : packed};
}

inline void fold_product(const BatchNorm& norm, const float* packed, int64_t channels, int64_t depth, bool fold,
                         float* memory) {
  const Panels panels(channels);
  float* scale = memory + panels.padded();
  fold_batch_norm(norm, channels, panels.padded(), scale, memory);
  if (!fold) return;
  float* out = memory + 2 * panels.padded();
  for (int64_t panel = 0; panel < panels.count; ++panel, scale += kPanelVectors * kLanes) {
    const int64_t lanes = panels.width(panel) * kLanes;
    for (int64_t k = 0; k < depth; ++k, packed += lanes, out += lanes)
      for (int64_t n = 0; n < lanes; n += kLanes) store(out + n, load(packed + n) * load(scale + n));
  }
}

// `groups` products in a row: the packed weights, and the memory of their BatchNorms, follow each other. channels and depth are
// those of one group.
struct GroupedProduct {
  int64_t groups, channels, depth;
  bool fold;

  int64_t floats() const { return groups * folded_product_floats(channels, depth, fold); }
  int64_t packed_floats() const { return Panels(channels).padded() * depth; }
  int64_t panels() const { return groups * Panels(channels).count; }
  FoldedProduct of(int64_t group, const float* packed, const float* memory) const {
    return folded_product(packed + group * packed_floats(), channels, fold,
                          memory + group * folded_product_floats(channels, depth, fold));
  }
  void begin(const BatchNorm& norm, const float* packed, float* memory) const {
    const auto at = [](const float* values, int64_t channel) { return values ? values + channel : nullptr; };
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = g * channels;
      const BatchNorm part = {at(norm.conv_bias, c), at(norm.mean, c), at(norm.var, c),
                              at(norm.weight, c),    at(norm.bias, c), norm.eps};
      fold_product(part, packed + g * packed_floats(), channels, depth, fold,
                   memory + g * folded_product_floats(channels, depth, fold));
    }
  }
};

// What happens to a finished sum.
struct Epilogue {
  FoldedProduct product;
  Clamp clamp;
  const float* residual;  // or null
  int64_t residual_stride;
  bool pad_channels;  // the output has room for whole vectors (scratch): store padding lanes too
};

// The packed weights that follow those in use: each tile fetches a part of them, so that a panel is near when its turn comes. A
// small map's weights come from L3 and are used by few tiles.
struct Ahead {
  const float* next;  // null: nothing to fetch
  int64_t floats;     // a tile
};

FASTBLOCKS_INLINE void fetch(Ahead& ahead) {
  if (!ahead.next) return;
  for (int64_t i = 0; i < ahead.floats; i += 16) __builtin_prefetch(ahead.next + i);
  ahead.next += ahead.floats;
}

// With so few pixels a tile passes too fast for that: it fetches its own weights, this many floats before it needs them.
constexpr int kFewPixels = 2;
constexpr int64_t kFetchDistance = 1024;
// With more pixels than this, waiting for a panel once is no matter.
constexpr int64_t kFetchPixels = 400;

// Some tiles of one panel. All pointers are those of the panel's first channel; a call moves them on.
struct TileRun {
  Pixels a;
  const float* w;
  const float* scale;  // null: the weights have it in them, sums begin at the shift
  const float* shift;
  const float* residual;  // or null
  int64_t residual_stride;
  Destination to;
  Clamp clamp;
  int valid;  // channels to store
  Ahead ahead;
};

// What tells the variants of a tile apart: the plain cases, and one that asks at run time. Between two tiles of a plain variant
// stand a dozen instructions; asking makes them a hundred, a quarter of the time of a 16-deep sum.
enum class Finish { kFolded, kFoldedRuns, kScaled, kResidual, kAny };
constexpr int kFinishes = 5;

// One step of the depth for M pixels. One pointer serves three pixels through [base + stride] and [base + 2 * stride]: pointers
// to 14 pixels would not fit the integer registers.
template <int M, int V>
FASTBLOCKS_INLINE void tile_step(Vec (&sum)[M][V], const float* const (&a)[(M + 2) / 3], int64_t a_stride, int64_t k,
                                 const float* w) {
  Vec b[V];
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) b[v] = load(w + v * kLanes);
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
    const Vec x = broadcast(a[m / 3][(m % 3) * a_stride + k]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[m][v] += x * b[v];
  }
}

// One run, eight steps at a time and the rest by 4, 2 and 1: a loop of single steps would end in a branch that is predicted
// wrongly at every tile. kShort: four steps at a time, which is slower and half the code. Returns where the next run's weights
// begin.
template <int M, int V, bool kShort>
FASTBLOCKS_INLINE const float* tile_sum(Vec (&sum)[M][V], const float* first, int64_t a_stride, const float* w,
                                        int64_t run_length) {
  const float* a[(M + 2) / 3];
#pragma GCC unroll 32
  for (int i = 0; i < (M + 2) / 3; ++i) a[i] = first + 3 * i * a_stride;
  const auto steps = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      if (M <= kFewPixels) __builtin_prefetch(w + u * V * kLanes + kFetchDistance);
      tile_step<M, V>(sum, a, a_stride, u, w + u * V * kLanes);
    }
#pragma GCC unroll 32
    for (int i = 0; i < (M + 2) / 3; ++i) a[i] += kCount;
    w += kCount * V * kLanes;
  };
  if (kShort)
    for (int64_t k = run_length; k >= 4; k -= 4) steps(Number<4>());
  else
    for (int64_t k = run_length; k >= 8; k -= 8) steps(Number<8>());
  if (run_length & 7) {
    if (!kShort && run_length & 4) steps(Number<4>());
    if (run_length & 2) steps(Number<2>());
    if (run_length & 1) steps(Number<1>());
  }
  return w;
}

template <int M, int V, Finish kFinish, class Address>
FASTBLOCKS_INLINE void tile_store(const Vec (&sum)[M][V], const TileRun& t, const float* residual, Address address) {
  const Vec low = broadcast(t.clamp.low), high = broadcast(t.clamp.high);
  constexpr bool kAny = kFinish == Finish::kAny;
  const bool scaled = kAny ? t.scale != nullptr : kFinish >= Finish::kScaled;
  const bool added = kAny ? residual != nullptr : kFinish == Finish::kResidual;
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    const int lanes = kAny ? (int)smaller(kLanes, t.valid - v * kLanes) : kLanes;
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      Vec y = sum[m][v];
      if (scaled) y = y * load(t.scale + v * kLanes) + load(t.shift + v * kLanes);
      if (added) {
        const float* more = residual + m * t.residual_stride + v * kLanes;
        y += lanes == kLanes ? load(more) : load_partial(more, lanes);
      }
      y = at_most(high, at_least(low, y));
      if (lanes == kLanes)
        store(address(m) + v * kLanes, y);
      else
        store_partial(address(m) + v * kLanes, lanes, y);
    }
  }
}

template <int M, int V, Finish kFinish>
inline void tile_run(TileRun& state, int64_t tiles) {
  const TileRun t = state;  // a copy that no store through a pointer can change: its members stay in registers
  constexpr bool kAny = kFinish == Finish::kAny;
  const bool folded = kAny ? t.scale == nullptr : kFinish < Finish::kScaled;
  const int64_t a_stride = t.a.pixel_stride;
  const float* a = t.a.data;
  const float* residual = t.residual;
  float* out = t.to.data;
  const int64_t* offsets = t.to.offsets;
  Ahead ahead = t.ahead;
  for (; tiles > 0; --tiles) {
    fetch(ahead);
    Vec sum[M][V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const Vec start = folded ? load(t.shift + v * kLanes) : Vec{};
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m) sum[m][v] = start;
    }
    if (kFinish == Finish::kFolded && residual) {
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[m][v] += load(residual + m * t.residual_stride + v * kLanes);
    }
    if (kFinish == Finish::kFoldedRuns || (kAny && t.a.run_offsets)) {
      const float* w = t.w;
      for (int64_t run = 0; run < t.a.run_count; ++run)
        w = tile_sum<M, V, kAny>(sum, a + t.a.run_offsets[run], a_stride, w, t.a.run_length);
    } else {
      tile_sum<M, V, kAny>(sum, a, a_stride, t.w, t.a.run_length);
    }
    if (offsets) {
      tile_store<M, V, kFinish>(sum, t, residual, [&](int m) { return out + offsets[m]; });
      offsets += M;
    } else {
      tile_store<M, V, kFinish>(sum, t, residual, [&](int m) { return out + m * t.to.pixel_stride; });
      out += M * t.to.pixel_stride;
    }
    a += M * a_stride;
    if (residual) residual += M * t.residual_stride;
  }
  state.a.data = a, state.residual = residual, state.ahead = ahead;
  state.to.data = out, state.to.offsets = offsets;
}

// The variants of one tile size, by Finish.
struct TileFunctions {
  void (*by_finish[kFinishes])(TileRun&, int64_t);
};

template <int V>
struct Tiles;

#define FASTBLOCKS_TILE(V, M)                                                                                \
  {                                                                                                          \
    {                                                                                                        \
      tile_run<M, V, Finish::kFolded>, tile_run<M, V, Finish::kFoldedRuns>, tile_run<M, V, Finish::kScaled>, \
          tile_run<M, V, Finish::kResidual>, tile_run<M, V, Finish::kAny>                                    \
    }                                                                                                        \
  }
#define FASTBLOCKS_TILES_4(V, M) \
  FASTBLOCKS_TILE(V, M + 1), FASTBLOCKS_TILE(V, M + 2), FASTBLOCKS_TILE(V, M + 3), FASTBLOCKS_TILE(V, M + 4)
template <>
struct Tiles<1> {
  static constexpr TileFunctions table[] = {FASTBLOCKS_TILES_4(1, 0), FASTBLOCKS_TILES_4(1, 4)};
};
template <>
struct Tiles<2> {
  static constexpr TileFunctions table[] = {FASTBLOCKS_TILES_4(2, 0), FASTBLOCKS_TILE(2, 5), FASTBLOCKS_TILE(2, 6),
#if FASTBLOCKS_VECTOR_BYTES == 64
                                            FASTBLOCKS_TILES_4(2, 6), FASTBLOCKS_TILES_4(2, 10)
#endif
  };
};
template <>
struct Tiles<3> {
  static constexpr TileFunctions table[] = {FASTBLOCKS_TILES_4(3, 0),
#if FASTBLOCKS_VECTOR_BYTES == 64
                                            FASTBLOCKS_TILES_4(3, 4), FASTBLOCKS_TILE(3, 9)
#endif
  };
};
#undef FASTBLOCKS_TILES_4
#undef FASTBLOCKS_TILE

FASTBLOCKS_INLINE const TileFunctions& tile_functions(int64_t pixels, int vectors) {
  if (vectors == 2) return Tiles<2>::table[pixels - 1];
  if (vectors == 3) return Tiles<3>::table[pixels - 1];
  return Tiles<1>::table[pixels - 1];
}

inline void gemm_panel(TileRun t, int64_t pixels, int vectors, const Range& soon) {
  const bool plain = t.valid == vectors * kLanes && !(t.a.run_offsets && (t.scale || t.residual));
  const Finish finish = !plain            ? Finish::kAny
                        : t.a.run_offsets ? Finish::kFoldedRuns
                        : !t.scale        ? Finish::kFolded  // a residual is where its sums begin
                        : t.residual      ? Finish::kResidual
                                          : Finish::kScaled;
  // 5 x 2 accumulators lose less between tiles than 6 x 2, which only a long sum repays.
  const int most = max_tile_pixels(vectors) - (kRegisters == 16 && vectors == 2 && t.a.depth() <= 32);
  const int64_t tiles = divide_up(pixels, most), base = pixels / tiles, extra = pixels % tiles;
  const auto a_tile = [tiles](int64_t floats) { return round_up(divide_up(floats, tiles), 16); };
  if (soon.data) {
    t.ahead = {soon.data, a_tile(soon.floats)};
  } else if (pixels > kFewPixels && pixels <= kFetchPixels) {
    const int64_t floats = t.a.depth() * vectors * kLanes;
    t.ahead = {t.w + floats, a_tile(floats)};
  }
  if (extra) tile_functions(base + 1, vectors).by_finish[(int)finish](t, extra);
  tile_functions(base, vectors).by_finish[(int)finish](t, tiles - extra);
}

// Panels [panel_begin, panel_end) of the product; the epilogue's pointers and `to` are those of channel 0. What is needed soon
// is fetched on the way.
inline void gemm(const Pixels& a, int64_t pixels, int64_t out_channels, int64_t panel_begin, int64_t panel_end,
                 const Epilogue& e, const Destination& to, const Range& soon = {}) {
  if (pixels == 0) return;
  const Panels panels(out_channels);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t channel = panels.first_channel(panel);
    const int width = panels.width(panel);
    TileRun t = {a,
                 e.product.weight + channel * a.depth(),
                 e.product.scale ? e.product.scale + channel : nullptr,
                 e.product.shift + channel,
                 e.residual ? e.residual + channel : nullptr,
                 e.residual_stride,
                 {to.data + channel, to.pixel_stride, to.offsets},
                 e.clamp,
                 e.pad_channels ? width * kLanes : panels.valid(panel),
                 {nullptr, 0}};
    gemm_panel(t, pixels, width, soon.part(panel - panel_begin, panel_end - panel_begin));
  }
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
