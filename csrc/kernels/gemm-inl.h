// The matrix product at the heart of every dense and pointwise convolution: out[m][n] = epilogue(sum_k a[m][k] * w[k][n]).
//
// Weights are packed in panels of 2 vectors of output channels (the last of 3 or 1 where the count is odd), each [K][panel]. A
// tile is as many pixels as the register file allows beside one row of the panel: with 16 registers 6 x 2, 4 x 3 or 12 x 1
// accumulators: two FMA pipes of latency 4 need at least 8 independent ones, and a step of k loads 8 or fewer operands for
// 12 FMAs. Pixels are split evenly over tiles (49 = 4 x 6 + 5 x 5), so that no tile is a short remainder.
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int kPanelVectors = 2;
constexpr int kMaxPanelVectors = 3;
constexpr int kMaxTilePixels = kRegisters == 32 ? 24 : 12;
// Rows of k after which a panel no longer stays in half an L1 cache beside the tile's pixels: longer sums are cut there and
// the partial sums kept in a small buffer.
constexpr int64_t kDepthBlock = kRegisters == 32 ? 256 : 256;

FASTBLOCKS_INLINE int max_tile_pixels(int vectors) {
  if (kRegisters == 32) return vectors == 3 ? 9 : vectors == 2 ? 14 : 24;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 12;
}

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

// What happens to a finished sum.
struct Epilogue {
  const float* scale;  // of all output channels, padded to whole vectors
  const float* shift;
  Clamp clamp;
  const float* residual;  // or null
  int64_t residual_stride;
  bool pad_channels;  // the output has room for whole vectors (scratch): store padding lanes too
};

// The left operand. Its depth may come in several runs (a convolution's kernel rows): element k = run * run_length + j of pixel
// m is runs[run][m * pixel_stride + j].
struct Pixels {
  const float* const* runs;
  int64_t run_count, run_length, pixel_stride;
};

template <int M, int V>
inline void tile(const float* const* runs, int64_t run_count, int64_t run_length, int64_t offset, int64_t a_stride,
                 const float* w, float* partial, bool first, bool last, const float* scale, const float* shift, Clamp clamp,
                 const float* residual, int64_t residual_stride, float* const* out, int valid) {
  Vec sum[M][V];
  if (first) {
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[m][v] = Vec{};
  } else {
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[m][v] = load(partial + (m * V + v) * kLanes);
  }
  for (int64_t run = 0; run < run_count; ++run) {
    // One pointer serves three pixels through [base + stride] and [base + 2 * stride]: 14 pixels do not fit the integer registers.
    const float* a[(M + 2) / 3];
#pragma GCC unroll 32
    for (int i = 0; i < (M + 2) / 3; ++i) a[i] = runs[run] + offset + 3 * i * a_stride;
#pragma GCC unroll 2
    for (int64_t k = 0; k < run_length; ++k) {
      Vec b[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) b[v] = load(w + v * kLanes);
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m) {
        const Vec x = broadcast(a[m / 3][(m % 3) * a_stride]);
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[m][v] += x * b[v];
      }
#pragma GCC unroll 32
      for (int i = 0; i < (M + 2) / 3; ++i) ++a[i];
      w += V * kLanes;
    }
  }
  if (!last) {
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) store(partial + (m * V + v) * kLanes, sum[m][v]);
    return;
  }
  const Vec low = broadcast(clamp.low), high = broadcast(clamp.high);
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    const Vec vscale = load(scale + v * kLanes), vshift = load(shift + v * kLanes);
    const int lanes = valid - v * kLanes;
    if (lanes >= kLanes) {
      if (residual) {
#pragma GCC unroll 32
        for (int m = 0; m < M; ++m) {
          const Vec y = sum[m][v] * vscale + vshift + load(residual + m * residual_stride + v * kLanes);
          store(out[m] + v * kLanes, at_most(high, at_least(low, y)));
        }
      } else {
#pragma GCC unroll 32
        for (int m = 0; m < M; ++m)
          store(out[m] + v * kLanes, at_most(high, at_least(low, sum[m][v] * vscale + vshift)));
      }
    } else {
      for (int m = 0; m < M; ++m) {
        Vec y = sum[m][v] * vscale + vshift;
        if (residual) y += load_partial(residual + m * residual_stride + v * kLanes, lanes);
        store_partial(out[m] + v * kLanes, lanes, at_most(high, at_least(low, y)));
      }
    }
  }
}

typedef void (*TileFunction)(const float* const*, int64_t, int64_t, int64_t, int64_t, const float*, float*, bool, bool,
                             const float*, const float*, Clamp, const float*, int64_t, float* const*, int);

template <int V>
struct Tiles;

