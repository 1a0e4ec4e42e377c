// One vector of floats, as wide as the instruction set that this translation unit is compiled for.
//
// Everything in a level's namespace is compiled once a level (isa/*.cpp). GCC and Clang vector extensions give arithmetic,
// loads and stores; the few intrinsics are what the extensions lack: partial loads and stores, and min/max that keep a NaN.
// No std:: call belongs here or in kernels/: an inline std function compiled for AVX-512 could become the copy that the
// linker keeps for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef FASTBLOCKS_LEVEL
#error "define FASTBLOCKS_LEVEL, the namespace of this instruction set level, before including vec.h"
#endif

// FASTBLOCKS_VECTOR_BYTES widens the vectors beyond the hardware's: a CPU without AVX-512 then runs (slowly) the very code
// paths, tiles and tails of the wider level.
#if defined(FASTBLOCKS_VECTOR_BYTES)
#define FASTBLOCKS_VECTOR_NATIVE 0
#elif defined(__AVX512F__)
#define FASTBLOCKS_VECTOR_BYTES 64
#define FASTBLOCKS_VECTOR_NATIVE 512
#elif defined(__AVX__)
#define FASTBLOCKS_VECTOR_BYTES 32
#define FASTBLOCKS_VECTOR_NATIVE 256
#else
#define FASTBLOCKS_VECTOR_BYTES 16
#if defined(__SSE2__)
#define FASTBLOCKS_VECTOR_NATIVE 128
#else
#define FASTBLOCKS_VECTOR_NATIVE 0
#endif
#endif

#define FASTBLOCKS_INLINE inline __attribute__((always_inline))

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int kLanes = FASTBLOCKS_VECTOR_BYTES / 4;
// How many vectors the register file holds: the tiles are sized by it.
constexpr int kRegisters = FASTBLOCKS_VECTOR_BYTES == 64 ? 32 : 16;

typedef float Vec __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES)));
typedef float VecInMemory __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES), aligned(4), may_alias));

FASTBLOCKS_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
FASTBLOCKS_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecInMemory*>(p) = v; }
// Past the caches, for what is not read again soon. `p` is aligned to a whole vector; other threads see it after fence().
FASTBLOCKS_INLINE void stream(float* p, Vec v) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  _mm512_stream_ps(p, (__m512)v);
#elif FASTBLOCKS_VECTOR_NATIVE == 256
  _mm256_stream_ps(p, (__m256)v);
#elif FASTBLOCKS_VECTOR_NATIVE == 128
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
FASTBLOCKS_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
FASTBLOCKS_INLINE Vec broadcast(float x) { return x - Vec{}; }

// max(bound, x) and min(bound, x) that give x where x is NaN, as torch's clamp does: the x86 instructions return their second
// operand when either is NaN.
FASTBLOCKS_INLINE Vec at_least(Vec bound, Vec x) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (Vec)_mm512_max_ps((__m512)bound, (__m512)x);
#elif FASTBLOCKS_VECTOR_NATIVE == 256
  return (Vec)_mm256_max_ps((__m256)bound, (__m256)x);
#elif FASTBLOCKS_VECTOR_NATIVE == 128
  return (Vec)_mm_max_ps((__m128)bound, (__m128)x);
#else
  return bound > x ? bound : x;
#endif
}

FASTBLOCKS_INLINE Vec at_most(Vec bound, Vec x) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (Vec)_mm512_min_ps((__m512)bound, (__m512)x);
#elif FASTBLOCKS_VECTOR_NATIVE == 256
  return (Vec)_mm256_min_ps((__m256)bound, (__m256)x);
#elif FASTBLOCKS_VECTOR_NATIVE == 128
  return (Vec)_mm_min_ps((__m128)bound, (__m128)x);
#else
  return bound < x ? bound : x;
#endif
}

// max(a, b) that is NaN where either is.
FASTBLOCKS_INLINE Vec larger_or_nan(Vec a, Vec b) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (Vec)_mm512_mask_max_ps((__m512)a, _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q), (__m512)a, (__m512)b);
#else
  const Vec most = at_least(a, b);  // b where either is NaN
  return a != a ? a : most;
#endif
}

