// 1x1 convolutions in training. Forward: each block of pixels is read through the BatchNorm before it into a panel, multiplied,
// and its statistics are taken while it is in cache. Backward: from one panel of dy and one of x come the gradient of the
// input, which is finished while it is in cache, and the item's share of the gradient of the weight.
#pragma once

#include "finish-inl.h"
#include "outer-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int64_t kLargeWeight = 256 * 1024;
constexpr int64_t kBlockFloats = 64 * 1024;  // of all operands of a product: half of L2, or less
constexpr int64_t kGradFloats = 160 * 1024;  // of all operands of a weight's gradient

// How many pixels, of so many floats each, make a block.
FASTBLOCKS_INLINE int64_t block_of(int64_t floats, int64_t pixel) { return smaller(192, larger(48, floats / pixel)); }
// The same number of pixels or fewer, so that blocks are equal.
FASTBLOCKS_INLINE int64_t even(int64_t pixels, int64_t block) { return divide_up(pixels, divide_up(pixels, block)); }

FASTBLOCKS_INLINE bool is_plain(const SourcePiece* pieces, int64_t count) { return count == 1 && !pieces->source.norm.mean; }

template <class T>
FASTBLOCKS_INLINE const T& widest(const T* parts, int64_t count) {
  const T* most = parts;
  for (int64_t i = 1; i < count; ++i)
    if (parts[i].channels > most->channels) most = parts + i;
  return *most;
}

// What of the widest piece is read next.
FASTBLOCKS_INLINE Range range_of(const SourcePiece* pieces, int64_t count, int64_t pixel, int64_t pixels, int64_t all) {
  const Source& s = widest(pieces, count).source;
  return {pixel < all ? s.data + pixel * s.stride : nullptr, pixels * s.stride};
}

inline void train_pointwise_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainPointwise& p = *static_cast<const TrainPointwise*>(params);
  Scratch scratch(memory);
  float* panel = scratch.take<float>(p.block * p.panel_stride + kPadding);
  const bool writes_block = p.stream || p.planes.count;
  float* block = scratch.take<float>(writes_block ? p.block * p.out_channels + kPadding : 0);
  Moments moments(p.out_channels, scratch);
  const int64_t k = p.in_channels / p.groups, n = p.out_channels / p.groups;
  const int64_t packed = Panels(n).padded() * k;
  const bool plain = is_plain(p.x, p.pieces);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t from = item * p.item_pixels, to = smaller(from + p.item_pixels, p.pixels);
    for (int64_t m = from; m < to; m += p.block) {
      const int64_t pixels = smaller(p.block, to - m);
      const float* left = panel;
      int64_t stride = p.panel_stride;
      if (plain)
        left = p.x->source.data + m * p.x->source.stride, stride = p.x->source.stride;
      else
        read_pieces(p.x, p.pieces, m, pixels, panel, p.panel_stride);
      float* z = writes_block ? block : p.z + m * p.out_channels;
      const Range next = range_of(p.x, p.pieces, m + p.block, pixels, p.pixels);
      for (int64_t g = 0; g < p.groups; ++g)
        product({left + g * k, k, stride, 1, nullptr}, pixels, n, p.weight + g * packed, p.zeros, nullptr, 0, z + g * n,
                p.out_channels, next.part(g, p.groups));
      if (p.stream)
        stream_moments(moments, z, pixels, p.out_channels, 0, p.out_channels, m == from, p.z + m * p.out_channels,
                       p.out_channels);
      else if (p.partials)
        add_moments(moments, z, pixels, p.out_channels, 0, p.out_channels, m == from);
      if (p.planes.count) write_planes(p.planes, z, p.out_channels, m, pixels, p.z);
    }
    if (p.stream) fence();
    if (p.partials) store_moments(moments, to - from, p.partials + item * (1 + 2 * padded(p.out_channels)));
  }
}

