// The operands of a matrix product: how weights are packed, and how pixels are read and written.
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// A number known when compiling, as an argument.
template <int N>
struct Number {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

constexpr int kPanelVectors = 2;
constexpr int kMaxPanelVectors = 3;

// How `channels` output channels are cut into panels.
struct Panels {
  int64_t channels, vectors, count;
  explicit Panels(int64_t n)
      : channels(n), vectors(divide_up(n, kLanes)), count(vectors < 2 ? vectors : vectors / kPanelVectors) {}
  int64_t first_vector(int64_t panel) const { return panel * kPanelVectors; }
  int width(int64_t panel) const {  // in vectors
    return (int)(panel + 1 == count ? vectors - first_vector(panel) : kPanelVectors);
  }
  int64_t first_channel(int64_t panel) const { return first_vector(panel) * kLanes; }
  int valid(int64_t panel) const { return (int)smaller(channels - first_channel(panel), width(panel) * kLanes); }
  int64_t padded() const { return vectors * kLanes; }
};

// Packs w[n][k] (n < channels, k = index into depth_offsets) into panels; padded channels are zero.
inline void pack_gemm(const float* w, int64_t channels, int64_t channel_stride, int64_t depth, const int64_t* depth_offsets,
                      float* out) {
  const Panels panels(channels);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t lanes = panels.width(panel) * kLanes, valid = panels.valid(panel), first = panels.first_channel(panel);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t n = 0; n < valid; ++n) out[n] = w[(first + n) * channel_stride + depth_offsets[k]];
      for (int64_t n = valid; n < lanes; ++n) out[n] = 0.0f;
      out += lanes;
    }
  }
}

// The left operand: element k of pixel m is data[m * pixel_stride + k]. Its depth may come in several runs of equal length (the
// kernel rows of a convolution): run r begins run_offsets[r] floats further on.
struct Pixels {
  const float* data;
  int64_t run_length, pixel_stride;
  int64_t run_count;
  const int64_t* run_offsets;  // null: one run

  int64_t depth() const { return run_length * run_count; }
};

// Where the product goes: its first pixel to data, and from pixel m to the next are pixel_stride or steps[m] floats. `far`: its
// lines are not in the caches, and are fetched while the sums are made.
struct Destination {
  float* data;
  int64_t pixel_stride;
  const int64_t* steps;  // null: in a straight line
  bool far = false;
};

// Walks over a destination, and asks nothing on the way: a straight line is one step again and again.
struct Walk {
  float* out;
  const int64_t* step;
  int64_t ahead;  // to the next step

  explicit FASTBLOCKS_INLINE Walk(const Destination& to)
      : out(to.data), step(to.steps ? to.steps : &to.pixel_stride), ahead(to.steps ? 1 : 0) {}
  FASTBLOCKS_INLINE float* next() {
    float* const here = out;
    out += *step, hide(out);
    step += ahead;
    return here;
  }
  FASTBLOCKS_INLINE void leave(Destination* to) const {
    to->data = out;
    if (ahead) to->steps = step;
  }
};

// Memory that is needed soon, in one piece or in more at equal distances, and part `index` of `count` equal ones of each.
struct Range {
  const float* data;  // null: none
  int64_t floats;     // a piece
  int64_t pieces = 1, piece_stride = 0;

  Range part(int64_t index, int64_t count) const {
    if (!data) return {nullptr, 0};
    const int64_t share = divide_up(floats, count);
    return {data + index * share, share, pieces, piece_stride};
  }
};

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
