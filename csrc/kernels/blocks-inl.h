// The inverted residual (MobileNetV2, section 3.3), fused: the expanded tensor never exists.
//
// Expanded channels are made a panel at a time: a few rows of the panel go into a ring of rows with side padding (L1), the
// depthwise convolution reads them there at once and leaves its result in `hidden`, a chunk of output rows wide enough for
// the projection to be an efficient matrix product and small enough for L2. Two cuts into items:
//   bands   large maps, or enough images: an item is a band of output rows, from expansion to projection. Bands of one image
//           expand the rows at their seam twice.
//   slices  small maps, few images: weights dominate, so an item is one panel of expanded channels over the whole map (none
//           needs another), and a second phase projects, cut over pixels and output channels.
#pragma once

#include "depthwise-inl.h"
#include "pointwise-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

struct BlockShared {  // views into params.shared
  float *expand, *depthwise, *project, *hidden;
};

FASTBLOCKS_INLINE BlockShared block_shared(const InvertedResidualParams& p, int64_t* floats) {
  BlockShared s;
  s.expand = p.shared;
  s.depthwise = s.expand + (p.expand_weight ? folded_product_floats(p.hidden_channels, p.in_channels, p.fold_expand) : 0);
  s.project = s.depthwise + folded_depthwise_floats(p.hidden_channels, p.kernel * p.kernel);
  const float* end = s.project + folded_product_floats(p.out_channels, p.hidden_channels, p.fold_project);
  s.hidden = p.shared + round_up(end - p.shared, 16);
  *floats = s.hidden - p.shared;
  return s;
}

FASTBLOCKS_INLINE int64_t ring_rows(const InvertedResidualParams& p) { return (p.step_rows - 1) * p.stride + p.kernel; }

FASTBLOCKS_INLINE bool by_slices(const InvertedResidualParams& p) { return p.bands == 0; }

struct BlockScratch {
  const float** input_rows;  // kernel rows of one output row
  int64_t* ring_offsets;     // of the pixels of an expansion
  float *ring, *hidden;
};

FASTBLOCKS_INLINE BlockScratch block_scratch(const InvertedResidualParams& p, char* memory, size_t* bytes) {
  BlockScratch s;
  s.input_rows = reinterpret_cast<const float**>(memory);
  s.ring_offsets = reinterpret_cast<int64_t*>(memory) + round_up(p.kernel, 8);
  float* next = reinterpret_cast<float*>(s.ring_offsets + round_up(ring_rows(p) * p.width, 8));
  const int64_t row_pixels = p.width + 2 * p.padding;
  const int64_t lanes = by_slices(p) ? kMaxPanelVectors * kLanes : round_up(p.hidden_channels, kLanes);
  s.ring = next;
  if (p.expand_weight) next += round_up(ring_rows(p) * row_pixels * lanes, 16);
  s.hidden = next;
  if (!by_slices(p)) next += p.chunk_rows * p.out_width * p.hidden_stride;
  *bytes = (char*)next - memory;
  return s;
}

// Expands input rows [iy_begin, iy_end) of one panel into its ring, whose rows have padding between them. Wide rows are a
// product each; narrow ones go together, with a table of destinations, so that tiles cross from row to row.
inline void block_expand(const InvertedResidualParams& p, const BlockShared& shared, const BlockScratch& s, int64_t image,
                         int64_t panel, float* ring, int64_t iy_begin, int64_t iy_end) {
  const Panels panels(p.hidden_channels);
  const int64_t lanes = panels.width(panel) * kLanes, rows = ring_rows(p), row_pixels = p.width + 2 * p.padding;
  const Epilogue e = {folded_product(p.expand_weight, p.hidden_channels, p.fold_expand, shared.expand), p.clamp, nullptr, 0,
                      true};
  const bool narrow = p.width < 8 * max_tile_pixels(kPanelVectors);
  ring -= panels.first_channel(panel);
  int64_t* offset = s.ring_offsets;
  for (int64_t iy = iy_begin; iy < iy_end; ++iy) {
    const int64_t row = (iy % rows * row_pixels + p.padding) * lanes;
    if (narrow) {
      for (int64_t x = 0; x < p.width; ++x) *offset++ = row + x * lanes;
      if (iy + 1 < iy_end) continue;
    }
    const int64_t from = narrow ? iy_begin : iy;
    const float* x = p.x.data + image * p.x.image_stride + from * p.x.row_stride;
    const Pixels left = {x, p.in_channels, p.x.pixel_stride, 1, nullptr};
    const Destination to = {narrow ? ring : ring + row, lanes, narrow ? s.ring_offsets : nullptr};
    gemm(left, (iy + 1 - from) * p.width, p.hidden_channels, panel, panel + 1, e, to);
  }
}

