// Pointwise (1x1) convolution + BatchNorm [+ residual] + activation [+ channel shuffle]: on NHWC data it is a matrix product
// without any movement, or one a group.
#pragma once

#include "gemm-inl.h"
#include "shuffle-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

FASTBLOCKS_INLINE GroupedProduct pointwise_product(const PointwiseParams& p) {
  return {p.groups, p.out_channels / p.groups, p.in_channels / p.groups, p.fold};
}

// Pixels that go through the scratch of a shuffle at a time: they stay in L1.
FASTBLOCKS_INLINE int64_t shuffle_pixels(int64_t channels) { return larger(6, 6 * 1024 / larger(channels, 1)); }

// The panel to fetch while an item computes its last one: that of the item that this worker draws next if all keep pace.
FASTBLOCKS_INLINE int64_t next_panel(int64_t panel, int64_t next, int64_t count, int64_t groups) {
  if (groups > 1) return kPanelBehind;
  return next == panel || next >= count ? kNoPanel : next;
}

// Pixels [m, m + pixels) of the panels [begin, end), counted over all groups. `next`: see gemm.
inline void pointwise_block(const PointwiseParams& p, int64_t m, int64_t pixels, int64_t begin, int64_t end,
                            const Destination& to, int64_t next = kPanelBehind) {
  const GroupedProduct product = pointwise_product(p);
  const int64_t count = Panels(product.channels).count;
  for (int64_t g = begin / count; g * count < end; ++g) {
    const int64_t channel = g * product.channels;
    const Pixels left = {p.x + m * p.x_stride + g * product.depth, product.depth, p.x_stride, 1, nullptr};
    const Epilogue e = {product.of(g, p.packed_weight, p.shared), p.clamp,
                        p.residual ? p.residual + m * p.residual_stride + channel : nullptr, p.residual_stride, false};
    gemm(left, pixels, product.channels, larger(begin - g * count, 0), smaller(end - g * count, count), e,
         {to.data + channel, to.pixel_stride, nullptr}, {}, next);
  }
}

inline void pointwise_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const PointwiseParams& p = *static_cast<const PointwiseParams*>(params);
  const int64_t panel_count = pointwise_product(p).panels();
  for (int64_t item = begin; item < end; ++item) {
    // Neighbouring items share the weights, which are the larger operand where they are not in cache.
    const int64_t first = item % p.pixel_blocks * p.pixel_block, panel = item / p.pixel_blocks * p.panel_block;
    const int64_t limit = smaller(first + p.pixel_block, p.pixels), panel_end = smaller(panel + p.panel_block, panel_count);
    if (p.shuffle == 1) {
      const int64_t next = (item + p.workers) / p.pixel_blocks * p.panel_block;
      pointwise_block(p, first, limit - first, panel, panel_end, {p.out + first * p.out_stride, p.out_stride, nullptr},
                      next_panel(panel, next, panel_count, p.groups));
      continue;
    }
    const int64_t step = shuffle_pixels(p.out_channels);
    float* scratch = reinterpret_cast<float*>(memory);
    for (int64_t m = first; m < limit; m += step) {
      const int64_t pixels = smaller(step, limit - m);
      pointwise_block(p, m, pixels, 0, panel_count, {scratch, p.out_channels, nullptr});
      for (int64_t i = 0; i < pixels; ++i)
        interleave_streams<true>(scratch + i * p.out_channels, p.out_channels / p.shuffle, p.shuffle, 0, p.out_channels,
                                 p.out + (m + i) * p.out_stride);
    }
  }
}

// Cuts the product into items: pixel blocks whose operand stays in L2, and panels. Of the cuts that keep all threads busy to
// the end, the one with the fewest pixel blocks, and then the largest items that leave three a thread.
inline void cut_product(int64_t pixels, int64_t depth, int64_t panel_count, int threads, int64_t* pixel_block,
                        int64_t* pixel_blocks, int64_t* panel_block, int64_t* panel_blocks) {
  const int64_t cache_floats = 48 * 1024, tile = max_tile_pixels(kPanelVectors), between_tiles = 2;
  const int64_t block = smaller(larger(cache_floats / larger(depth, 1), 64), pixels);
  const int64_t fewest = larger(1, divide_up(pixels, larger(block, 1)));
  const int64_t most = threads > 1 ? larger(fewest, smaller(fewest + threads, pixels / tile)) : fewest;
  int64_t least = INT64_MAX;
  for (int64_t blocks = fewest; blocks <= most; ++blocks) {
    const int64_t rows = divide_up(pixels, blocks), cost = rows + between_tiles * divide_up(rows, tile);
    int64_t found = INT64_MAX, panels = panel_count;
    for (int64_t each = 1; threads > 1 && each <= panel_count; ++each) {
      const int64_t items = blocks * divide_up(panel_count, each);
      const int64_t load = divide_up(items, threads) * each * cost;
      if (load > found || (each > 1 && items < 3 * (int64_t)threads)) continue;
      found = load;
      panels = each;
    }
    if (blocks > fewest && found >= least - least / 32) continue;  // weights are read again for each block
    least = found;
    *pixel_blocks = blocks;
    *panel_block = panels;
  }
  *pixel_block = larger(1, divide_up(pixels, *pixel_blocks));
  *pixel_blocks = divide_up(pixels, *pixel_block);  // no block is empty
  *panel_blocks = divide_up(panel_count, *panel_block);
}

inline void pointwise_prepare(void* params, int threads, Work* work) {
  PointwiseParams& p = *static_cast<PointwiseParams*>(params);
  p.fold = fold_pays(p.pixels, p.in_channels / p.groups);
  const GroupedProduct product = pointwise_product(p);
  int64_t panel_blocks;
  // A shuffled pixel is written whole.
  const int64_t panels = p.shuffle == 1 ? product.panels() : 1;
  cut_product(p.pixels, p.in_channels, panels, threads, &p.pixel_block, &p.pixel_blocks, &p.panel_block, &panel_blocks);
  if (p.shuffle != 1 && threads > 1) {
    p.pixel_block = divide_up(p.pixels, larger(p.pixel_blocks, smaller(p.pixels, 4 * (int64_t)threads)));
    p.pixel_blocks = divide_up(p.pixels, p.pixel_block);
  }
  p.workers = threads;
  work->count = 1;
  work->phases[0] = {pointwise_run, &p, p.pixel_blocks * panel_blocks, 0, false};
  work->worker_bytes = p.shuffle == 1 ? 0 : (shuffle_pixels(p.out_channels) * p.out_channels + 16) * sizeof(float);
  work->shared_bytes = product.floats() * sizeof(float);
  work->shared = &p.shared;
}

inline void pointwise_begin(void* params) {
  PointwiseParams& p = *static_cast<PointwiseParams*>(params);
  pointwise_product(p).begin(p.norm, p.packed_weight, p.shared);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
