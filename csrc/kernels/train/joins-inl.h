// The passes that no convolution can take along: statistics of an output that another kernel wrote, sums of branches, a chain's
// end, channels of several values in one.
#pragma once

#include "../shuffle-inl.h"
#include "finish-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int64_t kPassFloats = 32 * 1024;

template <class Params>
FASTBLOCKS_INLINE void cut_pass(Params& p) {
  cut_pixels(p.pixels, larger(16, kPassFloats / larger(1, p.channels)), 256, &p.items, &p.item_pixels);
}

constexpr int64_t kPassBlock = 64;

// Calls f(first pixel, pixels) for the blocks of an item.
template <class Params, class F>
FASTBLOCKS_INLINE void for_blocks(const Params& p, int64_t item, F f) {
  const int64_t to = smaller((item + 1) * p.item_pixels, p.pixels);
  for (int64_t m = item * p.item_pixels; m < to; m += kPassBlock) f(m, smaller(kPassBlock, to - m));
}

inline void moments_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const MomentsPass& p = *static_cast<const MomentsPass*>(params);
  Scratch scratch(memory);
  Moments moments(p.channels, scratch);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t from = item * p.item_pixels, to = smaller(from + p.item_pixels, p.pixels);
    for_blocks(p, item, [&](int64_t m, int64_t pixels) {
      add_moments(moments, p.z + m * p.channels, pixels, p.channels, 0, p.channels, m == from);
    });
    store_moments(moments, to - from, p.partials + item * (1 + 2 * padded(p.channels)));
  }
}

inline void moments_prepare(void* params, TrainWork* work) {
  MomentsPass& p = *static_cast<MomentsPass*>(params);
  cut_pass(p);
  *work = {p.items, Moments::bytes(p.channels)};
}

inline void join_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const Join& p = *static_cast<const Join*>(params);
  Scratch scratch(memory);
  const int64_t stride = round_up(p.channels, kLanes);
  float* a = scratch.take<float>(kPassBlock * stride + kPadding);
  float* b = scratch.take<float>(kPassBlock * stride + kPadding);
  const Vec low = broadcast(p.clamp.low), high = broadcast(p.clamp.high);
  for (int64_t item = begin; item < end; ++item) {
    for_blocks(p, item, [&](int64_t m, int64_t pixels) {
      read_source(p.a, m, pixels, 0, p.channels, a, stride);
      if (p.b.data) read_source(p.b, m, pixels, 0, p.channels, b, stride);
      for (int64_t i = 0; i < pixels; ++i)
        for_channels(p.channels, [&](int64_t c, auto lanes) {
          Vec v = load(a + i * stride + c);
          if (p.b.data) v = clamped(v + load(b + i * stride + c), low, high);
          if (p.stream)
            stream(p.y + (m + i) * p.y_stride + c, v);
          else
            store_some(p.y + (m + i) * p.y_stride + c, lanes, v);
        });
    });
    if (p.stream) fence();
  }
}

inline void join_prepare(void* params, TrainWork* work) {
  Join& p = *static_cast<Join*>(params);
  cut_pass(p);
  *work = {p.items, 2 * room<float>(kPassBlock * round_up(p.channels, kLanes) + kPadding)};
}

inline void finish_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const FinishPass& p = *static_cast<const FinishPass*>(params);
  Scratch scratch(memory);
  Sums sums(p.channels, scratch);
  const int64_t stride = round_up(p.channels, kLanes);
  float* sum = scratch.take<float>(kPassBlock * stride + kPadding);
  for (int64_t item = begin; item < end; ++item) {
    sums.clear(p.channels);
    for_blocks(p, item, [&](int64_t m, int64_t pixels) {
      const float* g = p.g + m * p.stride;
      int64_t g_stride = p.stride;
      if (p.addend) {
        for (int64_t i = 0; i < pixels; ++i)
          for_channels(p.channels, [&](int64_t c, auto lanes) {
            store(sum + i * stride + c,
                  load_some(g + i * p.stride + c, lanes) + load_some(p.addend + (m + i) * p.addend_stride + c, lanes));
          });
        g = sum, g_stride = stride;
      }
      finish(p.finish, g, g_stride, p.out ? p.out + m * p.out_stride : nullptr, p.out_stride, m, pixels, 0, p.channels, sums);
    });
    if (p.finish.stream) fence();
    if (p.finish.partials) sums.write(p.channels, p.finish.partials + item * 2 * padded(p.channels));
  }
}

inline void finish_prepare(void* params, TrainWork* work) {
  FinishPass& p = *static_cast<FinishPass*>(params);
  cut_pass(p);
  *work = {p.items, Sums::bytes(p.channels) + room<float>(kPassBlock * round_up(p.channels, kLanes) + kPadding)};
}

