// Depthwise k x k convolution + BatchNorm + activation.
//
// Interior pixels go in strips of 7 outputs (every map of the networks is a multiple of 7 wide): the k taps of a kernel row
// stay in registers, each input vector is loaded once a kernel row and used for all the outputs it reaches. Rows beyond the map
// are left out by the range of kernel rows, columns beyond it by the range of taps: no padded copy, no multiplication by zero.
#pragma once

#include "batch_norm-inl.h"
#include "depthwise_row-inl.h"
#include "gemm-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// One kernel row for T outputs.
template <int K, int S, int T, bool kPartial>
FASTBLOCKS_INLINE void depthwise_taps(Vec (&sum)[T], const float* x, int64_t px, const float* w, int64_t weight_stride,
                                      int lanes) {
  Vec taps[K];
#pragma GCC unroll 8
  for (int kx = 0; kx < K; ++kx) taps[kx] = load(w + kx * weight_stride);
  const float* at = x;
#pragma GCC unroll 32
  for (int i = 0; i < (T - 1) * S + K; ++i) {
    // [at], [at + px] and [at + 2 * px], then on: few address registers at any pixel stride.
    if (i > 0 && i % 3 == 0) at += 3 * px;
    const float* here = at + i % 3 * px;
    Vec value = kPartial ? load_partial(here, lanes) : load(here);
    hold(value);
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx)
      if (i >= kx && (i - kx) % S == 0 && (i - kx) / S < T) sum[(i - kx) / S] += value * taps[kx];
  }
}

// T outputs of V vectors of channels. PX is the input's pixel stride where it is known (0: read it from r); kWhole: all kernel
// rows lie inside the map, so that their loop can be unrolled.
template <int K, int S, int T, int V, int PX, bool kPartial, bool kWhole>
FASTBLOCKS_INLINE void depthwise_strip(const DepthwiseRows& r, const float* const (&rows)[K], int64_t in_offset, float* out,
                                       int64_t channel, int lanes) {
  const int64_t px = PX ? PX : r.pixel_stride, weight_stride = r.weight_stride;
  Vec sum[V][T];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const Vec shift = load(r.shift + channel + v * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[v][t] = shift;
  }
  const int64_t at = in_offset + channel;
  const auto add_row = [&](int64_t ky) __attribute__((always_inline)) {
    const float* w = r.weight + channel + ky * K * weight_stride;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      depthwise_taps<K, S, T, kPartial>(sum[v], rows[ky] + at + v * kLanes, px, w + v * kLanes, weight_stride, lanes);
  };
  if (kWhole) {
#pragma GCC unroll 3
    for (int ky = 0; ky < K; ++ky) add_row(ky);
  } else {
    for (int64_t ky = 0; ky < K; ++ky)
      if (rows[ky]) add_row(ky);
  }
  const Vec low = broadcast(r.clamp.low), high = broadcast(r.clamp.high);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec y = at_most(high, at_least(low, sum[v][t]));
      float* const to = out + t * r.out_stride + channel + v * kLanes;
      if (kPartial)
        store_partial(to, lanes, y);
      else
        store(to, y);
    }
}

// Any kernel, stride and dilation, one pixel: at borders where more than a tap is missing, and where no strip exists.
inline void depthwise_pixel(const DepthwiseRows& r, const float* const* rows, int64_t column, float* out) {
  const int64_t origin = column * r.stride - r.padding;
  int64_t kx_begin = 0, kx_end = r.kernel_width;
  while (kx_begin < kx_end && origin + kx_begin * r.dilation < 0) ++kx_begin;
  while (kx_end > kx_begin && origin + (kx_end - 1) * r.dilation >= r.width) --kx_end;
  const Vec low = broadcast(r.clamp.low), high = broadcast(r.clamp.high);
  for (int64_t c = 0; c < r.channels; c += kLanes) {
    const int lanes = r.pad_channels ? kLanes : (int)smaller(kLanes, r.channels - c);
    Vec sum = load(r.shift + c);
    for (int64_t ky = 0; ky < r.kernel_height; ++ky) {
      if (!rows[ky]) continue;
      const float* x = rows[ky] + origin * r.pixel_stride + c;
      const float* w = r.weight + ky * r.kernel_width * r.weight_stride + c;
      for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
        const float* at = x + kx * r.dilation * r.pixel_stride;
        const Vec value = lanes == kLanes ? load(at) : load_partial(at, lanes);
        sum += value * load(w + kx * r.weight_stride);
      }
    }
    const Vec y = at_most(high, at_least(low, sum));
    if (lanes == kLanes)
      store(out + c, y);
    else
      store_partial(out + c, lanes, y);
  }
}

