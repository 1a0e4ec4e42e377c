// As many multiply-adds as the registers' chains allow, and nothing else: the limit that measured kernels are held against.
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Enough independent chains to hide the latency of a multiply-add on every port, and registers left for the two factors.
constexpr int kPeakChains = kRegisters - 4;

inline void peak_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const PeakParams& p = *static_cast<const PeakParams*>(params);
  for (int64_t item = begin; item < end; ++item) {
    const Vec a = broadcast(p.factors[0]), b = broadcast(p.factors[1]);
    Vec sums[kPeakChains];
#pragma GCC unroll 32
    for (int i = 0; i < kPeakChains; ++i) sums[i] = broadcast((float)(item + i));
    for (int64_t step = 0; step < p.steps; ++step) {
#pragma GCC unroll 32
      for (int i = 0; i < kPeakChains; ++i) sums[i] = sums[i] * a + b;
    }
    Vec total{};
#pragma GCC unroll 32
    for (int i = 0; i < kPeakChains; ++i) total += sums[i];
    store_partial(p.results + item, 1, total);  // so that the compiler keeps them
  }
}

inline void peak_prepare(void* params, int threads, Work* work) {
  PeakParams& p = *static_cast<PeakParams*>(params);
  p.flops = 2.0 * kLanes * kPeakChains * p.steps * threads;
  work->count = 1;
  work->phases[0] = {peak_run, &p, threads, 0};
  work->worker_bytes = 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
