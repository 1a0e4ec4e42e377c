// The blocks of the four networks, fused: [1x1 convolution], depthwise convolution, 1x1 convolution. The expanded tensor never
// exists.
//
// Expanded channels are made a panel at a time: a few rows of the panel go into a ring of rows with side padding (L1), the
// depthwise convolution reads them there at once and leaves its result in `hidden`, a chunk of output rows wide enough for
// the projection to be an efficient matrix product and small enough for L2. Two cuts into items:
//   bands   large maps, few threads or enough images: an item is a band of output rows, from expansion to projection. Bands of
//           one image expand the rows at their seam twice.
//   slices  small maps, few images, more threads: weights dominate, so an item is one panel of expanded channels over the whole
//           map (none needs another), and a second phase projects, cut over pixels and output channels.
//
// ShuffleNet's grouped unit shuffles the expanded channels. They stay in the order in which the expansion makes them, the taps
// of the depthwise convolution are put into that order, and each group of the projection interleaves what it needs as it
// begins.
//
// Where the map between two blocks is large, the second one's bands make it: its source's rows go to scratch, as they are
// needed.
#pragma once

#include "block_parts-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// A block in bands, and how far one worker has come in its rows.
struct BlockBands {
  const BlockParams& p;
  BlockShared shared;
  BlockScratch s;
  Hidden layout;
  DepthwiseFunction pair, other;
  BlockBands* source = nullptr;
  // Input rows below `ready` are in the rings, or made by the source, or no longer needed; made rows begin with `made`.
  int64_t ready = 0, made = 0;

  BlockBands(const BlockParams& params, char* memory)
      : p(params),
        layout(p),
        pair(depthwise_function(p.kernel, p.stride, 1, true)),
        other(depthwise_function(p.kernel, p.stride, 1, false)) {
    int64_t shared_floats;
    size_t bytes;
    shared = block_shared(p, &shared_floats), s = block_scratch(p, memory, &bytes);
    if (p.stem) conv_clear(s.stem);
    if (!expands(p)) return;
    float* ring = s.ring;
    for (int64_t panel = 0; panel < layout.count(); ++panel) ring = clear_ring(p, ring, layout.lanes(panel));
  }
  void begin_band() { ready = made = 0; }
};

inline void block_rows(BlockBands& b, int64_t image, int64_t oy_begin, int64_t oy_end, int64_t limit, float* out);

// Lets the source make the input rows [begin, end) as far as they are not there yet. Of those before, the ones that are still
// needed move to the front. Rows from `limit` on will not be asked for.
inline void make_input(BlockBands& b, int64_t image, int64_t begin, int64_t end, int64_t limit) {
  const int64_t row = b.p.x.row_stride, kept = larger(0, b.ready - begin);
  if (kept) __builtin_memmove(b.s.made, b.s.made + (begin - b.made) * row, kept * row * sizeof(float));
  block_rows(*b.source, image, begin + kept, end, limit, b.s.made + kept * row);
  b.made = begin, b.ready = end;
}

// Output rows [oy_begin, oy_end) of a band that ends with row `limit`; the first one's first pixel goes to `out`.
inline void block_rows(BlockBands& b, int64_t image, int64_t oy_begin, int64_t oy_end, int64_t limit, float* out) {
  const BlockParams& p = b.p;
  const int64_t row_pixels = p.width + 2 * p.padding, out_panels = block_projection(p).panels();
  for (int64_t oy = oy_begin; oy < oy_end; oy += p.chunk_rows) {
    const int64_t end = smaller(oy_end, oy + p.chunk_rows);
    int64_t iy, iy_end;
    input_rows(p, oy, end, &iy, &iy_end);
    if (expands(p)) {
      float* ring = b.s.ring;
      for (int64_t panel = 0; panel < b.layout.count(); ++panel) {
        const int64_t lanes = b.layout.lanes(panel);
        block_slice(p, b.shared, b.s, lanes == kPanelVectors * kLanes ? b.pair : b.other, image, panel, ring, oy, end, b.ready,
                    b.s.hidden);
        ring += ring_rows(p) * row_pixels * lanes;
      }
      b.ready = iy_end;
    } else {
      InputRows x;
      if (b.source) {
        int64_t first, last;
        input_rows(p, oy, limit, &first, &last);
        make_input(b, image, iy, iy_end, last);
        x = {b.s.made, iy};
      } else {
        x = {p.x.data + image * p.x.image_stride, 0};
      }
      block_depthwise(p, b.shared, b.s, b.other, x, 0, p.hidden_channels, nullptr, oy, end, b.s.hidden);
    }
    if (p.pooled.data) block_average(p, image, oy, end);
    // The rows of the next chunk come nearer while this one is projected.
    Range soon{};
    if (end < limit && !p.stem && !b.source) {
      int64_t next, next_end;
      input_rows(p, end, smaller(limit, end + p.chunk_rows), &next, &next_end);
      soon = {p.x.data + image * p.x.image_stride + iy_end * p.x.row_stride, (next_end - iy_end) * p.x.row_stride};
    }
    block_project(p, b.shared, b.s, image, oy * p.out_width, (end - oy) * p.out_width, b.s.hidden,
                  out + (oy - oy_begin) * p.out_width * p.out.pixel_stride, 0, out_panels, soon);
  }
}

