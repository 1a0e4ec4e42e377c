// The small passes between the large ones: BatchNorm's constants and gradients from the items' sums, merging of weight
// gradients, packing of weights. An item is a few channels or rows.
#pragma once

#include "../shuffle-inl.h"
#include "common-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int64_t kNormChannels = 32;

// Means first, then sums of squares around the common mean: no difference of large numbers.
inline void merge_moments(const NormForward& p, int64_t c, int64_t n, double* mean, double* squares) {
  const int64_t all = padded(p.channels), stride = 1 + 2 * all;
  for (int64_t i = 0; i < n; ++i) mean[i] = squares[i] = 0.0;
  for (int64_t item = 0; item < p.items; ++item) {
    const double* at = p.partials + item * stride;
    for (int64_t i = 0; i < n; ++i) mean[i] += at[0] * at[1 + c + i];
  }
  for (int64_t i = 0; i < n; ++i) mean[i] /= (double)p.count;
  for (int64_t item = 0; item < p.items; ++item) {
    const double* at = p.partials + item * stride;
    for (int64_t i = 0; i < n; ++i) {
      const double off = at[1 + c + i] - mean[i];
      squares[i] += at[1 + all + c + i] + at[0] * off * off;
    }
  }
}

inline void norm_forward_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const NormForward& p = *static_cast<const NormForward*>(params);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c = item * kNormChannels, n = smaller(kNormChannels, p.channels - c);
    double mean[kNormChannels], variance[kNormChannels];
    if (p.partials) {
      merge_moments(p, c, n, mean, variance);
      const double unbias = 1.0 / (double)(p.count - 1);
      for (int64_t i = 0; p.update && i < n; ++i) {
        float& m = p.running_mean[c + i];
        float& v = p.running_var[c + i];
        m = (float)((1.0 - p.momentum) * (double)m + p.momentum * mean[i]);
        v = (float)((1.0 - p.momentum) * (double)v + p.momentum * (variance[i] * unbias));
      }
      for (int64_t i = 0; i < n; ++i) variance[i] /= (double)p.count;
    } else {
      for (int64_t i = 0; i < n; ++i) mean[i] = p.running_mean[c + i], variance[i] = p.running_var[c + i];
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = c + i;
      const double inverse = 1.0 / __builtin_sqrt(variance[i] + p.eps);
      const double scale = p.weight ? inverse * (double)p.weight[j] : inverse;
      const float rounded = (float)mean[i];
      p.to.mean[j] = rounded;
      p.to.inverse[j] = (float)inverse;
      p.to.scale[j] = (float)scale;
      p.to.shift[j] = (float)((p.bias ? (double)p.bias[j] : 0.0) - (mean[i] - (double)rounded) * scale);
    }
    for (int64_t j = c + n; j < smaller(c + kNormChannels, padded(p.channels)); ++j)
      p.to.mean[j] = p.to.inverse[j] = p.to.scale[j] = p.to.shift[j] = 0.0f;
  }
}

inline void norm_forward_prepare(void* params, TrainWork* work) {
  *work = {divide_up(static_cast<NormForward*>(params)->channels, kNormChannels), 0};
}

inline void norm_backward_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const NormBackward& p = *static_cast<const NormBackward*>(params);
  const int64_t all = padded(p.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c = item * kNormChannels, n = smaller(kNormChannels, p.channels - c);
    double sum[kNormChannels] = {}, sum_z[kNormChannels] = {};
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const NormSegment& segment = p.segments[s];
      const int64_t from = larger(c, segment.first), to = smaller(c + n, segment.first + segment.channels);
      for (int64_t part = 0; part < segment.items; ++part) {
        const int64_t at = part * segment.stride - segment.first;
        for (int64_t j = from; j < to; ++j) sum[j - c] += segment.sums[at + j], sum_z[j - c] += segment.sums_z[at + j];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = c + i;
      const double inverse = p.norm.inverse[j], scale = p.norm.scale[j];
      if (p.grad_weight) p.grad_weight[j] = (float)(sum_z[i] * inverse);
      if (p.grad_bias) p.grad_bias[j] = (float)sum[i];
      const double share = p.frozen ? 0.0 : scale / (double)p.count;
      p.offset[j] = (float)(-share * sum[i]);
      p.slope[j] = (float)(-share * inverse * inverse * sum_z[i]);
    }
    for (int64_t j = c + n; j < smaller(c + kNormChannels, all); ++j) p.offset[j] = p.slope[j] = 0.0f;
  }
}

inline void norm_backward_prepare(void* params, TrainWork* work) {
  *work = {divide_up(static_cast<NormBackward*>(params)->channels, kNormChannels), 0};
}

// An item is some rows. Partials are in rows of whole vectors.
constexpr int64_t kMergeFloats = 4096;

FASTBLOCKS_INLINE int64_t merge_rows(const MergeWeights& p) { return larger(1, kMergeFloats / larger(1, p.stride)); }

