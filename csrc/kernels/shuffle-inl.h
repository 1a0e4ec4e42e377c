// Channel shuffle (ShuffleNet, section 3.2) of one pixel: channel g * n + j of `groups` times n channels becomes channel
// j * groups + g.
//
// Of NHWC data that is an interleaving of `groups` streams, a vector of each at a time: two vectors are interleaved by two
// permutations, three by two each, and 4 and 8 are made of pairs; AVX2 has ways of its own for more than two.
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

#if FASTBLOCKS_VECTOR_NATIVE == 256
// With AVX2 what crosses the halves of a vector takes an instruction of its own: four and eight streams are transposed within
// halves, three interleaved within them, and halves put together once.
FASTBLOCKS_INLINE Vec lower_halves(Vec a, Vec b) { return (Vec)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20); }
FASTBLOCKS_INLINE Vec upper_halves(Vec a, Vec b) { return (Vec)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31); }

template <int kPattern>
FASTBLOCKS_INLINE Vec shuffle_in_halves(Vec a, Vec b) {
  return (Vec)_mm256_shuffle_ps((__m256)a, (__m256)b, kPattern);
}

// r[k] = value k of a, b, c and d, in each half.
FASTBLOCKS_INLINE void transpose_in_halves(Vec a, Vec b, Vec c, Vec d, Vec (&r)[4]) {
  const __m256d low_ab = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)a, (__m256)b));
  const __m256d high_ab = _mm256_castps_pd(_mm256_unpackhi_ps((__m256)a, (__m256)b));
  const __m256d low_cd = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)c, (__m256)d));
  const __m256d high_cd = _mm256_castps_pd(_mm256_unpackhi_ps((__m256)c, (__m256)d));
  r[0] = (Vec)_mm256_castpd_ps(_mm256_unpacklo_pd(low_ab, low_cd));
  r[1] = (Vec)_mm256_castpd_ps(_mm256_unpackhi_pd(low_ab, low_cd));
  r[2] = (Vec)_mm256_castpd_ps(_mm256_unpacklo_pd(high_ab, high_cd));
  r[3] = (Vec)_mm256_castpd_ps(_mm256_unpackhi_pd(high_ab, high_cd));
}

FASTBLOCKS_INLINE void interleave_by_halves(Vec (&v)[3]) {
  const Vec ab = shuffle_in_halves<0x88>(v[0], v[1]);  // a0 a2 b0 b2
  const Vec bc = shuffle_in_halves<0xdd>(v[1], v[2]);  // b1 b3 c1 c3
  const Vec ca = shuffle_in_halves<0xd8>(v[2], v[0]);  // c0 c2 a1 a3
  const Vec first = shuffle_in_halves<0x88>(ab, ca), second = shuffle_in_halves<0xd8>(bc, ab);
  const Vec third = shuffle_in_halves<0xdd>(ca, bc);
  v[0] = lower_halves(first, second);
  v[1] = (Vec)_mm256_permute2f128_ps((__m256)third, (__m256)first, 0x30);
  v[2] = upper_halves(second, third);
}

FASTBLOCKS_INLINE void interleave_by_halves(Vec (&v)[4]) {
  Vec r[4];
  transpose_in_halves(v[0], v[1], v[2], v[3], r);
  v[0] = lower_halves(r[0], r[1]), v[1] = lower_halves(r[2], r[3]);
  v[2] = upper_halves(r[0], r[1]), v[3] = upper_halves(r[2], r[3]);
}

FASTBLOCKS_INLINE void interleave_by_halves(Vec (&v)[8]) {
  Vec low[4], high[4];
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) low[s] = lower_halves(v[s], v[s + 4]), high[s] = upper_halves(v[s], v[s + 4]);
  transpose_in_halves(low[0], low[1], low[2], low[3], low);
  transpose_in_halves(high[0], high[1], high[2], high[3], high);
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) v[s] = low[s], v[s + 4] = high[s];
}
#endif

// The first n lanes, where n may be none, or more than there are.
FASTBLOCKS_INLINE Vec load_first(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : n > 0 ? load_partial(p, (int)n) : Vec{};
}
FASTBLOCKS_INLINE void store_first(float* p, int64_t n, Vec v) {
  if (n >= kLanes)
    store(p, v);
  else if (n > 0)
    store_partial(p, (int)n, v);
}

// v[s] holds kLanes values of stream s; afterwards v[0], v[1], ... are the interleaved values.
template <int S>
FASTBLOCKS_INLINE void interleave(Vec (&v)[S]) {
  if constexpr (S == 2) {
    const Vec a = v[0], b = v[1];
    v[0] = interleave_pair<0>(a, b, LaneIndices());
    v[1] = interleave_pair<1>(a, b, LaneIndices());
#if FASTBLOCKS_VECTOR_NATIVE == 256
  } else {
    interleave_by_halves(v);
#else
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
#endif
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
// the one before; where there is none before, by a part of a block; and what is no whole round of the streams, value by value.
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
  const int64_t first = i, rounds_end = end - end % S;
  for (; i + kBlock <= end; i += kBlock) block(i);
  if (i < rounds_end && i > first) {
    block(rounds_end - kBlock);
    i = rounds_end;
  } else if (i < rounds_end) {
    const int64_t count = rounds_end - i;
    Vec v[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) v[s] = load_partial(streams[s] + i / S, (int)(count / S));
    interleave<S>(v);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) store_first(out + (i - begin) + s * kLanes, count - s * kLanes, v[s]);
    i = rounds_end;
  }
  for (; i < end; ++i) out[i - begin] = streams[i % S][i / S];
}