// Channels of a level: half of the one before, rounded up.
FASTBLOCKS_INLINE int64_t level_channels(int64_t channels, int64_t level) {
  for (; level > 0; --level) channels -= channels / 2;
  return channels;
}

// A row of values to channels in their order; `memory` holds two rows.
FASTBLOCKS_INLINE void gather_channels(const Interleaving& order, const float* row, int64_t channels, float* y, float* memory,
                                       int64_t stride) {
  const float* from = row + order.rest[0];
  if (!order.rest_is_run || order.levels == 0) {
    float* to = order.levels ? memory + order.levels % 2 * stride : y;
    for (int64_t c = 0; c < order.rest_count; ++c) to[c] = row[order.rest[c]];
    from = to;
  }
  for (int64_t level = order.levels; level-- > 0;) {
    float* to = level ? memory + level % 2 * stride : y;
    const float* streams[2] = {from, row + order.runs[level]};
    interleave_exact<2>(streams, 0, level_channels(channels, level), to);
    from = to;
  }
}

inline void gather_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const Gather& p = *static_cast<const Gather*>(params);
  Scratch scratch(memory);
  const int64_t stride = panel_row(p.channels);
  float* rows = scratch.take<float>((kPassBlock + 2) * stride + kPadding);
  for (int64_t item = begin; item < end; ++item)
    for_blocks(p, item, [&](int64_t m, int64_t pixels) {
      read_pieces(p.x, p.pieces, m, pixels, rows, stride);
      for (int64_t i = 0; i < pixels; ++i)
        gather_channels(p.order, rows + i * stride, p.channels, p.y + (m + i) * p.channels, rows + kPassBlock * stride, stride);
    });
}

inline void gather_prepare(void* params, TrainWork* work) {
  Gather& p = *static_cast<Gather*>(params);
  cut_pass(p);
  *work = {p.items, room<float>((kPassBlock + 2) * panel_row(p.channels) + kPadding)};
}

template <int... E>
FASTBLOCKS_INLINE Vec even_lanes(Vec a, Vec b, std::integer_sequence<int, E...>) {
  return __builtin_shufflevector(a, b, (2 * E)...);
}
template <int... E>
FASTBLOCKS_INLINE Vec odd_lanes(Vec a, Vec b, std::integer_sequence<int, E...>) {
  return __builtin_shufflevector(a, b, (2 * E + 1)...);
}

// The even values of a pixel to `even`, the odd ones to `odd`: `count` each.
inline void deal(const float* from, int64_t count, float* even, float* odd) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const Vec a = load(from + 2 * c), b = load(from + 2 * c + kLanes);
    store(even + c, even_lanes(a, b, LaneIndices()));
    store(odd + c, odd_lanes(a, b, LaneIndices()));
  }
  for (; c < count; ++c) even[c] = from[2 * c], odd[c] = from[2 * c + 1];
}

// Channels in their order to a row of values.
FASTBLOCKS_INLINE void scatter_channels(const Interleaving& order, const float* g, int64_t channels, float* row, float* memory,
                                        int64_t stride) {
  const float* from = g;
  for (int64_t level = 0; level < order.levels; ++level) {
    float* even = level + 1 == order.levels && order.rest_is_run ? row + order.rest[0] : memory + level % 2 * stride;
    deal(from, channels / 2, even, row + order.runs[level]);
    if (channels % 2) even[channels / 2] = from[channels - 1];
    channels -= channels / 2;
    from = even;
  }
  if (order.levels == 0 || !order.rest_is_run)
    for (int64_t c = 0; c < channels; ++c) row[order.rest[c]] = from[c];
}

inline void gather_grad_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const GatherGrad& p = *static_cast<const GatherGrad*>(params);
  Scratch scratch(memory);
  const int64_t stride = panel_row(p.channels);
  float* rows = scratch.take<float>((kPassBlock + 2) * stride + kPadding);
  Sums sums(p.sums_stride, scratch);
  for (int64_t item = begin; item < end; ++item) {
    if (p.sums) sums.clear(p.sums_stride);
    for_blocks(p, item, [&](int64_t m, int64_t pixels) {
      for (int64_t i = 0; i < pixels; ++i)
        scatter_channels(p.order, p.g + (m + i) * p.stride, p.channels, rows + i * stride, rows + kPassBlock * stride, stride);
      finish_pieces(p.dx, p.pieces, rows, stride, m, pixels, sums);
    });
    if (p.sums) sums.write(p.sums_stride, p.sums + item * 2 * p.sums_stride);
  }
}

inline void gather_grad_prepare(void* params, TrainWork* work) {
  GatherGrad& p = *static_cast<GatherGrad*>(params);
  cut_pass(p);
  p.sums_stride = sums_of_pieces(p);
  *work = {p.items, room<float>((kPassBlock + 2) * panel_row(p.channels) + kPadding) + Sums::bytes(p.sums_stride)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
