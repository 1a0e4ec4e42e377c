// What a depthwise convolution of one output row is told, and how its weights are packed.
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Some output rows: rows[i * kernel height + ky] points at column 0 of the input row that kernel row ky of output row i reads;
// null beyond the map.
struct DepthwiseRows {
  const float* const* rows;
  int64_t count, kernel_height;
  int64_t width, pixel_stride, out_width, out_stride;  // an output row begins where the one before ends
  int64_t kernel_width, stride, padding, dilation;     // of columns
  const float* weight;                                 // [ky][kx][weight_stride], multiplied by the BatchNorm's scale
  int64_t weight_stride;
  const float* shift;
  Clamp clamp;
  float* out;
  int64_t channels;
  bool pad_channels;  // input, weight and output have room for whole vectors
};

typedef void (*DepthwiseFunction)(const DepthwiseRows&);

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

// Fills in the input rows of output row `oy`: row(y) is where row y of the map begins.
template <class Row>
FASTBLOCKS_INLINE void find_rows(int64_t oy, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel, int64_t height,
                                 const float** rows, Row row) {
  for (int64_t ky = 0; ky < kernel; ++ky) {
    const int64_t y = oy * stride - padding + ky * dilation;
    rows[ky] = y >= 0 && y < height ? row(y) : nullptr;
  }
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
