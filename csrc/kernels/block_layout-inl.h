// Where the numbers of a fused block lie while it runs: its hidden channels, what its workers share, and a worker's scratch.
#pragma once

#include "conv-inl.h"
#include "pointwise-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

FASTBLOCKS_INLINE GroupedProduct block_expansion(const BlockParams& p) {
  return {p.expand_groups, p.hidden_channels / p.expand_groups, p.in_channels / p.expand_groups, p.fold_expand};
}

FASTBLOCKS_INLINE GroupedProduct block_projection(const BlockParams& p) {
  return {p.groups, p.out_channels / p.groups, p.hidden_channels / p.groups, p.fold_project};
}

// The hidden channels as they lie in memory: sections, each of whole vectors, one a group of the expansion.
struct Hidden {
  int64_t sections, channels;  // channels of a section
  Panels panels;               // of a section

  explicit Hidden(const BlockParams& p)
      : sections(p.expand_groups), channels(p.hidden_channels / p.expand_groups), panels(channels) {}
  int64_t padded() const { return sections * panels.padded(); }
  int64_t count() const { return sections * panels.count; }  // panels in all
  int64_t first(int64_t panel) const {                       // the place of a panel's first channel
    return panel / panels.count * panels.padded() + panels.first_channel(panel % panels.count);
  }
  int lanes(int64_t panel) const { return panels.width(panel % panels.count) * kLanes; }
  int valid(int64_t panel) const { return panels.valid(panel % panels.count); }
  // Where the streams that a shuffle interleaves begin, and the distance between them.
  int64_t stream_stride(const BlockParams& p) const { return sections > 1 ? panels.padded() : p.hidden_channels / p.groups; }
};

struct BlockShared {  // views into params.shared
  float *expand, *depthwise, *project, *hidden;
};

FASTBLOCKS_INLINE BlockShared block_shared(const BlockParams& p, int64_t* floats) {
  BlockShared s;
  s.expand = p.shared;
  s.depthwise = s.expand + (p.expand_weight ? block_expansion(p).floats() : 0);
  s.project = s.depthwise + Hidden(p).padded() * (p.kernel * p.kernel + 2);
  const float* end = s.project + block_projection(p).floats();
  s.hidden = p.shared + round_up(end - p.shared, 16);
  *floats = s.hidden - p.shared;
  return s;
}

FASTBLOCKS_INLINE int64_t ring_rows(const BlockParams& p) { return (p.step_rows - 1) * p.stride + p.kernel; }

// Whether the depthwise convolution reads what the block has made itself, in a ring.
FASTBLOCKS_INLINE bool expands(const BlockParams& p) { return p.expand_weight || p.stem; }

FASTBLOCKS_INLINE bool by_slices(const BlockParams& p) { return p.bands == 0; }

// Pixels that go through the scratch of a shuffle at a time: they stay in L1.
FASTBLOCKS_INLINE int64_t shuffle_pixels(int64_t channels) { return larger(6, 6 * 1024 / larger(channels, 1)); }

// The left operand of a projection behind a shuffle is laid out anew, so many pixels at a time; so are results that are to be
// interleaved with others.
FASTBLOCKS_INLINE int64_t project_pixels(const BlockParams& p) {
  return p.other.data ? shuffle_pixels(p.out_channels) : larger(1, p.out_height * p.out_width);
}

FASTBLOCKS_INLINE int64_t gathered_stride(const BlockParams& p) {
  return round_up(p.hidden_channels / p.groups + p.groups * (kLanes + 2), 16);
}

struct BlockScratch {
  const float** input_rows;  // kernel rows of the output rows that are made at a time
  int64_t* ring_steps;       // from one pixel of an expansion to the next
  float *ring, *hidden, *gathered, *result;
  ConvScratch stem;  // where there is one
  float* made;       // rows of the input that the source has made
  char* source;      // the source's own scratch
};

// The input rows that a chunk reads.
FASTBLOCKS_INLINE int64_t made_rows(const BlockParams& p) { return (p.chunk_rows - 1) * p.stride + p.kernel; }

inline BlockScratch block_scratch(const BlockParams& p, char* memory, size_t* bytes) {
  BlockScratch s;
  s.input_rows = reinterpret_cast<const float**>(memory);
  const int64_t most_rows = by_slices(p) ? p.step_rows : larger(p.step_rows, p.chunk_rows);
  s.ring_steps = reinterpret_cast<int64_t*>(memory) + round_up(most_rows * p.kernel, 8);
  float* next = reinterpret_cast<float*>(s.ring_steps + round_up(ring_rows(p) * p.width, 8));
  const int64_t row_pixels = p.width + 2 * p.padding;
  const int64_t lanes = by_slices(p) ? kMaxPanelVectors * kLanes : Hidden(p).padded();
  const int64_t chunk_pixels = by_slices(p) ? p.pixel_block : p.chunk_rows * p.out_width;
  s.ring = next;
  if (by_slices(p) || expands(p)) next += round_up(ring_rows(p) * row_pixels * lanes, 16);
  s.hidden = next;
  if (!by_slices(p)) next += chunk_pixels * p.hidden_stride + 16;
  s.gathered = next + 16;  // interleaving begins a little before
  if (p.groups > 1) next += chunk_pixels * gathered_stride(p) + 2 * 16 + kMostStreams * kLanes;
  s.result = next;
  if (p.other.data) next += shuffle_pixels(p.out_channels) * round_up(p.out_channels, kLanes) + 16;
  *bytes = round_up((char*)next - memory, 64);
  if (p.stem) {
    size_t more;
    s.stem = conv_scratch(*p.stem, memory + *bytes, &more);
    *bytes += more;
  }
  s.made = nullptr, s.source = nullptr;
  if (p.source) {
    s.made = reinterpret_cast<float*>(memory + *bytes);
    s.source = reinterpret_cast<char*>(s.made + round_up(made_rows(p) * p.x.row_stride, 16));
    size_t more;
    block_scratch(*p.source, s.source, &more);
    *bytes = s.source + more - memory;
  }
  return s;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
