// What fused blocks are made of, for one image: rows of one panel expanded into a ring, rows of the depthwise convolution,
// pixels projected. How they are put together is in blocks-inl.h.
#pragma once

#include "block_layout-inl.h"
#include "depthwise-inl.h"
#include "pool-inl.h"
#include "shuffle-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Rows [iy_begin, iy_end) of one panel of the block's input, made from the image.
inline void block_stem(const BlockParams& p, const BlockScratch& s, int64_t image, int64_t panel, float* ring, int64_t iy_begin,
                       int64_t iy_end) {
  const Hidden hidden(p);
  const int64_t lanes = hidden.lanes(panel), rows = ring_rows(p), row_pixels = p.width + 2 * p.padding;
  ring += p.padding * lanes - hidden.first(panel);
  int64_t next = 0;
  for (int64_t iy = iy_begin; iy < iy_end; ++iy)
    next = conv_output_row(*p.stem, s.stem, image, iy, next, panel, panel + 1,
                           {ring + iy % rows * row_pixels * lanes, lanes, nullptr}, true);
}

// A slice of a map without an expansion: the input's own channels take their place in the ring. Read where they are, the
// windows of a few of many channels lie in few sets of the cache: at 512 channels the depthwise convolution took six times as
// long.
inline void block_copy(const BlockParams& p, int64_t image, int64_t panel, float* ring, int64_t iy_begin, int64_t iy_end) {
  const Hidden hidden(p);
  const int64_t lanes = hidden.lanes(panel), valid = hidden.valid(panel);
  const int64_t rows = ring_rows(p), row_pixels = p.width + 2 * p.padding;
  for (int64_t iy = iy_begin; iy < iy_end; ++iy) {
    const float* from = p.x.data + image * p.x.image_stride + iy * p.x.row_stride + hidden.first(panel);
    float* to = ring + (iy % rows * row_pixels + p.padding) * lanes;
    for (int64_t x = 0; x < p.width; ++x, from += p.x.pixel_stride, to += lanes) {
      int64_t c = 0;
      for (; c + kLanes <= valid; c += kLanes) store(to + c, load(from + c));
      if (c < valid) store(to + c, load_partial(from + c, (int)(valid - c)));
    }
  }
}

// Expands input rows [iy_begin, iy_end) of one panel into its ring, whose rows have padding between them. Wide rows are a
// product each; narrow ones go together, with a table of destinations, so that tiles cross from row to row. `next`: see gemm.
inline void block_expand(const BlockParams& p, const BlockShared& shared, const BlockScratch& s, int64_t image, int64_t panel,
                         float* ring, int64_t iy_begin, int64_t iy_end, int64_t next) {
  if (p.stem) return block_stem(p, s, image, panel, ring, iy_begin, iy_end);
  if (!p.expand_weight) return block_copy(p, image, panel, ring, iy_begin, iy_end);
  const Hidden hidden(p);
  const GroupedProduct product = block_expansion(p);
  const int64_t group = panel / hidden.panels.count, lanes = hidden.lanes(panel);
  const int64_t rows = ring_rows(p), row_pixels = p.width + 2 * p.padding;
  const Epilogue e = {product.of(group, p.expand_weight, shared.expand), p.expand_clamp, nullptr, 0, true};
  const bool narrow = p.width < 8 * max_tile_pixels(kPanelVectors);
  panel %= hidden.panels.count;
  ring -= hidden.panels.first_channel(panel);
  int64_t* step = s.ring_steps;
  for (int64_t iy = iy_begin; iy < iy_end; ++iy) {
    if (narrow) {
      for (int64_t x = 1; x < p.width; ++x) *step++ = lanes;
      *step++ = ((iy + 1) % rows - iy % rows) * row_pixels * lanes - (p.width - 1) * lanes;
      if (iy + 1 < iy_end) continue;
    }
    const int64_t from = narrow ? iy_begin : iy;
    const float* x = p.x.data + image * p.x.image_stride + from * p.x.row_stride + group * product.depth;
    const Pixels left = {x, product.depth, p.x.pixel_stride, 1, nullptr};
    const Destination to = {ring + (from % rows * row_pixels + p.padding) * lanes, lanes, narrow ? s.ring_steps : nullptr};
    gemm(left, (iy + 1 - from) * p.width, product.channels, panel, panel + 1, e, to, {}, next);
  }
}

// Rows of a block's input, as they lie in memory from row `first` on.
struct InputRows {
  const float* data;
  int64_t first;
};

// Depthwise rows [oy_begin, oy_end) of `lanes` channels from the place `channel` on, into hidden (whose row oy_begin stands
// first). They are read in the ring, or, where that is null, in x.
inline void block_depthwise(const BlockParams& p, const BlockShared& shared, const BlockScratch& s, DepthwiseFunction function,
                            const InputRows& x, int64_t channel, int64_t lanes, const float* ring, int64_t oy_begin,
                            int64_t oy_end, float* hidden) {
  const int64_t padded = Hidden(p).padded(), rows = ring_rows(p), row_pixels = p.width + 2 * p.padding;
  DepthwiseRows r;
  r.rows = s.input_rows, r.count = oy_end - oy_begin, r.kernel_height = p.kernel;
  r.width = ring ? row_pixels : p.width, r.pixel_stride = ring ? lanes : p.x.pixel_stride;
  r.out_width = p.out_width, r.out_stride = p.hidden_stride;
  r.kernel_width = p.kernel, r.stride = p.stride, r.padding = ring ? 0 : p.padding, r.dilation = 1;
  r.weight = shared.depthwise + padded + channel, r.weight_stride = padded;
  r.shift = shared.depthwise + channel, r.clamp = p.depthwise_clamp;
  r.out = hidden + channel;
  r.channels = lanes, r.pad_channels = ring != nullptr;
  const float** to = s.input_rows;
  for (int64_t oy = oy_begin; oy < oy_end; ++oy, to += p.kernel)
    find_rows(oy, p.stride, p.padding, 1, p.kernel, p.height, to, [&](int64_t y) {
      return ring ? ring + y % rows * row_pixels * lanes : x.data + (y - x.first) * p.x.row_stride + channel;
    });
  function(r);
}