inline void block_bands_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const BlockParams& p = *static_cast<const BlockParams*>(params);
  BlockBands block(p, memory);
  const auto run = [&] {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / p.bands, band = item % p.bands;
      const int64_t from = band * p.out_height / p.bands, to = (band + 1) * p.out_height / p.bands;
      block.begin_band();
      if (block.source) block.source->begin_band();
      block_rows(block, image, from, to, to, p.out.data + image * p.out.image_stride + from * p.out_width * p.out.pixel_stride);
    }
  };
  if (!p.source) return run();
  BlockBands source(*p.source, block.s.source);
  block.source = &source;
  run();
}

inline void block_slices_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const BlockParams& p = *static_cast<const BlockParams*>(params);
  int64_t shared_floats;
  size_t bytes;
  const BlockShared shared = block_shared(p, &shared_floats);
  const BlockScratch s = block_scratch(p, memory, &bytes);
  const Hidden layout(p);
  const DepthwiseFunction pair = depthwise_function(p.kernel, p.stride, 1, true);
  const DepthwiseFunction other = depthwise_function(p.kernel, p.stride, 1, false);
  if (p.stem) conv_clear(s.stem);
  const int64_t slices = layout.count() * p.slice_parts, items = slices + p.pool_items;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / items, rest = item % items;
    float* hidden = shared.hidden + image * p.out_height * p.out_width * p.hidden_stride;
    if (rest >= slices) {
      const int64_t part = rest - slices;
      block_average(p, image, part * p.out_height / p.pool_items, (part + 1) * p.out_height / p.pool_items);
    } else {
      const int64_t panel = rest / p.slice_parts, part = rest % p.slice_parts, lanes = layout.lanes(panel);
      const int64_t from = part * p.out_height / p.slice_parts, to = (part + 1) * p.out_height / p.slice_parts;
      clear_ring(p, s.ring, lanes);
      block_slice(p, shared, s, lanes == kPanelVectors * kLanes ? pair : other, image, panel, s.ring, from, to, 0,
                  hidden + from * p.out_width * p.hidden_stride,
                  next_panel(panel, (rest + 1) / p.slice_parts, layout.count(), p.expand_groups));
    }
  }
}

inline void block_project_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const BlockParams& p = *static_cast<const BlockParams*>(params);
  int64_t shared_floats;
  size_t bytes;
  const BlockShared shared = block_shared(p, &shared_floats);
  const BlockScratch s = block_scratch(p, memory, &bytes);
  const int64_t map = p.out_height * p.out_width, panel_count = block_projection(p).panels();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / (p.pixel_blocks * p.panel_blocks), rest = item % (p.pixel_blocks * p.panel_blocks);
    const int64_t pixel = rest % p.pixel_blocks * p.pixel_block, panel = rest / p.pixel_blocks * p.panel_block;
    block_project(p, shared, s, image, pixel, smaller(p.pixel_block, map - pixel),
                  shared.hidden + (image * map + pixel) * p.hidden_stride,
                  p.out.data + image * p.out.image_stride + pixel * p.out.pixel_stride, panel,
                  smaller(panel + p.panel_block, panel_count), {},
                  next_panel(panel, (rest + 1) / p.pixel_blocks * p.panel_block, panel_count, p.groups));
  }
}