// Depthwise rows [oy_begin, oy_end) of `lanes` channels from `channel` on, into hidden (whose row oy_begin stands first). ring
// is null where there is no expansion: the input is read in place.
inline void block_depthwise(const InvertedResidualParams& p, const BlockShared& shared, const BlockScratch& s,
                            DepthwiseRowFunction row_function, int64_t image, int64_t channel, int64_t lanes, const float* ring,
                            int64_t oy_begin, int64_t oy_end, float* hidden) {
  const int64_t padded = round_up(p.hidden_channels, kLanes), rows = ring_rows(p);
  const int64_t row_pixels = p.width + 2 * p.padding;
  for (int64_t oy = oy_begin; oy < oy_end; ++oy) {
    DepthwiseRow r;
    kernel_row_range(oy, p.stride, p.padding, 1, p.kernel, p.height, &r.row_begin, &r.row_end);
    for (int64_t ky = r.row_begin; ky < r.row_end; ++ky) {
      const int64_t iy = oy * p.stride - p.padding + ky;
      s.input_rows[ky] =
          ring ? ring + iy % rows * row_pixels * lanes : p.x.data + image * p.x.image_stride + iy * p.x.row_stride + channel;
    }
    r.rows = s.input_rows;
    r.width = ring ? row_pixels : p.width, r.pixel_stride = ring ? lanes : p.x.pixel_stride;
    r.out_width = p.out_width, r.out_stride = p.hidden_stride;
    r.kernel_width = p.kernel, r.stride = p.stride, r.padding = ring ? 0 : p.padding, r.dilation = 1;
    r.weight = shared.depthwise + padded + channel, r.weight_stride = padded;
    r.shift = shared.depthwise + channel, r.clamp = p.clamp;
    r.out = hidden + (oy - oy_begin) * p.out_width * p.hidden_stride + channel;
    r.channels = lanes, r.pad_channels = ring != nullptr;
    row_function(r);
  }
}

FASTBLOCKS_INLINE float* clear_ring(const InvertedResidualParams& p, float* ring, int64_t lanes) {
  const int64_t row_pixels = p.width + 2 * p.padding;
  for (int64_t row = 0; row < ring_rows(p); ++row, ring += row_pixels * lanes) {
    __builtin_memset(ring, 0, p.padding * lanes * sizeof(float));
    __builtin_memset(ring + (p.padding + p.width) * lanes, 0, p.padding * lanes * sizeof(float));
  }
  return ring;
}

inline void block_project(const InvertedResidualParams& p, const BlockShared& shared, int64_t image, int64_t pixel,
                          int64_t pixels, const float* hidden, int64_t panel_begin, int64_t panel_end) {
  const float* residual = p.residual ? p.x.data + image * p.x.image_stride + pixel * p.x.pixel_stride : nullptr;
  const Pixels left = {hidden, p.hidden_channels, p.hidden_stride, 1, nullptr};
  const Clamp none = {-__builtin_inff(), __builtin_inff()};
  const Epilogue e = {folded_product(p.project_weight, p.out_channels, p.fold_project, shared.project), none, residual,
                      p.x.pixel_stride, false};
  const Destination to = {p.out.data + image * p.out.image_stride + pixel * p.out.pixel_stride, p.out.pixel_stride, nullptr};
  gemm(left, pixels, p.out_channels, panel_begin, panel_end, e, to);
}

// The rows of the input that output rows [oy_begin, oy_end) read: up to *end.
FASTBLOCKS_INLINE void input_rows(const InvertedResidualParams& p, int64_t oy_begin, int64_t oy_end, int64_t* begin,
                                  int64_t* end) {
  *begin = larger(0, oy_begin * p.stride - p.padding);
  *end = larger(*begin, smaller(p.height, (oy_end - 1) * p.stride - p.padding + p.kernel));
}

