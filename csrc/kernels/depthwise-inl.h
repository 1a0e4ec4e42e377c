// Depthwise k x k convolution + BatchNorm + activation.
//
// Interior pixels go in strips of 7 outputs (every map of the networks is a multiple of 7 wide): the k taps of a kernel row stay
// in registers, each input vector is loaded once a kernel row and used for all the outputs it reaches. Rows beyond the map
// are left out by the range of kernel rows, columns beyond it by the range of taps: no padded copy, no multiplication by zero.
#pragma once

#include "batch_norm-inl.h"
#include "gemm-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// One output row: rows[ky] points at column 0 of the input row of kernel row ky, first_tap <= ky < last_tap are inside the map.
struct DepthwiseRow {
  const float* const* rows;
  int64_t row_begin, row_end;
  int64_t width, pixel_stride, out_width, out_stride;
  int64_t kernel_width, stride, padding, dilation;
  const float* weight;  // [ky][kx][weight_stride]
  int64_t weight_stride;
  const float* scale;
  const float* shift;
  Clamp clamp;
  float* out;
  int64_t channels;
  bool pad_channels;  // input, weight and output have room for whole vectors
};

FASTBLOCKS_INLINE Vec depthwise_epilogue(Vec sum, Vec scale, Vec shift, Vec low, Vec high) {
  return at_most(high, at_least(low, sum * scale + shift));
}

// T outputs of one vector of channels. PX is the input's pixel stride where it is known (0: read it from r).
template <int K, int S, int T, int PX, bool kPartial>
FASTBLOCKS_INLINE void depthwise_strip(const DepthwiseRow& r, int64_t in_offset, float* out, int64_t channel, int lanes) {
  const int64_t px = PX ? PX : r.pixel_stride;
  Vec sum[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sum[t] = Vec{};
  const float* w = r.weight + r.row_begin * K * r.weight_stride + channel;
  for (int64_t ky = r.row_begin; ky < r.row_end; ++ky) {
    const float* x = r.rows[ky] + in_offset + channel;
    Vec taps[K];
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) taps[kx] = load(w + kx * r.weight_stride);
#pragma GCC unroll 32
    for (int i = 0; i < (T - 1) * S + K; ++i) {
      const Vec value = kPartial ? load_partial(x + i * px, lanes) : load(x + i * px);
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx)
        if (i >= kx && (i - kx) % S == 0 && (i - kx) / S < T) sum[(i - kx) / S] += value * taps[kx];
    }
    w += K * r.weight_stride;
  }
  const Vec scale = load(r.scale + channel), shift = load(r.shift + channel);
  const Vec low = broadcast(r.clamp.low), high = broadcast(r.clamp.high);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const Vec y = depthwise_epilogue(sum[t], scale, shift, low, high);
    if (kPartial)
      store_partial(out + t * r.out_stride + channel, lanes, y);
    else
      store(out + t * r.out_stride + channel, y);
  }
}

template <int K, int S, int T, int PX>
inline void depthwise_strip_channels(const DepthwiseRow& r, int64_t column) {
  const int64_t in_offset = (column * S - r.padding) * (PX ? PX : r.pixel_stride);
  float* out = r.out + column * r.out_stride;
  int64_t c = 0;
  for (; c + kLanes <= r.channels; c += kLanes) depthwise_strip<K, S, T, PX, false>(r, in_offset, out, c, kLanes);
  if (c < r.channels) {
    if (r.pad_channels)
      depthwise_strip<K, S, T, PX, false>(r, in_offset, out, c, kLanes);
    else
      depthwise_strip<K, S, T, PX, true>(r, in_offset, out, c, (int)(r.channels - c));
  }
}