// Bands and chunks of so many pixels are products as efficient as a whole map's.
constexpr int64_t kEnoughPixels = 84;

// Of `rows` output rows, those of a step: as many as keep one panel's ring in L1.
FASTBLOCKS_INLINE int64_t step_rows(const BlockParams& p, int64_t rows) {
  const int64_t ring_floats = 5 * 1024, row_floats = (p.width + 2 * p.padding) * kPanelVectors * kLanes;
  const int64_t step = larger(1, (ring_floats / row_floats - p.kernel) / p.stride + 1);
  return divide_up(rows, divide_up(rows, step));
}

// Output rows a chunk: as many as keep the hidden channels in L2, and beside them what comes in and goes out, where that is
// more (ShuffleNet's units read a row again, for its residual); these leave a chunk the pixels of an efficient product.
FASTBLOCKS_INLINE void choose_rows(BlockParams& p, bool slices) {
  const int64_t hidden_floats = 80 * 1024, all_floats = 96 * 1024;
  // Without an expansion the next chunk's input is of the size of this one's hidden channels, and shares the cache with them.
  const int64_t next_floats = expands(p) ? 0 : p.stride * p.width * p.in_channels;
  const int64_t chunk_floats = p.out_width * p.hidden_stride + next_floats;
  const int64_t out_floats = p.out_width * p.out_channels * (p.other.data ? 2 : 1);
  const int64_t passing_floats = p.expand_weight ? p.stride * p.width * p.in_channels + out_floats : 0;
  const int64_t height = slices ? p.out_height : divide_up(p.out_height, p.bands);
  const int64_t room = larger(all_floats / (chunk_floats + passing_floats), divide_up(kEnoughPixels, p.out_width));
  const int64_t chunk = smaller(height, larger(1, smaller(hidden_floats / chunk_floats, room)));
  p.chunk_rows = divide_up(height, divide_up(height, chunk));  // chunks of equal height
  p.step_rows = step_rows(p, slices ? p.out_height : p.chunk_rows);
}

// Into how many bands of rows the slices are cut: into 2 where that evens out few slices over the threads, though the rows at
// the seam are then expanded twice.
FASTBLOCKS_INLINE int64_t slice_parts(const BlockParams& p, int64_t slices, int threads) {
  const int64_t whole = divide_up(slices, threads) * 2 * p.out_height;
  const int64_t halves = divide_up(2 * slices, threads) * (p.out_height + (expands(p) ? p.kernel - p.stride : 0));
  return p.out_height > 1 && halves < whole - whole / 16 ? 2 : 1;
}

// Rows a chunk of a block and its source: as many as keep what lies between them, both blocks' hidden channels and the source's
// next input in L2. Half as many took 7 % more time for MobileNet's stem and first two blocks, twice as many 1 %.
FASTBLOCKS_INLINE void choose_rows_of_both(BlockParams& p) {
  BlockParams& source = *p.source;
  const int64_t most = 110 * 1024;
  const int64_t hidden = p.out_width * p.hidden_stride + p.stride * p.width * source.hidden_stride;
  const int64_t made = p.width * p.in_channels, next = expands(source) ? 0 : source.stride * source.width * source.in_channels;
  const int64_t height = divide_up(p.out_height, p.bands);
  const int64_t rows = (most - (p.kernel - p.stride) * made) / (hidden + p.stride * (made + next));
  p.chunk_rows = divide_up(height, divide_up(height, smaller(height, larger(1, rows))));
  p.step_rows = p.chunk_rows;
  source.bands = p.bands;
  source.chunk_rows = p.stride * p.chunk_rows;
  source.step_rows = step_rows(source, source.chunk_rows);
}

