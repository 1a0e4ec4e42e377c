// Channel shuffle (ShuffleNet, section 3.2): channel g * n + j of `groups` times n channels becomes channel j * groups + g.
//
// Of NHWC data that is an interleaving of `groups` streams, a vector of each at a time: two vectors are interleaved by two
// permutations, three by two each, and 4 and 8 are made of pairs.
#pragma once

#include <utility>

#include "../vec.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

template <int kPart, int... E>
FASTBLOCKS_INLINE Vec interleave_pair(Vec a, Vec b, std::integer_sequence<int, E...>) {
  return __builtin_shufflevector(a, b, ((kPart * kLanes + E) / 2 + (E % 2 ? kLanes : 0))...);
}

template <int kPart, int... E>
FASTBLOCKS_INLINE Vec interleave_triple(Vec a, Vec b, Vec c, std::integer_sequence<int, E...>) {
  const Vec ab = __builtin_shufflevector(a, b, ((kPart * kLanes + E) / 3 + ((kPart * kLanes + E) % 3 == 1 ? kLanes : 0))...);
  return __builtin_shufflevector(ab, c, ((kPart * kLanes + E) % 3 == 2 ? kLanes + (kPart * kLanes + E) / 3 : E)...);
}

typedef std::make_integer_sequence<int, kLanes> LaneIndices;

// v[s] holds kLanes values of stream s; afterwards v[0], v[1], ... are the interleaved values.
template <int S>
FASTBLOCKS_INLINE void interleave(Vec (&v)[S]) {
  if constexpr (S == 2) {
    const Vec a = v[0], b = v[1];
    v[0] = interleave_pair<0>(a, b, LaneIndices());
    v[1] = interleave_pair<1>(a, b, LaneIndices());
  } else if constexpr (S == 3) {
    const Vec a = v[0], b = v[1], c = v[2];
    v[0] = interleave_triple<0>(a, b, c, LaneIndices());
    v[1] = interleave_triple<1>(a, b, c, LaneIndices());
    v[2] = interleave_triple<2>(a, b, c, LaneIndices());
  } else {
    Vec even[S / 2], odd[S / 2];
#pragma GCC unroll 8
    for (int s = 0; s < S / 2; ++s) even[s] = v[2 * s], odd[s] = v[2 * s + 1];
    interleave<S / 2>(even);
    interleave<S / 2>(odd);
#pragma GCC unroll 8
    for (int s = 0; s < S / 2; ++s) {
      Vec pair[2] = {even[s], odd[s]};
      interleave<2>(pair);
      v[2 * s] = pair[0], v[2 * s + 1] = pair[1];
    }
  }
}

// Values [begin, end) of the interleaving of S streams, to out[0]. Whole vectors are read and written: streams are readable for
// a vector beyond what is asked of them, `out` is writable from out[-S] to S vectors beyond its end.
template <int S>
FASTBLOCKS_INLINE void interleave_loose(const float* const* streams, int64_t begin, int64_t end, float* out) {
  const int64_t first = begin / S;
  out -= begin - first * S;
  for (int64_t j = first; j * S < end; j += kLanes, out += S * kLanes) {
    Vec v[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) v[s] = load(streams[s] + j);
    interleave<S>(v);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) store(out + s * kLanes, v[s]);
  }
}

// The same without a byte too much. What whole blocks leave over is done by a last block that ends there, and partly repeats
// the one before; value by value only where there is no room for one.
template <int S>
FASTBLOCKS_INLINE void interleave_exact(const float* const* streams, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kBlock = S * kLanes;
  const auto block = [&](int64_t i) __attribute__((always_inline)) {
    Vec v[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) v[s] = load(streams[s] + i / S);
    interleave<S>(v);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) store(out + (i - begin) + s * kLanes, v[s]);
  };
  int64_t i = begin;
  for (; i < end && i % S; ++i) out[i - begin] = streams[i % S][i / S];
  const int64_t first = i;
  for (; i + kBlock <= end; i += kBlock) block(i);
  if (i < end && i > first && end % S == 0) {
    block(end - kBlock);
    return;
  }
  for (; i < end; ++i) out[i - begin] = streams[i % S][i / S];
}