// Any kernel, stride and dilation, one pixel: at borders, and where no strip exists.
inline void depthwise_pixel(const DepthwiseRow& r, int64_t column) {
  const int64_t origin = column * r.stride - r.padding;
  int64_t kx_begin = 0, kx_end = r.kernel_width;
  while (kx_begin < kx_end && origin + kx_begin * r.dilation < 0) ++kx_begin;
  while (kx_end > kx_begin && origin + (kx_end - 1) * r.dilation >= r.width) --kx_end;
  const Vec low = broadcast(r.clamp.low), high = broadcast(r.clamp.high);
  float* out = r.out + column * r.out_stride;
  for (int64_t c = 0; c < r.channels; c += kLanes) {
    const int lanes = r.pad_channels ? kLanes : (int)smaller(kLanes, r.channels - c);
    Vec sum{};
    for (int64_t ky = r.row_begin; ky < r.row_end; ++ky) {
      const float* x = r.rows[ky] + origin * r.pixel_stride + c;
      const float* w = r.weight + ky * r.kernel_width * r.weight_stride + c;
      for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
        const float* at = x + kx * r.dilation * r.pixel_stride;
        const Vec value = lanes == kLanes ? load(at) : load_partial(at, lanes);
        sum += value * load(w + kx * r.weight_stride);
      }
    }
    const Vec y = depthwise_epilogue(sum, load(r.scale + c), load(r.shift + c), low, high);
    if (lanes == kLanes)
      store(out + c, y);
    else
      store_partial(out + c, lanes, y);
  }
}

template <int K, int S, int PX>
inline void depthwise_row_strips(const DepthwiseRow& r) {
  // Strips cover the columns whose whole window lies inside the map.
  int64_t begin = divide_up(r.padding, S);
  int64_t end = r.width + r.padding >= K ? (r.width + r.padding - K) / S + 1 : 0;
  begin = smaller(begin, r.out_width);
  end = larger(begin, smaller(end, r.out_width));
  for (int64_t x = 0; x < begin; ++x) depthwise_pixel(r, x);
  int64_t x = begin;
  for (; x + 7 <= end; x += 7) depthwise_strip_channels<K, S, 7, PX>(r, x);
  switch (end - x) {
    case 6: depthwise_strip_channels<K, S, 6, PX>(r, x); break;
    case 5: depthwise_strip_channels<K, S, 5, PX>(r, x); break;
    case 4: depthwise_strip_channels<K, S, 4, PX>(r, x); break;
    case 3: depthwise_strip_channels<K, S, 3, PX>(r, x); break;
    case 2: depthwise_strip_channels<K, S, 2, PX>(r, x); break;
    case 1: depthwise_strip_channels<K, S, 1, PX>(r, x); break;
    default: break;
  }
  for (x = end; x < r.out_width; ++x) depthwise_pixel(r, x);
}

typedef void (*DepthwiseRowFunction)(const DepthwiseRow&);

inline void depthwise_row_any(const DepthwiseRow& r) {
  for (int64_t x = 0; x < r.out_width; ++x) depthwise_pixel(r, x);
}

// The row function of a geometry. `slice` tells that the input is one panel wide (scratch of a fused block).
inline DepthwiseRowFunction depthwise_row_function(int64_t kernel, int64_t stride, int64_t dilation, int64_t pixel_stride) {
  constexpr int kSlice = kPanelVectors * kLanes;
  if (dilation == 1 && stride <= 2 && stride >= 1) {
    const bool slice = pixel_stride == kSlice, one = stride == 1;
    switch (kernel) {
      case 3:
        if (slice) return one ? depthwise_row_strips<3, 1, kSlice> : depthwise_row_strips<3, 2, kSlice>;
        return one ? depthwise_row_strips<3, 1, 0> : depthwise_row_strips<3, 2, 0>;
      case 5:
        if (slice) return one ? depthwise_row_strips<5, 1, kSlice> : depthwise_row_strips<5, 2, kSlice>;
        return one ? depthwise_row_strips<5, 1, 0> : depthwise_row_strips<5, 2, 0>;
      case 7:
        if (slice) return one ? depthwise_row_strips<7, 1, kSlice> : depthwise_row_strips<7, 2, kSlice>;
        return one ? depthwise_row_strips<7, 1, 0> : depthwise_row_strips<7, 2, 0>;
      default: break;
    }
  }
  return depthwise_row_any;
}