inline void block_prepare(void* params, int threads, Work* work) {
  BlockParams& p = *static_cast<BlockParams*>(params);
  const Hidden layout(p);
  // An odd number of cache lines a pixel: the pixels of a column then spread over all sets of the cache.
  p.hidden_stride = (divide_up(layout.padded(), 16) | 1) * 16;
  p.fold_expand = p.expand_weight && fold_pays(p.images * p.height * p.width, p.in_channels / p.expand_groups);
  p.fold_project = fold_pays(p.images * p.out_height * p.out_width, p.hidden_channels / p.groups);
  p.pixel_block = 0, p.pool_items = 0;
  int64_t floats;
  block_shared(p, &floats);
  work->shared = &p.shared;
  work->count = p.absorbed ? 0 : 1, work->worker_bytes = 0;
  if (p.absorbed) {  // the other block, which is prepared next, has the work
    work->shared_bytes = floats * sizeof(float);
    return;
  }
  const bool whole_images = threads == 1 || p.images % threads == 0 || p.images >= 4 * threads;
  // Large enough bands spare a wait between expansion and projection. That repays the rows at the seam, and weights that each
  // thread reads.
  const bool slices = !p.source && !whole_images && p.out_height * p.out_width < 28 * 28 &&
                      p.out_height / threads * p.out_width < kEnoughPixels;
  p.bands = slices ? 0 : whole_images ? 1 : smaller(p.out_height, threads);
  if (p.source)
    choose_rows_of_both(p);
  else
    choose_rows(p, slices);
  if (slices) {
    const GroupedProduct product = block_projection(p);
    // A group is projected whole: its operand is laid out once.
    const int64_t unit = p.groups > 1 ? product.panels() / p.groups : 1;
    cut_product(p.out_height * p.out_width, p.hidden_channels, product.panels() / unit, threads, &p.pixel_block,
                &p.pixel_blocks, &p.panel_block, &p.panel_blocks);
    p.panel_block *= unit;
    p.pool_items = p.pooled.data ? threads : 0;
    p.slice_parts = slice_parts(p, p.images * layout.count(), threads);
    work->count = 2;
    work->phases[0] = {block_slices_run, &p, p.images * (layout.count() * p.slice_parts + p.pool_items), p.images};
    work->phases[1] = {block_project_run, &p, p.images * p.pixel_blocks * p.panel_blocks, p.images};
    // interleaving reads whole vectors
    floats += p.images * p.out_height * p.out_width * p.hidden_stride + 16;
  } else {
    work->phases[0] = {block_bands_run, &p, p.images * p.bands, p.images};
  }
  work->shared_bytes = floats * sizeof(float);
  block_scratch(p, nullptr, &work->worker_bytes);
}

// The taps of the depthwise convolution in the order of the hidden channels, multiplied by the BatchNorm's scale; see
// fold_depthwise.
inline void fold_shuffled_depthwise(const BlockParams& p, float* out) {
  const Hidden layout(p);
  const int64_t taps = p.kernel * p.kernel, from = round_up(p.hidden_channels, kLanes), padded = layout.padded();
  const int64_t n = p.hidden_channels / p.groups;
  const BatchNorm& norm = p.depthwise_norm;
  __builtin_memset(out, 0, padded * (taps + 1) * sizeof(float));
  for (int64_t section = 0; section < layout.sections; ++section)
    for (int64_t j = 0; j < layout.channels; ++j) {
      const int64_t made = section * layout.channels + j, c = made % n * p.groups + made / n;
      float* to = out + section * layout.panels.padded() + j;
      float scale = 1.0f, shift = norm.conv_bias ? norm.conv_bias[c] : 0.0f;
      if (norm.mean) {
        scale = 1.0f / __builtin_sqrtf(norm.var[c] + norm.eps);
        if (norm.weight) scale *= norm.weight[c];
        shift = (shift - norm.mean[c]) * scale + (norm.bias ? norm.bias[c] : 0.0f);
      }
      *to = shift;
      for (int64_t tap = 0; tap < taps; ++tap) to[(tap + 1) * padded] = p.depthwise_weight[tap * from + c] * scale;
    }
}

inline void block_begin(void* params) {
  BlockParams& p = *static_cast<BlockParams*>(params);
  int64_t floats;
  const BlockShared s = block_shared(p, &floats);
  if (p.expand_weight) block_expansion(p).begin(p.expand_norm, p.expand_weight, s.expand);
  if (p.groups == 1)
    fold_depthwise(p.depthwise_norm, p.depthwise_weight, p.hidden_channels, p.kernel * p.kernel, s.depthwise);
  else
    fold_shuffled_depthwise(p, s.depthwise);
  block_projection(p).begin(p.project_norm, p.project_weight, s.project);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
