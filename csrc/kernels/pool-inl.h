// Global average pooling: the mean of all pixels of each channel.
#pragma once

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

inline void pool_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const PoolParams& p = *static_cast<const PoolParams*>(params);
  const Vec count = broadcast((float)p.pixels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.channel_blocks, first = item % p.channel_blocks * p.channel_block;
    const int64_t limit = smaller(first + p.channel_block, p.channels);
    const float* x = p.x + image * p.image_stride;
    float* out = p.out + image * p.channels;
    int64_t c = first;
    for (; c + 4 * kLanes <= limit; c += 4 * kLanes) {
      Vec sum[4] = {Vec{}, Vec{}, Vec{}, Vec{}};
      for (int64_t m = 0; m < p.pixels; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[v] += load(x + m * p.pixel_stride + c + v * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store(out + c + v * kLanes, sum[v] / count);
    }
    for (; c < limit; c += kLanes) {
      const int lanes = (int)smaller(kLanes, limit - c);
      Vec sum{};
      for (int64_t m = 0; m < p.pixels; ++m) {
        const float* at = x + m * p.pixel_stride + c;
        sum += lanes == kLanes ? load(at) : load_partial(at, lanes);
      }
      if (lanes == kLanes)
        store(out + c, sum / count);
      else
        store_partial(out + c, lanes, sum / count);
    }
  }
}

inline void pool_prepare(void* params, int threads, Work* work) {
  PoolParams& p = *static_cast<PoolParams*>(params);
  const int64_t parts = threads > 1 ? divide_up(2 * (int64_t)threads, p.images) : 1;
  p.channel_block = round_up(divide_up(p.channels, parts), 4 * kLanes);
  p.channel_blocks = divide_up(p.channels, p.channel_block);
  work->count = 1;
  work->phases[0] = {pool_run, &p, p.images * p.channel_blocks};
  work->worker_bytes = 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