constexpr int64_t kMostStreams = 8;  // with vectors

// Any number of evenly spaced streams.
template <bool kExact>
inline void interleave_streams(const float* x, int64_t stream_stride, int64_t count, int64_t begin, int64_t end, float* out) {
  const float* streams[kMostStreams];
  for (int64_t s = 0; s < smaller(count, kMostStreams); ++s) streams[s] = x + s * stream_stride;
  const auto run = [&](auto number) __attribute__((always_inline)) {
    constexpr int S = decltype(number)::value;
    if (kExact)
      interleave_exact<S>(streams, begin, end, out);
    else
      interleave_loose<S>(streams, begin, end, out);
  };
  switch (count) {
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 8: return run(std::integral_constant<int, 8>());
    default: break;
  }
  int64_t s = begin % count, j = begin / count;
  for (int64_t i = begin; i < end; ++i) {
    *out++ = x[s * stream_stride + j];
    if (++s == count) s = 0, ++j;
  }
}

// ------------------------------------------------------------------------------------------------ the op

// One pixel: outputs' channels [0, p.channels), in order. The groups lie in the inputs evenly where there is one input, or two
// with half of the groups each; else channel by channel.
inline void shuffle_pixel(const ShuffleParams& p, const float* const* in, float* const* out) {
  const int64_t n = p.channels / p.groups;
  int64_t begin = 0;
  for (int part = 0; part < p.out_count; ++part) {
    const int64_t end = begin + p.out[part].channels;
    if (p.in_count == 1) {
      interleave_streams<true>(in[0], n, p.groups, begin, end, out[part]);
    } else if (p.groups == 2 && p.in[0].channels == n) {
      interleave_exact<2>(in, begin, end, out[part]);
    } else {
      float* to = out[part];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i % p.groups * n + i / p.groups;
        *to++ = c < p.in[0].channels ? in[0][c] : in[1][c - p.in[0].channels];
      }
    }
    begin = end;
  }
}

inline void shuffle_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const ShuffleParams& p = *static_cast<const ShuffleParams*>(params);
  const int64_t n = p.channels / p.groups;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.blocks, first = item % p.blocks * p.block;
    if (p.planar) {  // an item is some planes of the outputs
      for (int64_t i = first; i < smaller(first + p.block, p.channels); ++i) {
        const int64_t c = i % p.groups * n + i / p.groups;
        const bool second_in = c >= p.in[0].channels, second_out = i >= p.out[0].channels;
        const ShuffleParams::Part &from = p.in[second_in], &to = p.out[second_out];
        __builtin_memcpy(to.data + image * to.image_stride + (i - second_out * p.out[0].channels) * to.pixel_stride,
                         from.data + image * from.image_stride + (c - second_in * p.in[0].channels) * from.pixel_stride,
                         p.pixels * sizeof(float));
      }
      continue;
    }
    for (int64_t pixel = first; pixel < smaller(first + p.block, p.pixels); ++pixel) {
      const float* in[2];
      float* out[2];
      for (int i = 0; i < 2; ++i) {
        in[i] = p.in[i].data + image * p.in[i].image_stride + pixel * p.in[i].pixel_stride;
        out[i] = p.out[i].data + image * p.out[i].image_stride + pixel * p.out[i].pixel_stride;
      }
      shuffle_pixel(p, in, out);
    }
  }
}

inline void shuffle_prepare(void* params, int threads, Work* work) {
  ShuffleParams& p = *static_cast<ShuffleParams*>(params);
  const int64_t units = p.planar ? p.channels : p.pixels;  // an image is cut into
  const int64_t parts = threads > 1 ? divide_up(4 * (int64_t)threads, p.images) : 1;
  p.block = larger(1, divide_up(units, smaller(parts, larger(units, 1))));
  p.blocks = divide_up(units, p.block);
  work->count = 1;
  work->phases[0] = {shuffle_run, &p, p.images * p.blocks};
  work->worker_bytes = 0;
  work->shared_bytes = 0;
  work->shared = nullptr;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