// Packs w[c][ky][kx] into [ky][kx][channels padded to whole vectors].
inline void pack_depthwise(const float* w, int64_t channels, int64_t kernel_height, int64_t kernel_width,
                           const int64_t* strides, float* out) {
  const int64_t padded = round_up(channels, kLanes);
  for (int64_t ky = 0; ky < kernel_height; ++ky)
    for (int64_t kx = 0; kx < kernel_width; ++kx, out += padded) {
      for (int64_t c = 0; c < channels; ++c) out[c] = w[c * strides[0] + ky * strides[1] + kx * strides[2]];
      for (int64_t c = channels; c < padded; ++c) out[c] = 0.0f;
    }
}

// The kernel rows of output row `oy` that lie inside the map: [*begin, *end).
FASTBLOCKS_INLINE void kernel_row_range(int64_t oy, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel,
                                        int64_t height, int64_t* begin, int64_t* end) {
  const int64_t origin = oy * stride - padding;
  int64_t b = 0, e = kernel;
  while (b < e && origin + b * dilation < 0) ++b;
  while (e > b && origin + (e - 1) * dilation >= height) --e;
  *begin = b;
  *end = e;
}

inline void depthwise_run(const void* params, int64_t begin, int64_t end, char* scratch) noexcept {
  const DepthwiseParams& p = *static_cast<const DepthwiseParams*>(params);
  const int64_t padded = round_up(p.channels, kLanes);
  const float** rows = reinterpret_cast<const float**>(scratch);
  const bool square = p.kernel[0] == p.kernel[1];
  const DepthwiseRowFunction row_function =
      square ? depthwise_row_function(p.kernel[1], p.stride[1], p.dilation[1], p.x.pixel_stride) : depthwise_row_any;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * p.out_height / p.bands, to = (band + 1) * p.out_height / p.bands;
    for (int64_t oy = from; oy < to; ++oy) {
      DepthwiseRow r;
      kernel_row_range(oy, p.stride[0], p.padding[0], p.dilation[0], p.kernel[0], p.height, &r.row_begin, &r.row_end);
      for (int64_t ky = r.row_begin; ky < r.row_end; ++ky)
        rows[ky] = p.x.data + image * p.x.image_stride +
                   (oy * p.stride[0] - p.padding[0] + ky * p.dilation[0]) * p.x.row_stride;
      r.rows = rows;
      r.width = p.width, r.pixel_stride = p.x.pixel_stride;
      r.out_width = p.out_width, r.out_stride = p.out.pixel_stride;
      r.kernel_width = p.kernel[1], r.stride = p.stride[1], r.padding = p.padding[1], r.dilation = p.dilation[1];
      r.weight = p.packed_weight, r.weight_stride = padded;
      r.scale = p.shared, r.shift = p.shared + padded, r.clamp = p.clamp;
      r.out = p.out.data + image * p.out.image_stride + oy * p.out.row_stride;
      r.channels = p.channels, r.pad_channels = false;
      row_function(r);
    }
  }
}

inline void depthwise_prepare(void* params, int threads, Work* work) {
  DepthwiseParams& p = *static_cast<DepthwiseParams*>(params);
  p.bands = threads > 1 ? smaller(p.out_height, divide_up(4 * (int64_t)threads, p.images)) : 1;
  work->count = 1;
  work->phases[0] = {depthwise_run, &p, p.images * p.bands};
  work->worker_bytes = p.kernel[0] * sizeof(float*);
  work->shared_bytes = 2 * round_up(p.channels, kLanes) * sizeof(float);
}

inline void depthwise_begin(void* params) {
  DepthwiseParams& p = *static_cast<DepthwiseParams*>(params);
  const int64_t padded = round_up(p.channels, kLanes);
  fold_batch_norm(p.norm, p.channels, padded, p.shared, p.shared + padded);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