inline void train_pointwise_prepare(void* params, TrainWork* work) {
  TrainPointwise& p = *static_cast<TrainPointwise*>(params);
  p.panel_stride = panel_row(p.in_channels);
  p.block = block_of(kBlockFloats, p.panel_stride + p.out_channels);
  cut_pixels(p.pixels, p.block, 128, &p.items, &p.item_pixels);
  p.block = even(p.item_pixels, p.block);
  *work = {p.items, room<float>(p.block * p.panel_stride + kPadding) +
                        room<float>(p.stream || p.planes.count ? p.block * p.out_channels + kPadding : 0) +
                        Moments::bytes(p.out_channels)};
}

// Whether the gradient of the input is made in scratch, and goes from there to where it belongs.
FASTBLOCKS_INLINE bool writes_block(const PointwiseGrad& p) { return p.pieces > 1 || p.dx->finish.stream; }

// What finishing the first piece's gradient reads beside what the product has read: the z of a sum's second part; or, where
// that was read, the sum's first.
FASTBLOCKS_INLINE Range finish_range(const PointwiseGrad& p, int64_t pixel, int64_t pixels) {
  const Finish& f = p.dx->finish;
  if (!p.weight || !p.dx->dx) return {nullptr, 0};
  if (p.x->source.addend) return {p.x->source.addend + pixel * p.x->source.addend_stride, pixels * p.x->source.addend_stride};
  if (!f.z || f.z == p.x->source.data) return {nullptr, 0};
  return {f.z + pixel * f.z_stride, pixels * f.z_stride};
}

// What of g or z is read next, of the widest plane.
FASTBLOCKS_INLINE Range next_rows(const PointwiseGrad& p, const float* data, int64_t stride, int64_t pixel, int64_t pixels) {
  if (pixel >= p.pixels) return {nullptr, 0};
  const Planes& planes = p.dy.planes;
  if (planes.count == 0) return {data + pixel * stride, pixels * stride};
  const Plane& plane = widest(planes.data, planes.count);
  return {data + plane.first * planes.pixels + pixel * plane.channels, pixels * plane.channels};
}

// Where the gradients of the two widest of several pieces go.
FASTBLOCKS_INLINE void targets_ahead(const PointwiseGrad& p, int64_t pixel, int64_t pixels, Range to[2]) {
  const GradPiece* most[2] = {nullptr, nullptr};
  for (int64_t i = 0; i < p.pieces && p.weight; ++i) {
    const GradPiece* piece = p.dx + i;
    if (!piece->dx || piece->stride > piece->channels) continue;
    if (!most[0] || piece->channels > most[0]->channels)
      most[1] = most[0], most[0] = piece;
    else if (!most[1] || piece->channels > most[1]->channels)
      most[1] = piece;
  }
  for (int i = 0; i < 2; ++i)
    if (most[i]) to[i] = {most[i]->dx + pixel * most[i]->stride, pixels * most[i]->stride};
}

