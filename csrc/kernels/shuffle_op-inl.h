// The shuffles as ops of their own: the channels of one input or two, shuffled, and dealt to one output or two.
#pragma once

#include "shuffle-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int64_t kShuffleAlone = 32 << 10;  // bytes written, up to which a second thread is not worth waking
constexpr int64_t kShuffleEvenly = 4 << 20;  // up to which each thread takes one part, and finds it in its cache the next time
constexpr int64_t kShufflePast = 16 << 20;   // beyond which outputs go past the caches
constexpr int64_t kShuffleBuffer = 4 << 10;  // of an output, on its way past the caches

// Some pixels of NHWC data.
struct ShufflePixels {
  const float* in[2];
  float* out[2];
  int64_t out_stride[2], count;
};

// Two groups, each in one input: ShuffleNetV2's.
inline void interleave_pixels(const ShuffleParams& p, const ShufflePixels& x) {
  const int64_t n = p.channels / 2;
  const bool second = n >= p.in[0].channels;
  const float* streams[2] = {x.in[0], second ? x.in[1] : x.in[0] + n};
  const int64_t step[2] = {p.in[0].pixel_stride, p.in[second].pixel_stride};
  for (int64_t i = 0; i < x.count; ++i) {
    int64_t begin = 0;
    for (int part = 0; part < p.out_count; ++part) {
      const int64_t end = begin + p.out[part].channels;
      interleave_exact<2>(streams, begin, end, x.out[part] + i * x.out_stride[part]);
      begin = end;
    }
    for (int s = 0; s < 2; ++s) streams[s] += step[s];
  }
}

inline void shuffle_pixels_of(const ShuffleParams& p, const ShufflePixels& x) {
  const int64_t n = p.channels / p.groups;
  if (p.groups == 2 && p.in[0].channels % n == 0) return interleave_pixels(p, x);
  for (int64_t i = 0; i < x.count; ++i) {
    const float* const in[2] = {x.in[0] + i * p.in[0].pixel_stride, x.in[1] + i * p.in[1].pixel_stride};
    int64_t begin = 0;
    for (int part = 0; part < p.out_count; ++part) {
      const int64_t end = begin + p.out[part].channels;
      float* to = x.out[part] + i * x.out_stride[part];
      if (p.in_count == 1) {
        interleave_streams<true>(in[0], n, p.groups, begin, end, to);
      } else {
        for (int64_t c = begin; c < end; ++c) {
          const int64_t from = c % p.groups * n + c / p.groups;
          *to++ = from < p.in[0].channels ? in[0][from] : in[1][from - p.in[0].channels];
        }
      }
      begin = end;
    }
  }
}

// Past the caches, but for what is no whole vector at both ends. Meanwhile as much is fetched from `next`.
inline void stream_values(float* to, const float* from, int64_t count, const float* next) {
  const int64_t ahead =
      (int64_t)(((uintptr_t)FASTBLOCKS_VECTOR_BYTES - (uintptr_t)to % FASTBLOCKS_VECTOR_BYTES) / sizeof(float));
  int64_t i = smaller(count, ahead % kLanes);
  __builtin_memcpy(to, from, i * sizeof(float));
  for (; i + kLanes <= count; i += kLanes) {
    stream(to + i, load(from + i));
    __builtin_prefetch(next + i);
  }
  __builtin_memcpy(to + i, from + i, (count - i) * sizeof(float));
}

// Pixels [first, last) of an image.
inline void shuffle_rows(const ShuffleParams& p, int64_t image, int64_t first, int64_t last, float* buffer) {
  ShufflePixels x{};
  float* out[2];
  for (int i = 0; i < 2; ++i) {
    x.in[i] = p.in[i].data + image * p.in[i].image_stride + first * p.in[i].pixel_stride;
    out[i] = p.out[i].data + image * p.out[i].image_stride + first * p.out[i].pixel_stride;
    x.out_stride[i] = p.out[i].pixel_stride;
  }
  if (!p.past) {
    x.out[0] = out[0], x.out[1] = out[1], x.count = last - first;
    return shuffle_pixels_of(p, x);
  }
  const int64_t step = larger(1, kShuffleBuffer / (int64_t)sizeof(float) / p.out[0].channels);  // outputs are dense
  for (int64_t pixel = first; pixel < last; pixel += step) {
    x.count = smaller(step, last - pixel);
    x.out[0] = buffer, x.out[1] = buffer + step * p.out[0].channels;
    shuffle_pixels_of(p, x);
    for (int i = 0; i < 2; ++i) x.in[i] += x.count * p.in[i].pixel_stride;
    for (int i = 0; i < p.out_count; ++i) {
      const int64_t values = x.count * p.out[i].channels;
      stream_values(out[i], x.out[i], values, p.in_count == 2 ? x.in[i] : x.in[0] + i * values);
      out[i] += values;
    }
  }
}

// The plane of the inputs that plane i of the outputs is a copy of.
FASTBLOCKS_INLINE const float* plane_of(const ShuffleParams& p, int64_t image, int64_t i) {
  const int64_t c = i % p.groups * (p.channels / p.groups) + i / p.groups;
  const bool second = c >= p.in[0].channels;
  return p.in[second].data + image * p.in[second].image_stride + (c - second * p.in[0].channels) * p.in[second].pixel_stride;
}

// Planes [first, last) of the outputs.
inline void shuffle_planes(const ShuffleParams& p, int64_t image, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const bool second = i >= p.out[0].channels;
    const ShuffleParams::Part& to = p.out[second];
    float* const y = to.data + image * to.image_stride + (i - second * p.out[0].channels) * to.pixel_stride;
    const float* const x = plane_of(p, image, i);
    if (p.past)
      stream_values(y, x, p.pixels, plane_of(p, image, i + 1 < last ? i + 1 : i));
    else
      __builtin_memcpy(y, x, p.pixels * sizeof(float));
  }
}

// An item is some pixels, or some planes, in the order of the images.
inline void shuffle_run(const void* params, int64_t begin, int64_t end, char* scratch) noexcept {
  const ShuffleParams& p = *static_cast<const ShuffleParams*>(params);
  const int64_t units = p.planar ? p.channels : p.pixels, last = smaller(end * p.block, p.images * units);
  for (int64_t unit = begin * p.block; unit < last;) {
    const int64_t image = unit / units, from = unit % units, to = smaller(units, from + last - unit);
    if (p.planar)
      shuffle_planes(p, image, from, to);
    else
      shuffle_rows(p, image, from, to, reinterpret_cast<float*>(scratch));
    unit += to - from;
  }
  if (p.past) fence();
}

inline void shuffle_prepare(void* params, int threads, Work* work) {
  ShuffleParams& p = *static_cast<ShuffleParams*>(params);
  const int64_t units = p.images * (p.planar ? p.channels : p.pixels);
  const int64_t bytes = p.images * p.channels * p.pixels * (int64_t)sizeof(float);
  const int64_t parts = bytes <= kShuffleAlone ? 1 : bytes <= kShuffleEvenly ? threads : 4 * (int64_t)threads;
  p.past = bytes > kShufflePast;
  p.block = larger(1, divide_up(units, parts));
  work->count = 1;
  work->phases[0] = {shuffle_run, &p, divide_up(units, p.block), 0};
  // the buffers, and a pixel more for each that is larger than one
  work->worker_bytes = p.past && !p.planar ? 2 * kShuffleBuffer + p.channels * sizeof(float) : 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
