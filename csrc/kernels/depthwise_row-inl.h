// What a depthwise convolution of one output row is told, and how its weights are packed.
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// One output row: rows[ky] points at column 0 of the input row of kernel row ky, first_tap <= ky < last_tap are inside the map.
struct DepthwiseRow {
  const float* const* rows;
  int64_t row_begin, row_end;
  int64_t width, pixel_stride, out_width, out_stride;
  int64_t kernel_width, stride, padding, dilation;
  const float* weight;  // [ky][kx][weight_stride], multiplied by the BatchNorm's scale
  int64_t weight_stride;
  const float* shift;
  Clamp clamp;
  float* out;
  int64_t channels;
  bool pad_channels;  // input, weight and output have room for whole vectors
};

typedef void (*DepthwiseRowFunction)(const DepthwiseRow&);

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

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