inline void pointwise_grad_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const PointwiseGrad& p = *static_cast<const PointwiseGrad*>(params);
  Scratch scratch(memory);
  float* dy = scratch.take<float>(p.block * p.dy_stride + kPadding);
  float* x = scratch.take<float>(p.block * p.x_stride + kPadding);
  float* block = scratch.take<float>(writes_block(p) ? p.part * p.x_stride + kPadding : 0);
  Sums sums(p.sums_stride, scratch);
  const bool in_place = !writes_block(p);
  const int64_t k = p.in_channels / p.groups, n = p.out_channels / p.groups;
  const int64_t packed = Panels(k).padded() * n;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t from = item * p.item_pixels, to = smaller(from + p.item_pixels, p.pixels);
    if (p.sums) sums.clear(p.sums_stride);
    for (int64_t m = from; m < to; m += p.block) {
      const int64_t pixels = smaller(p.block, to - m), next = m + p.block;
      const Range next_g = next_rows(p, p.dy.g, p.dy.stride, next, pixels);
      const Range next_z = next_rows(p, p.dy.z, p.out_channels, next, pixels);
      const Range next_x = range_of(p.x, p.pieces, next, pixels, p.pixels);
      // Of two products of equal length neither should wait for memory: the longer of z and x is the second's.
      const bool z_later = p.weight && p.weight_partials && n > k;
      const Range &sooner = z_later ? next_x : next_z, &later = z_later ? next_z : next_x;
      read_whole_gradient(p.dy, m, pixels, p.out_channels, dy, p.dy_stride);
      if (p.weight_partials) {
        read_pieces(p.x, p.pieces, m, pixels, x, p.x_stride);
        float* out = p.weight_partials + item * p.out_channels * p.weight_stride;
        const Range addend = {p.addend ? p.addend + m * p.addend_stride : nullptr, pixels * p.addend_stride};
        const Range masks = finish_range(p, m, pixels);
        for (int64_t g = 0; g < p.groups; ++g) {
          Range soon[4] = {next_g.part(g, p.groups), sooner.part(g, p.groups), addend.part(g, p.groups),
                           masks.part(g, p.groups)};
          if (p.pieces > 1) targets_ahead(p, m, pixels, soon + 2);
          outer(dy + g * n, p.dy_stride, n, x + g * k, p.x_stride, k, pixels, out + g * n * p.weight_stride, p.weight_stride,
                m > from, soon, soon[2].data || soon[3].data ? 4 : 2);
        }
      }
      for (int64_t i = 0; p.weight && i < pixels; i += p.part) {
        const int64_t at = m + i, count = smaller(p.part, pixels - i);
        float* dx = in_place ? p.dx->dx + at * p.dx->stride : block;
        const int64_t stride = in_place ? p.dx->stride : p.x_stride;
        const float* addend = p.addend ? p.addend + at * p.addend_stride : nullptr;
        for (int64_t g = 0; g < p.groups; ++g)
          product({dy + i * p.dy_stride + g * n, n, p.dy_stride, 1, nullptr}, count, k, p.weight + g * packed, p.zeros,
                  addend ? addend + g * k : nullptr, p.addend_stride, dx + g * k, stride,
                  later.part(i / p.part * p.groups + g, divide_up(pixels, p.part) * p.groups));
        finish_pieces(p.dx, p.pieces, dx, stride, at, count, sums);
      }
    }
    if (p.weight && p.dx->finish.stream) fence();
    if (p.sums) sums.write(p.sums_stride, p.sums + item * 2 * p.sums_stride);
  }
}

inline void pointwise_grad_prepare(void* params, TrainWork* work) {
  PointwiseGrad& p = *static_cast<PointwiseGrad*>(params);
  p.dy_stride = panel_row(p.out_channels);
  p.x_stride = panel_row(p.in_channels);
  p.weight_stride = padded(p.in_channels / p.groups);
  p.sums_stride = sums_of_pieces(p);
  // An item has a gradient of the weight of its own: few items where that is large, and a number that threads share evenly.
  const int64_t weight_floats = p.out_channels * p.weight_stride;
  const int64_t most = smaller(128, larger(8, (1 << 19) / weight_floats / 8 * 8));
  const int64_t pixel = p.dy_stride + 2 * p.x_stride;
  p.part = block_of(kBlockFloats, pixel);
  cut_pixels(p.pixels, p.part, most, &p.items, &p.item_pixels);
  // Each block adds to all of that gradient: where it lies beyond L2, rather the panels do, too.
  p.block = weight_floats > kLargeWeight ? smaller(192, p.item_pixels) : block_of(kGradFloats, pixel);
  p.block = even(p.item_pixels, p.block);
  p.part = even(p.block, p.part);
  *work = {p.items, room<float>(p.block * p.dy_stride + kPadding) + room<float>(p.block * p.x_stride + kPadding) +
                        room<float>(writes_block(p) ? p.part * p.x_stride + kPadding : 0) + Sums::bytes(p.sums_stride)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