// Output rows [oy_begin, oy_end) of one panel of expanded channels, into hidden: a few rows are expanded, then read at once.
// Input rows below `expanded` are in the ring already.
inline void block_slice(const InvertedResidualParams& p, const BlockShared& shared, const BlockScratch& s,
                        DepthwiseRowFunction row_function, int64_t image, int64_t panel, float* ring, int64_t oy_begin,
                        int64_t oy_end, int64_t expanded, float* hidden) {
  const Panels panels(p.hidden_channels);
  for (int64_t oy = oy_begin; oy < oy_end; oy += p.step_rows) {
    const int64_t step_end = smaller(oy_end, oy + p.step_rows);
    int64_t iy, iy_end;
    input_rows(p, oy, step_end, &iy, &iy_end);
    block_expand(p, shared, s, image, panel, ring, larger(iy, expanded), iy_end);
    expanded = larger(expanded, iy_end);
    block_depthwise(p, shared, s, row_function, image, panels.first_channel(panel), panels.width(panel) * kLanes, ring, oy,
                    step_end, hidden + (oy - oy_begin) * p.out_width * p.hidden_stride);
  }
}

inline void block_bands_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const InvertedResidualParams& p = *static_cast<const InvertedResidualParams*>(params);
  int64_t shared_floats;
  size_t bytes;
  const BlockShared shared = block_shared(p, &shared_floats);
  const BlockScratch s = block_scratch(p, memory, &bytes);
  const Panels hidden_panels(p.hidden_channels), out_panels(p.out_channels);
  const int64_t row_pixels = p.width + 2 * p.padding;
  const DepthwiseRowFunction pair = depthwise_row_function(p.kernel, p.stride, 1, true);
  const DepthwiseRowFunction other = depthwise_row_function(p.kernel, p.stride, 1, false);
  if (p.expand_weight) {
    float* ring = s.ring;
    for (int64_t panel = 0; panel < hidden_panels.count; ++panel)
      ring = clear_ring(p, ring, hidden_panels.width(panel) * kLanes);
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * p.out_height / p.bands, to = (band + 1) * p.out_height / p.bands;
    int64_t expanded = 0;  // input rows below this one are in the ring, or no longer needed
    for (int64_t oy = from; oy < to; oy += p.chunk_rows) {
      const int64_t oy_end = smaller(to, oy + p.chunk_rows);
      if (p.expand_weight) {
        float* ring = s.ring;
        for (int64_t panel = 0; panel < hidden_panels.count; ++panel) {
          const int64_t lanes = hidden_panels.width(panel) * kLanes;
          block_slice(p, shared, s, hidden_panels.width(panel) == kPanelVectors ? pair : other, image, panel, ring, oy, oy_end,
                      expanded, s.hidden);
          ring += ring_rows(p) * row_pixels * lanes;
        }
        int64_t iy;
        input_rows(p, oy, oy_end, &iy, &expanded);
      } else {
        block_depthwise(p, shared, s, other, image, 0, p.hidden_channels, nullptr, oy, oy_end, s.hidden);
      }
      block_project(p, shared, image, oy * p.out_width, (oy_end - oy) * p.out_width, s.hidden, 0, out_panels.count);
    }
  }
}

inline void block_slices_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const InvertedResidualParams& p = *static_cast<const InvertedResidualParams*>(params);
  int64_t shared_floats;
  size_t bytes;
  const BlockShared shared = block_shared(p, &shared_floats);
  const BlockScratch s = block_scratch(p, memory, &bytes);
  const Panels panels(p.hidden_channels);
  const DepthwiseRowFunction pair = depthwise_row_function(p.kernel, p.stride, 1, true);
  const DepthwiseRowFunction other = depthwise_row_function(p.kernel, p.stride, 1, false);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / panels.count, panel = item % panels.count, lanes = panels.width(panel) * kLanes;
    float* hidden = shared.hidden + image * p.out_height * p.out_width * p.hidden_stride;
    clear_ring(p, s.ring, lanes);
    block_slice(p, shared, s, panels.width(panel) == kPanelVectors ? pair : other, image, panel, s.ring, 0, p.out_height, 0,
                hidden);
  }
}

