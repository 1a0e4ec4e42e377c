// Global average pooling in training: the mean of what is read through a BatchNorm, which is not stored.
#pragma once

#include "finish-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int64_t kMeanBlock = 64, kMeanItems = 16;

// Cuts each image's `size` channels or pixels into parts of a multiple of `unit`, where images alone are few.
FASTBLOCKS_INLINE void cut_mean(TrainMean& p, int64_t size, int64_t unit) {
  const int64_t parts = larger(1, smaller(size / unit, divide_up(kMeanItems, p.images)));
  p.width = round_up(divide_up(size, parts), unit);
  p.parts = divide_up(size, p.width);
  p.items = p.images * p.parts;
}

// An item is some channels of an image. Sums of a block of pixels are added in double.
inline void mean_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainMean& p = *static_cast<const TrainMean*>(params);
  Scratch scratch(memory);
  float* rows = scratch.take<float>(kMeanBlock * p.width + kPadding);
  double* sums = scratch.take<double>(p.width);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.parts, first = item % p.parts * p.width;
    const int64_t channels = smaller(p.width, p.channels - first);
    for (int64_t c = 0; c < p.width; ++c) sums[c] = 0.0;
    for (int64_t m = 0; m < p.pixels; m += kMeanBlock) {
      const int64_t count = smaller(kMeanBlock, p.pixels - m);
      read_source(p.x, image * p.pixels + m, count, first, channels, rows, p.width);
      for (int64_t c = 0; c < channels; c += kLanes) {
        Vec sum{};
        for (int64_t i = 0; i < count; ++i) sum += load(rows + i * p.width + c);
        add_lanes(sums + c, sum);
      }
    }
    float* y = p.y + image * p.y_stride + first;
    for (int64_t c = 0; c < channels; ++c) y[c] = (float)(sums[c] / (double)p.pixels);
  }
}

inline void mean_prepare(void* params, TrainWork* work) {
  TrainMean& p = *static_cast<TrainMean*>(params);
  cut_mean(p, p.channels, kPadding);
  *work = {p.items, room<float>(kMeanBlock * p.width + kPadding) + room<double>(p.width)};
}

// An item is some pixels of an image; each has the same gradient.
inline void mean_grad_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainMean& p = *static_cast<const TrainMean*>(params);
  Scratch scratch(memory);
  float* share = scratch.take<float>(padded(p.channels));
  Sums sums(p.channels, scratch);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.parts, from = item % p.parts * p.width;
    const int64_t to = smaller(from + p.width, p.pixels);
    const float* g = p.y + image * p.y_stride;
    for (int64_t c = 0; c < p.channels; ++c) share[c] = g[c] / (float)p.pixels;
    sums.clear(p.channels);
    for (int64_t m = from; m < to; m += kMeanBlock) {
      const int64_t pixel = image * p.pixels + m;
      finish(p.finish, share, 0, p.dx + pixel * p.dx_stride, p.dx_stride, pixel, smaller(kMeanBlock, to - m), 0, p.channels,
             sums);
    }
    if (p.finish.stream) fence();
    if (p.finish.partials) sums.write(p.channels, p.finish.partials + item * 2 * padded(p.channels));
  }
}

inline void mean_grad_prepare(void* params, TrainWork* work) {
  TrainMean& p = *static_cast<TrainMean*>(params);
  cut_mean(p, p.pixels, 16);
  *work = {p.items, room<float>(padded(p.channels)) + Sums::bytes(p.channels)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