// Vectors that share a cache line.
constexpr int kLineVectors = FASTBLOCKS_VECTOR_BYTES == 32 ? 2 : 1;

// Pixels so many floats apart lie in few sets of the cache: the window of a strip does not stay there from the first vector of
// its lines to the second. Strips of 4 pixels make both at once.
FASTBLOCKS_INLINE bool few_sets(int64_t pixel_stride) { return kLineVectors > 1 && pixel_stride % 256 == 0; }
constexpr int kWideStrip = 4;

// A pixel at the map's edge, whose taps kFirst to kLast - 1 lie inside.
template <int K, int kFirst, int kLast>
inline void depthwise_edge(const DepthwiseRows& r, const float* const* rows, int64_t column, float* out) {
  const int64_t px = r.pixel_stride, weight_stride = r.weight_stride, origin = (column * r.stride - r.padding) * px;
  const Vec low = broadcast(r.clamp.low), high = broadcast(r.clamp.high);
  const auto pixel = [&](int64_t c, auto whole, int lanes) __attribute__((always_inline)) {
    Vec sum = load(r.shift + c);
    for (int64_t ky = 0; ky < K; ++ky) {
      if (!rows[ky]) continue;
      const float *x = rows[ky] + origin + c, *w = r.weight + ky * K * weight_stride + c;
#pragma GCC unroll 8
      for (int kx = kFirst; kx < kLast; ++kx)
        sum += (whole ? load(x + kx * px) : load_partial(x + kx * px, lanes)) * load(w + kx * weight_stride);
    }
    const Vec y = at_most(high, at_least(low, sum));
    if (whole)
      store(out + c, y);
    else
      store_partial(out + c, lanes, y);
  };
  const int64_t channels = r.pad_channels ? round_up(r.channels, kLanes) : r.channels;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) pixel(c, Number<1>(), kLanes);
  if (c < channels) pixel(c, Number<0>(), (int)(channels - c));
}

// All channels of a strip, at a pixel stride known only at run time.
template <int K, int S, int T, bool kWhole>
FASTBLOCKS_INLINE void depthwise_strip_channels(const DepthwiseRows& r, const float* const (&rows)[K], int64_t in_offset,
                                                float* out) {
  int64_t c = 0;
  if constexpr (T == kWideStrip)
    if (few_sets(r.pixel_stride))
      for (; c + kLineVectors * kLanes <= r.channels; c += kLineVectors * kLanes)
        depthwise_strip<K, S, T, kLineVectors, 0, false, kWhole>(r, rows, in_offset, out, c, kLanes);
  for (; c + kLanes <= r.channels; c += kLanes)
    depthwise_strip<K, S, T, 1, 0, false, kWhole>(r, rows, in_offset, out, c, kLanes);
  if (c < r.channels) depthwise_strip<K, S, T, 1, 0, true, kWhole>(r, rows, in_offset, out, c, (int)(r.channels - c));
}

// Calls strip(width, column) with the widths 7, 4, 2 and 1 over the columns [x, end).
template <class Strip>
FASTBLOCKS_INLINE void for_each_strip(int64_t x, int64_t end, Strip strip) {
  for (; x + 7 <= end; x += 7) strip(Number<7>(), x);
  if (x + 4 <= end) strip(Number<4>(), x), x += 4;
  if (x + 2 <= end) strip(Number<2>(), x), x += 2;
  if (x < end) strip(Number<1>(), x);
}

