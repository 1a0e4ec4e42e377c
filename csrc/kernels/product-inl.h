// What the training kernels use of the inference kernels, as ordinary functions: their templates are compiled once.
#pragma once

#include "depthwise-inl.h"
#include "gemm-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// out[m][n] = sum_k a[m][k] * w[k][n] [+ residual], for weights packed in panels. `zeros`: as many as the padded channels.
// `soon`: fetched meanwhile.
void product(const Pixels& a, int64_t pixels, int64_t channels, const float* weight, const float* zeros, const float* residual,
             int64_t residual_stride, float* out, int64_t out_stride, const Range& soon) {
  const Clamp none = {-__builtin_inff(), __builtin_inff()};
  const Epilogue e = {{nullptr, zeros, weight}, none, residual, residual_stride, false};
  gemm(a, pixels, channels, 0, Panels(channels).count, e, {out, out_stride, nullptr}, soon);
}

// kernel 0: any.
DepthwiseFunction depthwise_for(int64_t kernel, int64_t stride, int64_t dilation) {
  return depthwise_function(kernel, stride, dilation, false);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
