// Dense k x k convolution + BatchNorm + activation, meant for a network's stem (3 input channels) and right for any count.
//
// Input rows are copied, with their side padding, into a ring of kernel-height rows that stays in L1, those of an NCHW image
// with their channels side by side. The convolution of an output row is then a matrix product whose left operand is read from
// the ring in runs of kernel_width * channels values, one a kernel row. Laying the windows out first, for a product in one run,
// took a fifth longer; an NCHW image as it is, in runs of kernel_width values a channel and kernel row, a tenth.
#pragma once

#include "depthwise-inl.h"
#include "gemm-inl.h"
#include "shuffle-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Packs w[n][c][ky][kx] in the order of the depth: (ky, kx, c).
inline void pack_conv(const float* w, int64_t out_channels, int64_t in_channels, const int64_t* kernel, const int64_t* strides,
                      int64_t* offsets, float* out) {
  const int64_t depth = in_channels * kernel[0] * kernel[1];
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t c = k % in_channels, kx = k / in_channels % kernel[1], ky = k / in_channels / kernel[1];
    offsets[k] = c * strides[1] + ky * strides[2] + kx * strides[3];
  }
  pack_gemm(w, out_channels, strides[0], depth, offsets, out);
}

struct ConvRuns {
  int64_t count, length;
};

FASTBLOCKS_INLINE ConvRuns conv_runs(const ConvParams& p) {
  const bool dense = p.dilation[1] == 1;
  return {p.kernel[0] * (dense ? 1 : p.kernel[1]), (dense ? p.kernel[1] : 1) * p.in_channels};
}

struct ConvScratch {
  int64_t* run_offsets;
  float *ring, *zeros, *end;
  int64_t row_floats, ring_rows;
};

FASTBLOCKS_INLINE ConvScratch conv_scratch(const ConvParams& p, char* memory, size_t* bytes) {
  ConvScratch s;
  s.row_floats = (p.width + 2 * p.padding[1]) * p.in_channels;
  s.ring_rows = (p.kernel[0] - 1) * p.dilation[0] + 1;
  s.run_offsets = reinterpret_cast<int64_t*>(memory);
  float* next = reinterpret_cast<float*>(memory + round_up(conv_runs(p).count, 8) * sizeof(int64_t));
  s.ring = next, next += round_up(s.ring_rows * s.row_floats, 16);
  s.zeros = next, next += round_up(s.row_floats, 16);
  s.end = next;
  *bytes = (char*)next - memory;
  return s;
}

inline void conv_load_row(const ConvParams& p, const ConvScratch& s, int64_t image, int64_t iy) {
  float* to = s.ring + iy % s.ring_rows * s.row_floats;
  const float* from = p.x.data + image * p.x.image_stride + iy * p.x.row_stride;
  const int64_t pad = p.padding[1];
  if (p.planar) {
    interleave_streams<true>(from, p.x.pixel_stride, p.in_channels, 0, p.width * p.in_channels, to + pad * p.in_channels);
  } else if (p.x.pixel_stride == p.in_channels) {
    __builtin_memcpy(to + pad * p.in_channels, from, p.width * p.in_channels * sizeof(float));
  } else {
    for (int64_t x = 0; x < p.width; ++x)
      __builtin_memcpy(to + (pad + x) * p.in_channels, from + x * p.x.pixel_stride, p.in_channels * sizeof(float));
  }
}

// Rows [begin, end) of an image, which comes from L3 or memory: they come nearer while the rows before them are convolved.
FASTBLOCKS_INLINE Range conv_rows(const ConvParams& p, int64_t image, int64_t begin, int64_t end) {
  const float* row = p.x.data + image * p.x.image_stride + begin * p.x.row_stride;
  const int64_t floats = (end - begin) * p.x.row_stride;
  if (begin >= end || p.x.row_stride > 2 * p.width * (p.planar ? 1 : p.in_channels)) return {};  // mostly what is not read
  return p.planar ? Range{row, floats, p.in_channels, p.x.pixel_stride} : Range{row, floats};
}

// The ring's rows have no padding yet, and recycled memory holds anything.
FASTBLOCKS_INLINE void conv_clear(const ConvScratch& s) { __builtin_memset(s.ring, 0, (char*)s.end - (char*)s.ring); }

// Output row `oy` of the panels [panel_begin, panel_end) of channels; `to` is the place of channel 0. Input rows below `next`
// are in the ring or no longer needed; the row after those that this output row needs is returned.
inline int64_t conv_output_row(const ConvParams& p, const ConvScratch& s, int64_t image, int64_t oy, int64_t next,
                               int64_t panel_begin, int64_t panel_end, const Destination& to, bool pad_channels) {
  const int64_t first = oy * p.stride[0] - p.padding[0], limit = smaller(p.height, first + s.ring_rows);
  for (next = larger(next, larger(first, 0)); next < limit; ++next) conv_load_row(p, s, image, next);
  const bool dense = p.dilation[1] == 1;
  int64_t r = 0;
  for (int64_t ky = 0; ky < p.kernel[0]; ++ky) {
    const int64_t iy = oy * p.stride[0] - p.padding[0] + ky * p.dilation[0];
    const int64_t row = iy < 0 || iy >= p.height ? s.zeros - s.ring : iy % s.ring_rows * s.row_floats;
    for (int64_t kx = 0; kx < (dense ? 1 : p.kernel[1]); ++kx) s.run_offsets[r++] = row + kx * p.dilation[1] * p.in_channels;
  }
  const ConvRuns runs = conv_runs(p);
  const Pixels left = {s.ring, runs.length, p.stride[1] * p.in_channels, runs.count, s.run_offsets};
  const Epilogue e = {folded_product(p.packed_weight, p.out_channels, p.fold, p.shared), p.clamp, nullptr, 0, pad_channels};
  gemm(left, p.out_width, p.out_channels, panel_begin, panel_end, e, to,
       conv_rows(p, image, next, smaller(p.height, next + p.stride[0])), kNoPanel);
  return next;
}

inline void conv_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const ConvParams& p = *static_cast<const ConvParams*>(params);
  size_t bytes;
  const ConvScratch s = conv_scratch(p, memory, &bytes);
  conv_clear(s);
  const int64_t panels = Panels(p.out_channels).count;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * p.out_height / p.bands, to = (band + 1) * p.out_height / p.bands;
    int64_t next = 0;
    for (int64_t oy = from; oy < to; ++oy) {
      float* out = p.out.data + image * p.out.image_stride + oy * p.out.row_stride;
      next = conv_output_row(p, s, image, oy, next, 0, panels, {out, p.out.pixel_stride, nullptr}, false);
    }
  }
}

inline void conv_prepare(void* params, int threads, Work* work) {
  ConvParams& p = *static_cast<ConvParams*>(params);
  p.bands = threads > 1 ? smaller(p.out_height, divide_up(4 * (int64_t)threads, p.images)) : 1;
  work->count = p.absorbed ? 0 : 1;
  work->phases[0] = {conv_run, &p, p.images * p.bands, p.images};
  conv_scratch(p, nullptr, &work->worker_bytes);
  const int64_t depth = p.in_channels * p.kernel[0] * p.kernel[1];
  p.fold = fold_pays(p.images * p.out_height * p.out_width, depth);
  work->shared_bytes = folded_product_floats(p.out_channels, depth, p.fold) * sizeof(float);
  work->shared = &p.shared;
}

inline void conv_begin(void* params) {
  ConvParams& p = *static_cast<ConvParams*>(params);
  fold_product(p.norm, p.packed_weight, p.out_channels, p.in_channels * p.kernel[0] * p.kernel[1], p.fold, p.shared);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