// The columns [x, end) of one output row, whose windows lie inside the map.
template <int K, int S, int PX, bool kWhole>
inline void depthwise_interior(const DepthwiseRows& all, const float* const* row_table, int64_t x, int64_t end, float* row) {
  // Copies that no store through a pointer can change: they stay in registers.
  const DepthwiseRows r = all;
  const float* rows[K];
#pragma GCC unroll 8
  for (int ky = 0; ky < K; ++ky) rows[ky] = row_table[ky];
  const int64_t px = PX ? PX : r.pixel_stride;
  const auto strip = [&](auto width, int64_t column) __attribute__((always_inline)) {
    constexpr int T = decltype(width)::value;
    const int64_t in_offset = (column * S - r.padding) * px;
    float* const out = row + column * r.out_stride;
    if constexpr (PX > 0)
      for (int64_t c = 0; c < PX; c += kLanes)  // the vectors of a line in turn: it is stored to at one go
        depthwise_strip<K, S, T, 1, PX, false, kWhole>(r, rows, in_offset, out, c, kLanes);
    else
      depthwise_strip_channels<K, S, T, kWhole>(r, rows, in_offset, out);
  };
  if (!PX && few_sets(px))
    for (; x + kWideStrip <= end; x += kWideStrip) strip(Number<kWideStrip>(), x);
  for_each_strip(x, end, strip);
}

template <int K, int S, int PX>
inline void depthwise_strips(const DepthwiseRows& r) {
  // Strips cover the columns whose whole window lies inside the map.
  int64_t begin = divide_up(r.padding, S);
  int64_t end = r.width + r.padding >= K ? (r.width + r.padding - K) / S + 1 : 0;
  begin = smaller(begin, r.out_width);
  end = larger(begin, smaller(end, r.out_width));
  const float* const* rows = r.rows;
  float* out = r.out;
  const auto edge = [&](int64_t column) {
    const int64_t origin = column * S - r.padding;
    float* const to = out + column * r.out_stride;
    if (origin == -1 && r.width >= K - 1)
      depthwise_edge<K, 1, K>(r, rows, column, to);
    else if (origin >= 0 && origin + K == r.width + 1)
      depthwise_edge<K, 0, K - 1>(r, rows, column, to);
    else
      depthwise_pixel(r, rows, column, to);
  };
  for (int64_t i = 0; i < r.count; ++i, rows += K, out += r.out_width * r.out_stride) {
    bool whole = K == 3;  // more rows are not unrolled
#pragma GCC unroll 8
    for (int ky = 0; ky < K; ++ky) whole = whole && rows[ky];
    for (int64_t x = 0; x < begin; ++x) edge(x);
    if (whole)
      depthwise_interior<K, S, PX, K == 3>(r, rows, begin, end, out);
    else
      depthwise_interior<K, S, PX, false>(r, rows, begin, end, out);
    for (int64_t x = end; x < r.out_width; ++x) edge(x);
  }
}

inline void depthwise_any(const DepthwiseRows& r) {
  for (int64_t i = 0; i < r.count; ++i)
    for (int64_t x = 0; x < r.out_width; ++x)
      depthwise_pixel(r, r.rows + i * r.kernel_height, x, r.out + (i * r.out_width + x) * r.out_stride);
}