template <int S, int kStream, int... E>
FASTBLOCKS_INLINE Vec pick(const Vec* v, std::integer_sequence<int, E...>) {
  if constexpr (S == 2) {
    return __builtin_shufflevector(v[0], v[1], (2 * E + kStream)...);
  } else {  // of three
    const Vec ab = __builtin_shufflevector(v[0], v[1], (3 * E + kStream < 2 * kLanes ? 3 * E + kStream : 0)...);
    return __builtin_shufflevector(ab, v[2], (3 * E + kStream < 2 * kLanes ? E : 3 * E + kStream - kLanes)...);
  }
}

// The inverse of interleave.
template <int S>
FASTBLOCKS_INLINE void deinterleave(Vec (&v)[S]) {
  if constexpr (S == 2) {
    const Vec from[2] = {v[0], v[1]};
    v[0] = pick<2, 0>(from, LaneIndices());
    v[1] = pick<2, 1>(from, LaneIndices());
  } else if constexpr (S == 3) {
    const Vec from[3] = {v[0], v[1], v[2]};
    v[0] = pick<3, 0>(from, LaneIndices());
    v[1] = pick<3, 1>(from, LaneIndices());
    v[2] = pick<3, 2>(from, LaneIndices());
  } else {
    Vec even[S / 2], odd[S / 2];
#pragma GCC unroll 8
    for (int s = 0; s < S / 2; ++s) {
      Vec pair[2] = {v[2 * s], v[2 * s + 1]};
      deinterleave<2>(pair);
      even[s] = pair[0], odd[s] = pair[1];
    }
    deinterleave<S / 2>(even);
    deinterleave<S / 2>(odd);
#pragma GCC unroll 8
    for (int s = 0; s < S / 2; ++s) v[2 * s] = even[s], v[2 * s + 1] = odd[s];
  }
}

// `count` values of each of S streams, interleaved at x, to streams of their own; no byte beyond them is touched.
template <int S>
FASTBLOCKS_INLINE void deinterleave_exact(const float* x, int64_t count, float* const* streams) {
  const auto block = [&](int64_t j) __attribute__((always_inline)) {
    Vec v[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) v[s] = load(x + j * S + s * kLanes);
    deinterleave<S>(v);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) store(streams[s] + j, v[s]);
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) block(j);
  if (j == count) return;
  if (j > 0) return block(count - kLanes);
  Vec v[S];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) v[s] = load_first(x + s * kLanes, count * S - s * kLanes);
  deinterleave<S>(v);
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) store_partial(streams[s], (int)count, v[s]);
}

constexpr int64_t kMostStreams = 8;  // with vectors

// Calls run with the number of streams as a constant. False where vectors know no such number.
template <class Run>
FASTBLOCKS_INLINE bool with_streams(int64_t count, Run run) {
  switch (count) {
    case 2: run(std::integral_constant<int, 2>()); return true;
    case 3: run(std::integral_constant<int, 3>()); return true;
    case 4: run(std::integral_constant<int, 4>()); return true;
    case 8: run(std::integral_constant<int, 8>()); return true;
    default: return false;
  }
}

// Any number of evenly spaced streams.
template <bool kExact>
inline void interleave_streams(const float* x, int64_t stream_stride, int64_t count, int64_t begin, int64_t end, float* out) {
  const bool done = with_streams(count, [&](auto number) __attribute__((always_inline)) {
    constexpr int S = decltype(number)::value;
    const float* streams[S];
    for (int s = 0; s < S; ++s) streams[s] = x + s * stream_stride;
    if (kExact)
      interleave_exact<S>(streams, begin, end, out);
    else
      interleave_loose<S>(streams, begin, end, out);
  });
  if (done) return;
  // Streams of a few values side by side, all of them: as many streams interleaved.
  const bool whole = begin == 0 && end == count * stream_stride;
  if (whole && with_streams(stream_stride, [&](auto number) __attribute__((always_inline)) {
        constexpr int S = decltype(number)::value;
        float* streams[S];
        for (int s = 0; s < S; ++s) streams[s] = out + s * count;
        deinterleave_exact<S>(x, count, streams);
      }))
    return;
  int64_t s = begin % count, j = begin / count;
  for (int64_t i = begin; i < end; ++i) {
    *out++ = x[s * stream_stride + j];
    if (++s == count) s = 0, ++j;
  }
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
