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

// Groups, and what is shuffled, are made in steps.
FASTBLOCKS_INLINE bool by_steps(const PointwiseParams& p) { return p.groups > 1 || p.shuffle != 1; }

constexpr int64_t kStepPixels = 64;

// From pixel to pixel of a step's result: sums are stored, and interleaving reads, in whole vectors.
FASTBLOCKS_INLINE int64_t shuffle_stride(int64_t channels) { return round_up(channels + kLanes, kLanes); }

// The panel to fetch while an item computes its last one: that of the item that this worker draws next, as a rule.
FASTBLOCKS_INLINE int64_t next_panel(int64_t panel, int64_t next, int64_t count, int64_t groups) {
  if (groups > 1) return kPanelBehind;
  return next == panel || next >= count ? kNoPanel : next;
}

// Pixels [m, m + pixels) of the panels [begin, end) of one group, to the group's channel 0. `next`: see gemm.
FASTBLOCKS_INLINE void pointwise_group(const PointwiseParams& p, int64_t group, int64_t m, int64_t pixels, int64_t begin,
                                       int64_t end, const Destination& to, bool pad, const Range& soon, int64_t next) {
  const GroupedProduct product = pointwise_product(p);
  const Pixels left = {p.x + m * p.x_stride + group * product.depth, product.depth, p.x_stride, 1, nullptr};
  const float* residual = p.residual ? p.residual + m * p.residual_stride + group * product.channels : nullptr;
  const Epilogue e = {product.of(group, p.packed_weight, p.shared), p.clamp, residual, p.residual_stride, pad};
  gemm(left, pixels, product.channels, begin, end, e, to, soon, next);
}

// A result of as many floats is written to lines that are in no core's own cache.
constexpr int64_t kFarFloats = 512 * 1024;

// All groups' panels [begin, end) of some pixels, in steps. A pixel's channels lie apart, a group's a few lines: no prefetcher
// of the hardware follows them, so each step fetches the next one's whole pixels; and where more is written than read, its
// last groups fetch the lines that its own result goes to, which would else be waited for all at once.
inline void pointwise_groups(const PointwiseParams& p, int64_t first, int64_t limit, int64_t begin, int64_t end,
                             float* scratch) {
  const Panels panels(pointwise_product(p).channels);
  const bool fetch_result = p.out_channels > p.in_channels && p.out_stride == p.out_channels && begin == 0 &&
                            panels.count <= p.step_panels && p.pixels * p.out_channels > kFarFloats;
  const int64_t readers = fetch_result ? larger(1, p.groups * p.in_channels / (p.in_channels + p.out_channels)) : p.groups;
  for (int64_t m = first; m < limit; m += p.step_pixels) {
    const int64_t pixels = smaller(p.step_pixels, limit - m), behind = smaller(p.step_pixels, p.pixels - m - pixels);
    const Range next = {behind > 0 ? p.x + (m + pixels) * p.x_stride : nullptr, behind * p.x_stride};
    for (int64_t panel = begin; panel < end; panel += p.step_panels) {
      const Range soon = panel == begin ? next : Range{nullptr, 0};
      const int64_t panel_end = smaller(panel + p.step_panels, end), channel = panels.first_channel(panel);
      if (p.shuffle == 1) {
        for (int64_t g = 0; g < p.groups; ++g)
          pointwise_group(p, g, m, pixels, panel, panel_end,
                          {p.out + m * p.out_stride + g * panels.channels, p.out_stride, nullptr}, false,
                          soon.part(g, p.groups), kPanelBehind);
        continue;
      }
      // A group's padding is overwritten by the group behind it.
      const int64_t width = panels.first_channel(panel_end - 1) + panels.valid(panel_end - 1) - channel;
      const int64_t all = p.groups * width, stride = shuffle_stride(all);
      const Range result = {p.out + m * p.out_stride, pixels * p.out_stride};
      for (int64_t g = 0; g < p.groups; ++g)
        pointwise_group(p, g, m, pixels, panel, panel_end, {scratch + g * width - channel, stride, nullptr}, !p.residual,
                        g < readers ? soon.part(g, readers) : result.part(g - readers, p.groups - readers), kPanelBehind);
      for (int64_t i = 0; i < pixels; ++i)
        interleave_streams<true>(scratch + i * stride, all / p.shuffle, p.shuffle, 0, all,
                                 p.out + (m + i) * p.out_stride + channel * p.groups);
    }
  }
}