FASTBLOCKS_INLINE float* clear_ring(const BlockParams& p, float* ring, int64_t lanes) {
  const int64_t row_pixels = p.width + 2 * p.padding;
  for (int64_t row = 0; row < ring_rows(p); ++row, ring += row_pixels * lanes) {
    __builtin_memset(ring, 0, p.padding * lanes * sizeof(float));
    __builtin_memset(ring + (p.padding + p.width) * lanes, 0, p.padding * lanes * sizeof(float));
  }
  return ring;
}

// Pixels [pixel, pixel + pixels) of one image of the projection's panels [panel_begin, panel_end), counted over all groups.
// hidden and out are those of the first pixel.
inline void block_project(const BlockParams& p, const BlockShared& shared, const BlockScratch& s, int64_t image, int64_t pixel,
                          int64_t pixels, const float* hidden, float* out, int64_t panel_begin, int64_t panel_end, Range soon,
                          int64_t next = kPanelBehind) {
  const GroupedProduct product = block_projection(p);
  const Hidden layout(p);
  const int64_t count = Panels(product.channels).count, step = project_pixels(p);
  const int64_t result_stride = round_up(p.out_channels, kLanes);
  const auto at = [&](const Image& i, int64_t m) { return i.data + image * i.image_stride + m * i.pixel_stride; };
  for (int64_t m = pixel; m < pixel + pixels; m += step) {
    const int64_t now = smaller(step, pixel + pixels - m);
    const float* h = hidden + (m - pixel) * p.hidden_stride;
    float* const here = out + (m - pixel) * p.out.pixel_stride;
    for (int64_t g = panel_begin / count; g * count < panel_end; ++g) {
      const int64_t channel = g * product.channels;
      Pixels left = {h, product.depth, p.hidden_stride, 1, nullptr};
      if (p.groups > 1) {
        left.data = s.gathered, left.pixel_stride = gathered_stride(p);
        for (int64_t i = 0; i < now; ++i)
          interleave_streams<false>(h + i * p.hidden_stride, layout.stream_stride(p), p.groups, g * product.depth,
                                    (g + 1) * product.depth, s.gathered + i * left.pixel_stride);
      }
      const Epilogue e = {product.of(g, p.project_weight, shared.project), p.project_clamp,
                          p.residual.data ? at(p.residual, m) + channel : nullptr, p.residual.pixel_stride,
                          p.other.data != nullptr};
      const Destination to = p.other.data ? Destination{s.result, result_stride, nullptr}
                                          : Destination{here + channel, p.out.pixel_stride, nullptr};
      gemm(left, now, product.channels, larger(panel_begin - g * count, 0), smaller(panel_end - g * count, count), e, to,
           soon.part(g, p.groups), next);
    }
    soon = {};
    if (p.other.data) {
      const Panels panels(product.channels);
      const int64_t from = panels.first_channel(panel_begin);
      const int64_t to = panels.first_channel(panel_end - 1) + panels.valid(panel_end - 1);
      for (int64_t i = 0; i < now; ++i) {
        const float* const both[2] = {at(p.other, m + i), s.result + i * result_stride};
        interleave_exact<2>(both, 2 * from, 2 * to, here + i * p.out.pixel_stride + 2 * from);
      }
    }
  }
}

// The rows of the input that output rows [oy_begin, oy_end) read: up to *end.
FASTBLOCKS_INLINE void input_rows(const BlockParams& p, int64_t oy_begin, int64_t oy_end, int64_t* begin, int64_t* end) {
  *begin = larger(0, oy_begin * p.stride - p.padding);
  *end = larger(*begin, smaller(p.height, (oy_end - 1) * p.stride - p.padding + p.kernel));
}

// Output rows [oy_begin, oy_end) of one panel of expanded channels, into hidden: a few rows are expanded, then read at once.
// Input rows below `expanded` are in the ring already.
inline void block_slice(const BlockParams& p, const BlockShared& shared, const BlockScratch& s, DepthwiseFunction function,
                        int64_t image, int64_t panel, float* ring, int64_t oy_begin, int64_t oy_end, int64_t expanded,
                        float* hidden, int64_t next = kPanelBehind) {
  const Hidden layout(p);
  for (int64_t oy = oy_begin; oy < oy_end; oy += p.step_rows) {
    const int64_t step_end = smaller(oy_end, oy + p.step_rows);
    int64_t iy, iy_end;
    input_rows(p, oy, step_end, &iy, &iy_end);
    block_expand(p, shared, s, image, panel, ring, larger(iy, expanded), iy_end, next);
    expanded = larger(expanded, iy_end);
    block_depthwise(p, shared, s, function, {}, layout.first(panel), layout.lanes(panel), ring, oy, step_end,
                    hidden + (oy - oy_begin) * p.out_width * p.hidden_stride);
  }
}

inline void block_average(const BlockParams& p, int64_t image, int64_t begin, int64_t end) {
  WindowPoolParams w{};
  w.height = p.height, w.width = p.width, w.channels = p.in_channels, w.out_width = p.out_width;
  for (int i = 0; i < 2; ++i) w.kernel[i] = 3, w.stride[i] = p.stride, w.padding[i] = 1;
  w.x = p.x, w.out = p.pooled;
  pool_rows<true>(w, image, begin, end);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