// The function of a geometry. `slice`: input and output are one panel wide (scratch of a fused block), all of it whole vectors.
inline DepthwiseFunction depthwise_function(int64_t kernel, int64_t stride, int64_t dilation, bool slice) {
  constexpr int kSlice = kPanelVectors * kLanes;
  if (dilation == 1 && stride <= 2 && stride >= 1) {
    const bool one = stride == 1;
    switch (kernel) {
      case 3:
        if (slice) return one ? depthwise_strips<3, 1, kSlice> : depthwise_strips<3, 2, kSlice>;
        return one ? depthwise_strips<3, 1, 0> : depthwise_strips<3, 2, 0>;
      case 5:
        if (slice) return one ? depthwise_strips<5, 1, kSlice> : depthwise_strips<5, 2, kSlice>;
        return one ? depthwise_strips<5, 1, 0> : depthwise_strips<5, 2, 0>;
      case 7:
        if (slice) return one ? depthwise_strips<7, 1, kSlice> : depthwise_strips<7, 2, kSlice>;
        return one ? depthwise_strips<7, 1, 0> : depthwise_strips<7, 2, 0>;
      default: break;
    }
  }
  return depthwise_any;
}

// The BatchNorm folded into a depthwise convolution: shift[padded], then the taps multiplied by the scale, then the scale
// itself. There are a dozen values a channel, and an epilogue without multiplication pays for them at the second pixel.
FASTBLOCKS_INLINE int64_t folded_depthwise_floats(int64_t channels, int64_t taps) {
  return round_up(channels, kLanes) * (taps + 2);
}

inline void fold_depthwise(const BatchNorm& n, const float* packed, int64_t channels, int64_t taps, float* out) {
  const int64_t padded = round_up(channels, kLanes);
  float* weight = out + padded;
  float* scale = weight + taps * padded;
  fold_batch_norm(n, channels, padded, scale, out);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < padded; c += kLanes)
      store(weight + tap * padded + c, load(packed + tap * padded + c) * load(scale + c));
}

inline void depthwise_run(const void* params, int64_t begin, int64_t end, char* scratch) noexcept {
  const DepthwiseParams& p = *static_cast<const DepthwiseParams*>(params);
  const int64_t padded = round_up(p.channels, kLanes);
  const float** rows = reinterpret_cast<const float**>(scratch);
  const bool square = p.kernel[0] == p.kernel[1];
  const DepthwiseFunction function =
      square ? depthwise_function(p.kernel[1], p.stride[1], p.dilation[1], false) : depthwise_any;
  DepthwiseRows r;
  r.rows = rows, r.count = 1, r.kernel_height = p.kernel[0];
  r.width = p.width, r.pixel_stride = p.x.pixel_stride;
  r.out_width = p.out_width, r.out_stride = p.out.pixel_stride;
  r.kernel_width = p.kernel[1], r.stride = p.stride[1], r.padding = p.padding[1], r.dilation = p.dilation[1];
  r.weight = p.shared + padded, r.weight_stride = padded;
  r.shift = p.shared, r.clamp = p.clamp;
  r.channels = p.channels, r.pad_channels = false;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * p.out_height / p.bands, to = (band + 1) * p.out_height / p.bands;
    for (int64_t oy = from; oy < to; ++oy) {
      find_rows(oy, p.stride[0], p.padding[0], p.dilation[0], p.kernel[0], p.height, rows,
                [&](int64_t y) { return p.x.data + image * p.x.image_stride + y * p.x.row_stride; });
      r.out = p.out.data + image * p.out.image_stride + oy * p.out.row_stride;
      function(r);
    }
  }
}

inline void depthwise_prepare(void* params, int threads, Work* work) {
  DepthwiseParams& p = *static_cast<DepthwiseParams*>(params);
  p.bands = threads > 1 ? smaller(p.out_height, divide_up(4 * (int64_t)threads, p.images)) : 1;
  work->count = 1;
  work->phases[0] = {depthwise_run, &p, p.images * p.bands, p.images};
  work->worker_bytes = p.kernel[0] * sizeof(float*);
  work->shared_bytes = folded_depthwise_floats(p.channels, p.kernel[0] * p.kernel[1]) * sizeof(float);
  work->shared = &p.shared;
}

inline void depthwise_begin(void* params) {
  DepthwiseParams& p = *static_cast<DepthwiseParams*>(params);
  fold_depthwise(p.norm, p.packed_weight, p.channels, p.kernel[0] * p.kernel[1], p.shared);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