#define FASTBLOCKS_TILES_4(V, M) tile<M + 1, V>, tile<M + 2, V>, tile<M + 3, V>, tile<M + 4, V>
template <>
struct Tiles<1> {
  static constexpr TileFunction table[] = {
    FASTBLOCKS_TILES_4(1, 0), FASTBLOCKS_TILES_4(1, 4), FASTBLOCKS_TILES_4(1, 8),
#if FASTBLOCKS_VECTOR_BYTES == 64
    FASTBLOCKS_TILES_4(1, 12), FASTBLOCKS_TILES_4(1, 16), FASTBLOCKS_TILES_4(1, 20)
#endif
  };
};
template <>
struct Tiles<2> {
  static constexpr TileFunction table[] = {
    FASTBLOCKS_TILES_4(2, 0), tile<5, 2>, tile<6, 2>,
#if FASTBLOCKS_VECTOR_BYTES == 64
    FASTBLOCKS_TILES_4(2, 6), FASTBLOCKS_TILES_4(2, 10)
#endif
  };
};
template <>
struct Tiles<3> {
  static constexpr TileFunction table[] = {
    FASTBLOCKS_TILES_4(3, 0),
#if FASTBLOCKS_VECTOR_BYTES == 64
    FASTBLOCKS_TILES_4(3, 4), tile<9, 3>
#endif
  };
};
#undef FASTBLOCKS_TILES_4

FASTBLOCKS_INLINE TileFunction tile_function(int pixels, int vectors) {
  if (vectors == 2) return Tiles<2>::table[pixels - 1];
  if (vectors == 3) return Tiles<3>::table[pixels - 1];
  return Tiles<1>::table[pixels - 1];
}

// Floats of the buffer of partial sums for `pixels` pixels of one panel.
FASTBLOCKS_INLINE int64_t partial_floats(int64_t pixels) { return pixels * kMaxPanelVectors * kLanes; }

// Where the product goes: pixel m (counted from 0) stands at rows[m / row_pixels] + (m % row_pixels) * pixel_stride.
struct Destination {
  float* const* rows;
  int64_t row_pixels, pixel_stride;
};

// One panel for `pixels` pixels. `w` is the panel's packed weight; `scale`, `shift`, `residual` and the destination's channels begin
// at the panel's first channel. `partial` is needed only where the depth exceeds kDepthBlock (single-run operands).
inline void gemm_panel(const Pixels& a, int64_t pixels, const float* w, int vectors, int valid, const Epilogue& e,
                       const float* residual, const float* scale, const float* shift, const Destination& to, float* partial) {
  const int64_t tiles = divide_up(pixels, max_tile_pixels(vectors));
  const int64_t base = pixels / tiles, extra = pixels % tiles;
  const TileFunction small = tile_function((int)base, vectors);
  const TileFunction big = extra ? tile_function((int)base + 1, vectors) : small;
  const int64_t depth = a.run_length;
  // Blocks of equal depth, so that the last is not a short one.
  const int64_t blocks = a.run_count > 1 ? 1 : divide_up(depth, kDepthBlock);
  const int64_t block_depth = divide_up(depth, blocks);
  float* out[kMaxTilePixels];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = block * block_depth, length = smaller(block_depth, depth - from);
    const float* first_run = a.runs[0] + from;
    const float* const* runs = blocks > 1 ? &first_run : a.runs;
    const float* weight = w + from * vectors * kLanes;
    const bool last = block + 1 == blocks;
    int64_t m = 0, row = 0, column = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t count = base + (t < extra);
      if (last)
        for (int64_t i = 0; i < count; ++i) {
          out[i] = to.rows[row] + column * to.pixel_stride;
          if (++column == to.row_pixels) column = 0, ++row;
        }
      (t < extra ? big : small)(runs, a.run_count, length, m * a.pixel_stride, a.pixel_stride, weight,
                                partial + m * vectors * kLanes, block == 0, last, scale, shift, e.clamp,
                                residual ? residual + m * e.residual_stride : nullptr, e.residual_stride, out, valid);
      m += count;
    }
  }
}

// Panels [panel_begin, panel_end) of the product; packed weights, scale, shift and `to` are those of channel 0.
inline void gemm(const Pixels& a, int64_t pixels, const float* packed, int64_t out_channels, int64_t panel_begin,
                 int64_t panel_end, const Epilogue& e, const Destination& to, float* partial, float** rows_scratch) {
  const Panels panels(out_channels);
  const int64_t depth = a.run_count * a.run_length, row_count = divide_up(pixels, to.row_pixels);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t channel = panels.first_channel(panel);
    const int width = panels.width(panel);
    for (int64_t row = 0; row < row_count; ++row) rows_scratch[row] = to.rows[row] + channel;
    const Destination here = {rows_scratch, to.row_pixels, to.pixel_stride};
    gemm_panel(a, pixels, packed + channel * depth, width, e.pad_channels ? width * kLanes : panels.valid(panel), e,
               e.residual ? e.residual + channel : nullptr, e.scale + channel, e.shift + channel, here, partial);
  }
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
