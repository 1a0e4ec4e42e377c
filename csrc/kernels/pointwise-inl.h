// Pointwise (1x1) convolution + BatchNorm [+ residual] + activation: on NHWC data it is a matrix product without any movement.
#pragma once

#include "gemm-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

inline void pointwise_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const PointwiseParams& p = *static_cast<const PointwiseParams*>(params);
  const Panels panels(p.out_channels);
  for (int64_t item = begin; item < end; ++item) {
    // Neighbouring items share the weights, which are the larger operand where they are not in cache.
    const int64_t m = item % p.pixel_blocks * p.pixel_block, panel = item / p.pixel_blocks * p.panel_block;
    const int64_t pixels = smaller(p.pixel_block, p.pixels - m);
    const Pixels left = {p.x + m * p.x_stride, p.in_channels, p.x_stride, 1, nullptr};
    const Epilogue e = {folded_product(p.packed_weight, p.out_channels, p.fold, p.shared), p.clamp,
                        p.residual ? p.residual + m * p.residual_stride : nullptr, p.residual_stride, false};
    const Destination to = {p.out + m * p.out_stride, p.out_stride, nullptr};
    gemm(left, pixels, p.out_channels, panel, smaller(panel + p.panel_block, panels.count), e, to);
  }
}

// Cuts the product into items: pixel blocks whose operand stays in L2, and panels where there are too few pixels. Of the panel
// counts that share the work evenly, the largest that leaves three items a thread.
inline void cut_product(int64_t pixels, int64_t depth, int64_t panel_count, int threads, int64_t* pixel_block,
                        int64_t* pixel_blocks, int64_t* panel_block, int64_t* panel_blocks) {
  const int64_t cache_floats = 48 * 1024;
  int64_t block = larger(cache_floats / larger(depth, 1), 24);
  block = smaller(block, pixels);
  *pixel_blocks = divide_up(pixels, block);
  *pixel_block = divide_up(pixels, *pixel_blocks);
  *panel_block = panel_count;
  if (threads > 1) {
    int64_t least = INT64_MAX;
    for (int64_t panels = 1; panels <= panel_count; ++panels) {
      const int64_t items = *pixel_blocks * divide_up(panel_count, panels);
      const int64_t load = divide_up(items, threads) * panels;
      if (load > least || (panels > 1 && items < 3 * (int64_t)threads)) continue;
      least = load;
      *panel_block = panels;
    }
  }
  *panel_blocks = divide_up(panel_count, *panel_block);
}

inline void pointwise_prepare(void* params, int threads, Work* work) {
  PointwiseParams& p = *static_cast<PointwiseParams*>(params);
  const Panels panels(p.out_channels);
  int64_t panel_blocks;
  cut_product(p.pixels, p.in_channels, panels.count, threads, &p.pixel_block, &p.pixel_blocks, &p.panel_block, &panel_blocks);
  work->count = 1;
  work->phases[0] = {pointwise_run, &p, p.pixel_blocks * panel_blocks};
  work->worker_bytes = 0;
  p.fold = fold_pays(p.pixels, p.in_channels);
  work->shared_bytes = folded_product_floats(p.out_channels, p.in_channels, p.fold) * sizeof(float);
  work->shared = &p.shared;
}

inline void pointwise_begin(void* params) {
  PointwiseParams& p = *static_cast<PointwiseParams*>(params);
  fold_product(p.norm, p.packed_weight, p.out_channels, p.in_channels, p.fold, p.shared);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