// The first n lanes, 0 < n < kLanes; no byte beyond them is touched. The other lanes are zero.
FASTBLOCKS_INLINE Vec load_partial(const float* p, int n) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif FASTBLOCKS_VECTOR_NATIVE == 256
  static const int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return (Vec)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(kMask + 8 - n)));
#else
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

FASTBLOCKS_INLINE void store_partial(float* p, int n, Vec v) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif FASTBLOCKS_VECTOR_NATIVE == 256
  // By halves: vmaskmovps with a memory destination is microcoded on AMD's cores.
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)p, part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// The same for 0 < n <= kLanes: a mask needs no question, other ways do.
FASTBLOCKS_INLINE Vec load_up_to(const float* p, int n) {
  return FASTBLOCKS_VECTOR_NATIVE == 512 || n < kLanes ? load_partial(p, n) : load(p);
}

FASTBLOCKS_INLINE void store_up_to(float* p, int n, Vec v) {
  if (FASTBLOCKS_VECTOR_NATIVE == 512 || n < kLanes)
    store_partial(p, n, v);
  else
    store(p, v);
}

// Halves of vectors: half a vector in both halves; the lower half of one and the upper half of another; and where they go.
constexpr int kHalf = kLanes / 2;
typedef int32_t IntVec __attribute__((vector_size(FASTBLOCKS_VECTOR_BYTES)));

FASTBLOCKS_INLINE Vec load_half_twice(const float* p) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (Vec)_mm512_broadcast_f32x8(_mm256_loadu_ps(p));
#else
  Vec v{};
  for (int i = 0; i < kHalf; ++i) v[i] = v[kHalf + i] = p[i];
  return v;
#endif
}

FASTBLOCKS_INLINE Vec halves(Vec lower, Vec upper) {
  IntVec index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index < kHalf ? lower : upper;
}

// The first n <= kHalf lanes of the lower half, or of the upper.
FASTBLOCKS_INLINE void store_half(float* p, int n, Vec v, bool upper) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  const __m256 half = upper ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v);
  if (n == kHalf)
    _mm256_storeu_ps(p, half);
  else
    _mm256_mask_storeu_ps(p, (__mmask8)((1u << n) - 1), half);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i + (upper ? kHalf : 0)];
#endif
}

// n <= kHalf values into the lower half, and as many into the upper.
FASTBLOCKS_INLINE Vec load_halves(const float* lower, const float* upper, int n) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  const __mmask8 mask = (__mmask8)((1u << n) - 1);
  const __m512 low = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(mask, lower));
  return (Vec)_mm512_insertf32x8(low, _mm256_maskz_loadu_ps(mask, upper), 1);
#else
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = lower[i], v[kHalf + i] = upper[i];
  return v;
#endif
}

FASTBLOCKS_INLINE Vec swap_halves(Vec v) {
#if FASTBLOCKS_VECTOR_NATIVE == 512
  return (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
#else
  Vec swapped{};
  for (int i = 0; i < kLanes; ++i) swapped[i] = v[(i + kHalf) % kLanes];
  return swapped;
#endif
}

// Takes from the compiler what it knows of a pointer. It then computes addresses where they are used, and loads where it is
// told to: computed or loaded ahead, they would take registers that a kernel needs, and spill its sums.
template <class T>
FASTBLOCKS_INLINE void hide(T*& pointer) {
  __asm__ volatile("" : "+r"(pointer));
}

// Holds a value in a register. The compiler would rather load what is used three times at each use, and loads are then more
// than multiply-adds.
FASTBLOCKS_INLINE void hold(Vec& v) {
#if FASTBLOCKS_VECTOR_NATIVE >= 128
  __asm__("" : "+v"(v));
#else
  (void)v;
#endif
}

// sum += x * y, in the sum's own register. With 12 sums, an operand and two weights in 16 registers GCC moved sums from
// register to register otherwise, and spilled one of them every few steps.
FASTBLOCKS_INLINE void add_product(Vec& sum, Vec x, Vec y) {
#if FASTBLOCKS_VECTOR_NATIVE == 256 && defined(__FMA__)
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y));
#else
  sum += x * y;
#endif
}

FASTBLOCKS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTBLOCKS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTBLOCKS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTBLOCKS_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