inline void pointwise_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const PointwiseParams& p = *static_cast<const PointwiseParams*>(params);
  const int64_t panel_count = Panels(p.out_channels / p.groups).count;
  for (int64_t item = begin; item < end; ++item) {
    // Neighbouring items share the weights, which are the larger operand where they are not in cache.
    const int64_t first = item % p.pixel_blocks * p.pixel_block, panel = item / p.pixel_blocks * p.panel_block;
    const int64_t limit = smaller(first + p.pixel_block, p.pixels), panel_end = smaller(panel + p.panel_block, panel_count);
    if (by_steps(p)) {
      pointwise_groups(p, first, limit, panel, panel_end, reinterpret_cast<float*>(memory));
    } else {
      const int64_t next = (item + 1) / p.pixel_blocks * p.panel_block;
      pointwise_group(p, 0, first, limit - first, panel, panel_end, {p.out + first * p.out_stride, p.out_stride, nullptr},
                      false, {}, next_panel(panel, next, panel_count, 1));
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

// Steps of as many pixels as repay what a call of a product costs, and of as many panels as leave a step's result in L2. Only
// where each group is a stream of the shuffle can its panels be interleaved by themselves.
inline void choose_steps(PointwiseParams& p) {
  const int64_t scratch_floats = 24 * 1024;
  const bool whole = p.shuffle != 1 && p.shuffle != p.groups;
  const int64_t most = whole ? smaller(kStepPixels, larger(6, scratch_floats / p.out_channels)) : kStepPixels;
  p.step_pixels = divide_up(p.pixel_block, divide_up(p.pixel_block, most));
  p.step_panels = p.panel_block;
  if (p.shuffle == 1 || whole) return;
  p.step_panels = smaller(p.step_panels, larger(1, scratch_floats / (p.step_pixels * p.groups * kPanelVectors * kLanes)));
}

inline void pointwise_prepare(void* params, int threads, Work* work) {
  PointwiseParams& p = *static_cast<PointwiseParams*>(params);
  p.fold = fold_pays(p.pixels, p.in_channels / p.groups);
  const GroupedProduct product = pointwise_product(p);
  const int64_t panels = Panels(product.channels).count;
  int64_t panel_blocks = 1, scratch = 0;
  const int64_t blocks = smaller(4 * (int64_t)threads, p.pixels / (kStepPixels * 3 / 4)) / threads * threads;
  if (by_steps(p) && (blocks > 0 || (p.shuffle != 1 && p.shuffle != p.groups))) {
    // Whole pixels: what is written are whole lines, and what is read is read once.
    p.pixel_block = divide_up(p.pixels, larger(blocks, smaller(p.pixels, threads)));
    p.pixel_blocks = divide_up(p.pixels, p.pixel_block);
    p.panel_block = panels;
  } else {
    cut_product(p.pixels, p.in_channels, panels, threads, &p.pixel_block, &p.pixel_blocks, &p.panel_block, &panel_blocks);
  }
  if (by_steps(p)) {
    choose_steps(p);
    if (p.shuffle != 1)
      scratch =
          p.step_pixels * shuffle_stride(p.groups * smaller(product.channels, (p.step_panels * kPanelVectors + 1) * kLanes));
  }
  work->count = 1;
  work->phases[0] = {pointwise_run, &p, p.pixel_blocks * panel_blocks, 0};
  work->worker_bytes = scratch * sizeof(float);
  work->shared_bytes = product.floats() * sizeof(float);
  work->shared = &p.shared;
}

inline void pointwise_begin(void* params) {
  PointwiseParams& p = *static_cast<PointwiseParams*>(params);
  pointwise_product(p).begin(p.norm, p.packed_weight, p.shared);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
