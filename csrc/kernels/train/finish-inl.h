// Finishing a gradient as it is written: masking it by the activation, summing it for the BatchNorm.
#pragma once

#include "common-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Zero where the activation was not the identity. A NaN was, as torch has it.
FASTBLOCKS_INLINE Vec masked(Vec g, Vec v, Vec low, Vec high) { return ((v <= low) | (v >= high)) ? Vec{} : g; }

struct Sums {
  double *g, *gz;  // padded
  static size_t bytes(int64_t channels) { return 2 * room<double>(padded(channels)); }
  Sums(double* first, double* second) : g(first), gz(second) {}
  Sums(int64_t channels, Scratch& scratch)
      : g(scratch.take<double>(padded(channels))), gz(scratch.take<double>(padded(channels))) {}
  void clear(int64_t channels) {
    for (int64_t c = 0; c < padded(channels); ++c) g[c] = gz[c] = 0.0;
  }
  void write(int64_t channels, double* out) const {
    __builtin_memcpy(out, g, padded(channels) * sizeof(double));
    __builtin_memcpy(out + padded(channels), gz, padded(channels) * sizeof(double));
  }
};

// V vectors at channel `c` of z, `offset` of g and out.
template <Mask kMask, bool kSums, bool kWrite, bool kStream, int V>
FASTBLOCKS_INLINE void finish_vectors(const Finish& f, const float* g, int64_t g_stride, float* out, int64_t out_stride,
                                      int64_t pixel, int64_t pixels, int64_t c, int lanes, Sums& sums) {
  constexpr bool kBatchNorm = kMask == Mask::kNorm || kMask == Mask::kSum, centre = kSums || kBatchNorm;
  constexpr bool kSecond = kMask == Mask::kOutput || kMask == Mask::kSum;
  const float* z = centre ? f.z + pixel * f.z_stride + c : nullptr;
  const float* y = kSecond ? f.y + pixel * f.y_stride + c : nullptr;
  const int64_t z_stride = f.z_stride;
  const Vec low = broadcast(f.clamp.low), high = broadcast(f.clamp.high);
  Vec mean[V], scale[V], shift[V], sum[V] = {}, sum_z[V] = {};
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    if (centre) mean[i] = load(f.norm.mean + c + i * kLanes);
    if (kBatchNorm) scale[i] = load(f.norm.scale + c + i * kLanes), shift[i] = load(f.norm.shift + c + i * kLanes);
  }
  for (int64_t m = 0; m < pixels; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const int64_t at = i * kLanes;
      Vec v = load_some(g + at, lanes), centred{};
      if (centre) centred = load_some(z + at, lanes) - mean[i];
      Vec made = kBatchNorm ? centred * scale[i] + shift[i] : Vec{};
      if (kSecond) made = kBatchNorm ? made + load_some(y + at, lanes) : load_some(y + at, lanes);
      if (kMask != Mask::kNone) v = masked(v, made, low, high);
      if (kSums) {
        sum[i] += v;
        sum_z[i] += v * centred;
      }
      if (kStream)
        stream(out + at, v);
      else if (kWrite)
        store_some(out + at, lanes, v);
    }
    g += g_stride;
    if (centre) z += z_stride;
    if (kSecond) y += f.y_stride;
    if (kWrite) out += out_stride;
  }
  for (int i = 0; kSums && i < V; ++i) {
    add_lanes(sums.g + c + i * kLanes, sum[i]);
    add_lanes(sums.gz + c + i * kLanes, sum_z[i]);
  }
}

template <Mask kMask, bool kSums, bool kWrite, bool kStream>
inline void finish_channels(const Finish& f, const float* g, int64_t g_stride, float* out, int64_t out_stride, int64_t pixel,
                            int64_t pixels, int64_t first, int64_t channels, Sums& sums) {
  for_vectors(channels, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
    finish_vectors<kMask, kSums, kWrite, kStream, decltype(vectors)::value>(f, g + c, g_stride, out + c, out_stride, pixel,
                                                                            pixels, first + c, lanes, sums);
  });
}

// Finishes the gradients of some pixels, from `g` to `out` (the same, another, or null: nothing is written); `pixel` is where z
// and y are. Channels [first, first + channels), which are those of `g` and `out` from 0 on. With finish.stream, `out` is
// written past the caches.
inline void finish(const Finish& f, const float* g, int64_t g_stride, float* out, int64_t out_stride, int64_t pixel,
                   int64_t pixels, int64_t first, int64_t channels, Sums& sums) {
  const auto run = [&](auto function) { function(f, g, g_stride, out, out_stride, pixel, pixels, first, channels, sums); };
  const auto either = [&](auto mask, auto summed) {
    constexpr Mask kMask = (Mask) decltype(mask)::value;
    constexpr bool kSums = decltype(summed)::value;
    if (!out)
      run(finish_channels<kMask, kSums, false, false>);
    else if (f.stream)
      run(finish_channels<kMask, kSums, true, true>);
    else
      run(finish_channels<kMask, kSums, true, false>);
  };
  if (f.mask == Mask::kNorm) return either(Number<(int)Mask::kNorm>(), Number<1>());
  if (f.mask == Mask::kOutput)
    return f.partials ? either(Number<(int)Mask::kOutput>(), Number<1>()) : either(Number<(int)Mask::kOutput>(), Number<0>());
  if (f.mask == Mask::kSum)
    return f.partials ? either(Number<(int)Mask::kSum>(), Number<1>()) : either(Number<(int)Mask::kSum>(), Number<0>());
  if (f.partials) return either(Number<(int)Mask::kNone>(), Number<1>());
  if (g != out) either(Number<(int)Mask::kNone>(), Number<0>());
}

// Each piece's sums are padded.
template <class Params>
FASTBLOCKS_INLINE int64_t sums_of_pieces(const Params& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.pieces; ++i) total += padded(p.dx[i].channels);
  return total;
}

// The gradients of some pixels of all pieces, side by side at `g`, to where they belong.
inline void finish_pieces(const GradPiece* pieces, int64_t count, const float* g, int64_t g_stride, int64_t pixel,
                          int64_t pixels, const Sums& sums) {
  Sums at = sums;
  for (int64_t i = 0; i < count; ++i) {
    const GradPiece& piece = pieces[i];
    if (piece.dx)
      finish(piece.finish, g, g_stride, piece.dx + pixel * piece.stride, piece.stride, pixel, pixels, 0, piece.channels, at);
    g += piece.channels;
    at.g += padded(piece.channels);
    at.gz += padded(piece.channels);
  }
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