inline void merge_weights_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const MergeWeights& p = *static_cast<const MergeWeights*>(params);
  Scratch scratch(memory);
  const int64_t rows = merge_rows(p), step = p.rows * p.stride;
  float* sums = scratch.take<float>(rows * p.stride);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * rows, count = smaller(rows, p.rows - first);
    // All rows of one partial after the other: that much lies side by side.
    for (int64_t part = 0; part < p.items; ++part) {
      const float* from = p.partials + part * step + first * p.stride;
      for (int64_t c = 0; c < count * p.stride; c += kLanes) {
        const Vec v = load(from + c);
        store(sums + c, part ? load(sums + c) + v : v);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const float* sum = sums + r * p.stride;
      float* out = p.out + p.row_offsets[first + r];
      if (p.dense)
        __builtin_memcpy(out, sum, p.columns * sizeof(float));
      else
        for (int64_t c = 0; c < p.columns; ++c) out[p.column_offsets[c]] = sum[c];
    }
  }
}

inline void merge_weights_prepare(void* params, TrainWork* work) {
  MergeWeights& p = *static_cast<MergeWeights*>(params);
  *work = {divide_up(p.rows, merge_rows(p)), room<float>(merge_rows(p) * p.stride + kPadding)};
}

FASTBLOCKS_INLINE bool side_by_side(const int64_t* offsets, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (offsets[i] != offsets[0] + i) return false;
  return true;
}

// A square of kLanes channels and depths, the depths side by side in w: transposed on the way.
FASTBLOCKS_INLINE void pack_square(const float* w, const int64_t* channels, float* out, int64_t lanes) {
  Vec v[kLanes];
#pragma GCC unroll 16
  for (int n = 0; n < kLanes; ++n) v[n] = load(w + channels[n]);
  interleave<kLanes>(v);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) store(out + k * lanes, v[k]);
}

// The same, value by value: as many channels and depths as there are.
inline void pack_values(const float* w, const int64_t* channels, int64_t width, const int64_t* depths, int64_t depth,
                        float* out, int64_t lanes) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < width; ++n) out[k * lanes + n] = w[channels[n] + depths[k]];
}

// A vector of channels, or what there is of one, of all depths. Where depths are gathered most still lie side by side.
inline void pack_vector(const PackMatrix& p, const float* w, const int64_t* channels, int64_t width, float* out,
                        int64_t lanes) {
  const int64_t* const depths = p.depth_offsets;
  if (width == kLanes && side_by_side(channels, kLanes)) {
    for (int64_t k = 0; k < p.depth; ++k) store(out + k * lanes, load(w + channels[0] + depths[k]));
    return;
  }
  for (int64_t k = 0; k < p.depth; k += kLanes) {
    const int64_t depth = smaller(kLanes, p.depth - k);
    if (width == kLanes && depth == kLanes && side_by_side(depths + k, kLanes))
      pack_square(w + depths[k], channels, out + k * lanes, lanes);
    else
      pack_values(w, channels, width, depths + k, depth, out + k * lanes, lanes);
  }
}

inline void pack_panel(const PackMatrix& p, const float* w, const int64_t* channels, int64_t valid, float* out, int64_t lanes) {
  if (valid < lanes) __builtin_memset(out, 0, p.depth * lanes * sizeof(float));
  for (int64_t n = 0; n < valid; n += kLanes) pack_vector(p, w, channels + n, smaller(kLanes, valid - n), out + n, lanes);
}

// An item is one panel.
inline void pack_matrix_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const PackMatrix& p = *static_cast<const PackMatrix*>(params);
  const Panels panels(p.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / panels.count, panel = item % panels.count, first = panels.first_channel(panel);
    const int64_t lanes = panels.width(panel) * kLanes, valid = panels.valid(panel);
    pack_panel(p, p.w + group * p.group_stride, p.channel_offsets + first, valid,
               p.out + group * panels.padded() * p.depth + first * p.depth, lanes);
  }
}

inline void pack_matrix_prepare(void* params, TrainWork* work) {
  PackMatrix& p = *static_cast<PackMatrix*>(params);
  *work = {p.groups * Panels(p.channels).count, 0};
}

inline void pack_taps_run(const void* params, int64_t, int64_t, char*) noexcept {
  const PackTaps& p = *static_cast<const PackTaps*>(params);
  const int64_t all = padded(p.channels);
  for (int64_t ky = 0; ky < p.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < p.kernel[1]; ++kx) {
      const int64_t row = p.flip ? p.kernel[0] - 1 - ky : ky, column = p.flip ? p.kernel[1] - 1 - kx : kx;
      float* out = p.out + (row * p.kernel[1] + column) * all;
      const float* w = p.w + ky * p.strides[1] + kx * p.strides[2];
      for (int64_t c = 0; c < p.channels; ++c) out[c] = w[c * p.strides[0]];
      for (int64_t c = p.channels; c < all; ++c) out[c] = 0.0f;
    }
}

inline void pack_taps_prepare(void*, TrainWork* work) { *work = {1, 0}; }

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
