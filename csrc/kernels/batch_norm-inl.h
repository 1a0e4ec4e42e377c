// BatchNorm in inference: one scale and one shift a channel, folded per call (they are a few thousand values), so that packed
// weights depend on the weight alone and running statistics can never make one stale.
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Writes `padded` values of scale and shift; those beyond `channels` are zero, so that padded lanes stay finite.
inline void fold_batch_norm(const BatchNorm& n, int64_t channels, int64_t padded, float* scale, float* shift) {
  if (n.mean) {
    for (int64_t c = 0; c < channels; ++c) scale[c] = 1.0f / __builtin_sqrtf(n.var[c] + n.eps);
    if (n.weight)
      for (int64_t c = 0; c < channels; ++c) scale[c] *= n.weight[c];
    if (n.conv_bias)
      for (int64_t c = 0; c < channels; ++c) shift[c] = (n.conv_bias[c] - n.mean[c]) * scale[c];
    else
      for (int64_t c = 0; c < channels; ++c) shift[c] = -n.mean[c] * scale[c];
    if (n.bias)
      for (int64_t c = 0; c < channels; ++c) shift[c] += n.bias[c];
  } else {
    for (int64_t c = 0; c < channels; ++c) scale[c] = 1.0f;
    for (int64_t c = 0; c < channels; ++c) shift[c] = n.conv_bias ? n.conv_bias[c] : 0.0f;
  }
  for (int64_t c = channels; c < padded; ++c) scale[c] = shift[c] = 0.0f;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
