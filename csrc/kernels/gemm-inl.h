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
#include "pairs-inl.h"
#include "split-inl.h"
#include "tiles-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

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

// Which panel's weights are fetched while the last panel of a product is computed: the one behind it, as a rule; that of the
// worker's next item where it is known; or none.
constexpr int64_t kPanelBehind = -1, kNoPanel = -2;

// Shorter sums end before a line fetched at their beginning is there.
constexpr int64_t kFarDepth = 16;

inline void gemm_panel(TileRun t, int64_t pixels, int vectors, const Range& soon) {
  const bool plain = t.valid == vectors * kLanes && !(t.a.run_offsets && (t.scale || t.residual));
  const Finish finish = t.a.run_offsets ? Finish::kFoldedRuns
                        : !t.scale      ? Finish::kFolded  // a residual is where its sums begin
                        : t.residual    ? Finish::kResidual
                                        : Finish::kScaled;
  const auto run = [&](int64_t size, int64_t count) {
    const TileFunctions& f = tile_functions(size, vectors);
    (plain ? f.by_finish[(int)finish] : f.any)(t, count);
  };
  const bool halves = halves_pay(t, pixels, vectors);
  const bool split = halves && vector_pipes() == Pipes::kHalves, pairs = halves && vector_pipes() == Pipes::kSeparate;
  // 5 x 2 accumulators lose less between tiles than 6 x 2, which only a long sum repays.
  const int most = split   ? most_split(vectors - 1)
                   : pairs ? 2 * most_pairs(vectors - 1)
                           : tile_pixels(vectors) - (kRegisters == 16 && vectors == 2 && t.a.depth() <= 32);
  const int64_t tiles = divide_up(pixels, most), base = pixels / tiles, extra = pixels % tiles;
  if (soon.data) {
    const int64_t share = larger(1, tiles / soon.pieces), floats = round_up(divide_up(soon.floats, share), 16);
    t.ahead = {soon.data, floats, soon.data + soon.floats, soon.piece_stride,
               soon.pieces > 1 ? soon.piece_stride - divide_up(soon.floats, floats) * floats : 0};
  }
  if (split) {
    const int64_t rest = pixels - split_panel(t, pixels, vectors);
    if (rest) run(rest, 1);
    return;
  }
  if (pairs) {
    pair_panel(t, pixels / 2, vectors);
    if (pixels % 2) run(1, 1);
    return;
  }
  if (extra) run(base + 1, extra);
  run(base, tiles - extra);
}

// Panels [panel_begin, panel_end) of the product; the epilogue's pointers and `to` are those of channel 0. What is needed soon
// is fetched on the way: `soon`, or else, where pixels are few, weights (of the panel `next` at last).
inline void gemm(const Pixels& a, int64_t pixels, int64_t out_channels, int64_t panel_begin, int64_t panel_end,
                 const Epilogue& e, const Destination& to, const Range& soon = {}, int64_t next = kPanelBehind) {
  if (pixels == 0) return;
  const Panels panels(out_channels);
  const auto weights = [&](int64_t panel) { return e.product.weight + panels.first_channel(panel) * a.depth(); };
  const bool fetch_weights = !soon.data && pixels > kFewPixels && pixels <= kFetchPixels;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t channel = panels.first_channel(panel);
    const int width = panels.width(panel);
    TileRun t = {a,
                 weights(panel),
                 e.product.scale ? e.product.scale + channel : nullptr,
                 e.product.shift + channel,
                 e.residual ? e.residual + channel : nullptr,
                 e.residual_stride,
                 {to.data + channel, to.pixel_stride, to.steps, !e.pad_channels && a.depth() >= kFarDepth},
                 e.clamp,
                 e.pad_channels ? width * kLanes : panels.valid(panel),
                 panels.valid(panel),
                 {}};
    Range now = soon.part(panel - panel_begin, panel_end - panel_begin);
    const int64_t then = panel + 1 < panel_end || next == kPanelBehind ? panel + 1 : next;
    if (fetch_weights && then >= 0) now = {weights(then), a.depth() * width * kLanes};
    gemm_panel(t, pixels, width, now);
  }
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