inline void block_project_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const InvertedResidualParams& p = *static_cast<const InvertedResidualParams*>(params);
  int64_t shared_floats;
  const BlockShared shared = block_shared(p, &shared_floats);
  const int64_t map = p.out_height * p.out_width, panel_count = Panels(p.out_channels).count;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / (p.pixel_blocks * p.panel_blocks), rest = item % (p.pixel_blocks * p.panel_blocks);
    const int64_t pixel = rest % p.pixel_blocks * p.pixel_block, panel = rest / p.pixel_blocks * p.panel_block;
    block_project(p, shared, image, pixel, smaller(p.pixel_block, map - pixel),
                  shared.hidden + (image * map + pixel) * p.hidden_stride, panel, smaller(panel + p.panel_block, panel_count));
  }
}

// Output rows a step: as many as keep one panel's ring in L1. Output rows a chunk: as many as keep the hidden channels in L2.
FASTBLOCKS_INLINE void choose_rows(InvertedResidualParams& p, bool slices) {
  const int64_t ring_floats = 5 * 1024, hidden_floats = 80 * 1024;
  const int64_t row_floats = (p.width + 2 * p.padding) * kPanelVectors * kLanes;
  const int64_t chunk = smaller(p.out_height, larger(1, hidden_floats / (p.out_width * p.hidden_stride)));
  p.chunk_rows = divide_up(p.out_height, divide_up(p.out_height, chunk));  // chunks of equal height
  const int64_t limit = slices ? p.out_height : p.chunk_rows;
  const int64_t step = larger(1, (ring_floats / row_floats - p.kernel) / p.stride + 1);
  p.step_rows = divide_up(limit, divide_up(limit, step));
}

inline void block_prepare(void* params, int threads, Work* work) {
  InvertedResidualParams& p = *static_cast<InvertedResidualParams*>(params);
  const Panels hidden_panels(p.hidden_channels), out_panels(p.out_channels);
  // An odd number of cache lines a pixel: the pixels of a column then spread over all sets of the cache.
  p.hidden_stride = (divide_up(p.hidden_channels, 16) | 1) * 16;
  const bool whole_images = threads == 1 || p.images % threads == 0 || p.images >= 4 * threads;
  const bool slices = !whole_images && p.expand_weight && p.out_height * p.out_width < 28 * 28;
  p.bands = slices ? 0 : whole_images ? 1 : smaller(p.out_height, threads);
  choose_rows(p, slices);
  p.pixel_block = 0;
  p.fold_expand = p.expand_weight && fold_pays(p.images * p.height * p.width, p.in_channels);
  p.fold_project = fold_pays(p.images * p.out_height * p.out_width, p.hidden_channels);
  int64_t floats;
  block_shared(p, &floats);
  if (slices) {
    cut_product(p.out_height * p.out_width, p.hidden_channels, out_panels.count, threads, &p.pixel_block, &p.pixel_blocks,
                &p.panel_block, &p.panel_blocks);
    work->count = 2;
    work->phases[0] = {block_slices_run, &p, p.images * hidden_panels.count};
    work->phases[1] = {block_project_run, &p, p.images * p.pixel_blocks * p.panel_blocks};
    floats += p.images * p.out_height * p.out_width * p.hidden_stride;
  } else {
    work->count = 1;
    work->phases[0] = {block_bands_run, &p, p.images * p.bands};
  }
  work->shared_bytes = floats * sizeof(float);
  work->shared = &p.shared;
  block_scratch(p, nullptr, &work->worker_bytes);
}

inline void block_begin(void* params) {
  InvertedResidualParams& p = *static_cast<InvertedResidualParams*>(params);
  int64_t floats;
  const BlockShared s = block_shared(p, &floats);
  if (p.expand_weight) fold_product(p.expand_norm, p.expand_weight, p.hidden_channels, p.in_channels, p.fold_expand, s.expand);
  fold_depthwise(p.depthwise_norm, p.depthwise_weight, p.hidden_channels, p.kernel * p.kernel, s.depthwise);
  fold_product(p.project_norm, p.project_weight, p.out_channels, p.hidden_channels, p.fold_project, s.project);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
