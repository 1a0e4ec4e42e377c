// The tile at the heart of a matrix product: as many pixels as the register file allows beside one row of a panel of weights.
// With 16 registers that is 6 x 2, 4 x 3 or 8 x 1 accumulators: two FMA pipes of latency 4 need at least 8 independent ones,
// and a step of k loads 8 or fewer operands for 12 FMAs.
#pragma once

#include "panels-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr FASTBLOCKS_INLINE int max_tile_pixels(int vectors) {
  if (kRegisters == 32) return vectors == 3 ? 9 : vectors == 2 ? 14 : 8;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
}

// The most pixels that a product's tiles take. A core that splits its vectors (Zen 4) has fewer registers to rename them to:
// there half a tile loses less before the next, and its stores come more evenly.
FASTBLOCKS_INLINE int tile_pixels(int vectors) {
  if (kRegisters == 32 && vectors == 2 && vector_pipes() == Pipes::kHalves) return max_tile_pixels(vectors) / 2;
  return max_tile_pixels(vectors);
}

// What is needed soon: packed weights that follow those in use, since a small map's weights come from L3 and are used by few
// tiles; or the next pixels. Each tile fetches a part.
struct Ahead {
  const float* next;  // null: nothing to fetch
  int64_t floats;     // a tile
  const float* end;   // of a piece; the one after it begins `skip` floats from where the tiles have come to
  int64_t piece_stride, skip;
};

// A tile's part, two lines at most every four steps of the depth: fetched at once it would take all of a core's buffers for
// misses, and the sums would wait. What is left over goes first.
struct Fetching {
  Ahead& ahead;  // in memory: held in registers it made GCC spill sums, and AVX2 tiles 10 to 20 % slower
  const float* at;
  int64_t first, step;

  FASTBLOCKS_INLINE Fetching(Ahead& a, int64_t fours, const float* near) : ahead(a), at(near), first(0), step(0) {
    if (!ahead.next) return;
    first = round_up(larger(0, ahead.floats - 2 * kLine * fours), kLine);
    if (fours) step = divide_up(ahead.floats - first, 2 * fours);
  }
  FASTBLOCKS_INLINE void begin_tile() {
    if (!ahead.next) return;
    for (int64_t i = 0; i < first; i += kLine) __builtin_prefetch(ahead.next + i);
    at = ahead.next + first;
    ahead.next += ahead.floats;
    if (ahead.next >= ahead.end) ahead.next += ahead.skip, ahead.end += ahead.piece_stride;
  }
  // Where there is nothing to fetch, the same near line again and again costs nothing.
  FASTBLOCKS_INLINE void after_four_steps() {
    __builtin_prefetch(at), at += step;
    __builtin_prefetch(at), at += step;
  }

 private:
  static constexpr int64_t kLine = 16;
};

// The lines that M pixels of V vectors will be stored to: they come while the sums are made. A tile's stores come all at once,
// and where each waits for its line, the next tile waits for them.
template <int M, int V>
FASTBLOCKS_INLINE void fetch_for_writing(const float* out, int64_t stride) {
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
#if defined(__AVX2__)  // some older cores take the instruction for an error; compilers make a read of it unless told otherwise
      __asm__ volatile("prefetchw %0" : : "m"(out[v * kLanes]));
#else
      __builtin_prefetch(out + v * kLanes, 1);
#endif
    }
    out += stride, hide(out);
  }
}

// With so few pixels a tile passes too fast for that: it fetches its own weights, this many floats before it needs them.
constexpr int kFewPixels = 2;
constexpr int64_t kFetchDistance = 1024;
// With more pixels than this, waiting for a panel once is no matter.
constexpr int64_t kFetchPixels = 400;

// Some tiles of one panel. All pointers are those of the panel's first channel; a call moves them on.
struct TileRun {
  Pixels a;
  const float* w;
  const float* scale;  // null: the weights have it in them, sums begin at the shift
  const float* shift;
  const float* residual;  // or null
  int64_t residual_stride;
  Destination to;
  Clamp clamp;
  int valid;  // channels to store
  int used;   // of these, channels that are not padding
  Ahead ahead;
};

// What tells the plain variants of a tile apart. Between two tiles of them stand a dozen instructions; asking makes them a
// hundred, a quarter of the time of a 16-deep sum.
enum class Finish { kFolded, kFoldedRuns, kScaled, kResidual };
constexpr int kFinishes = 4;

// One step of the depth for M pixels. One pointer serves three pixels through [base + stride] and [base + 2 * stride]: pointers
// to 14 pixels would not fit the integer registers.
template <int M, int V>
FASTBLOCKS_INLINE void tile_step(Vec (&sum)[M][V], const float* const (&a)[(M + 2) / 3], int64_t a_stride, int64_t k,
                                 const float* w) {
  Vec b[V];
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) b[v] = load(w + v * kLanes);
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
    const Vec x = broadcast(a[m / 3][(m % 3) * a_stride + k]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) add_product(sum[m][v], x, b[v]);
  }
}

// One run, four steps at a time and the rest one by one. Returns where the next run's weights begin.
template <int M, int V>
FASTBLOCKS_INLINE const float* tile_sum(Vec (&sum)[M][V], const float* first, int64_t a_stride, const float* w,
                                        int64_t run_length, Fetching& fetching) {
  const float* a[(M + 2) / 3];
#pragma GCC unroll 32
  for (int i = 0; i < (M + 2) / 3; ++i) a[i] = first + 3 * i * a_stride;
  const auto steps = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      if (M <= kFewPixels) __builtin_prefetch(w + u * V * kLanes + kFetchDistance);
      tile_step<M, V>(sum, a, a_stride, u, w + u * V * kLanes);
    }
#pragma GCC unroll 32
    for (int i = 0; i < (M + 2) / 3; ++i) a[i] += kCount;
    w += kCount * V * kLanes;
  };
  int64_t k = run_length;
  for (; k >= 4; k -= 4) {
    steps(Number<4>());
    if (V > 1 || fetching.step) fetching.after_four_steps();  // a single vector is limited by loads
  }
  for (; k > 0; --k) steps(Number<1>());
  return w;
}

template <int M, int V, Finish kFinish>
FASTBLOCKS_INLINE void tile_store(const Vec (&sum)[M][V], const TileRun& t, const float* residual, Walk& walk) {
  const Clamp* clamp = &t.clamp;
  hide(clamp);
  const Vec low = broadcast(clamp->low), high = broadcast(clamp->high);
  constexpr bool kAdded = kFinish == Finish::kResidual, kScaled = kAdded || kFinish == Finish::kScaled;
  const float *scale = t.scale, *shift = t.shift;
  hide(scale), hide(shift);
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
    float* const out = walk.next();
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      Vec y = sum[m][v];
      if (kScaled) y = y * load(scale + v * kLanes) + load(shift + v * kLanes);
      if (kAdded) y += load(residual + v * kLanes);
      store(out + v * kLanes, at_most(high, at_least(low, y)));
    }
    if (kAdded) residual += t.residual_stride, hide(residual);
  }
}

template <int M, int V, Finish kFinish>
inline void tile_run(TileRun& state, int64_t tiles) {
  const TileRun t = state;  // a copy that no store through a pointer can change: its members stay in registers
  constexpr bool kFolded = kFinish == Finish::kFolded || kFinish == Finish::kFoldedRuns;
  const int64_t a_stride = t.a.pixel_stride;
  const float* a = t.a.data;
  const float* residual = t.residual;
  Walk walk(t.to);
  Fetching fetching(state.ahead, t.a.run_count * (t.a.run_length / 4), t.w);
  for (; tiles > 0; --tiles) {
    fetching.begin_tile();
    if (t.to.far) fetch_for_writing<M, V>(walk.out, t.to.pixel_stride);
    Vec sum[M][V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const Vec start = kFolded ? load(t.shift + v * kLanes) : Vec{};
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m) sum[m][v] = start;
    }
    if (kFinish == Finish::kFolded && residual) {
      const float* at = residual;
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[m][v] += load(at + v * kLanes);
        at += t.residual_stride, hide(at);
      }
    }
    if (kFinish == Finish::kFoldedRuns) {
      const float* w = t.w;
      for (int64_t run = 0; run < t.a.run_count; ++run)
        w = tile_sum<M, V>(sum, a + t.a.run_offsets[run], a_stride, w, t.a.run_length, fetching);
    } else {
      tile_sum<M, V>(sum, a, a_stride, t.w, t.a.run_length, fetching);
    }
    tile_store<M, V, kFinish>(sum, t, residual, walk);
    a += M * a_stride;
    if (residual) residual += M * t.residual_stride;
  }
  state.a.data = a, state.residual = residual;
  walk.leave(&state.to);
}

// What a tile of any other kind begins with and ends in: `values` are its sums, pixel by pixel. Written once, not once a tile
// size: asking what is to be done takes more code than the sums.
template <int V>
__attribute__((noinline)) void begin_with_residual(const TileRun& t, const float* residual, int pixels, float* values) {
  const int lanes = t.valid - (V - 1) * kLanes;  // of the last vector
  for (int m = 0; m < pixels; ++m, residual += t.residual_stride, values += V * kLanes) {
    constexpr int kLast = (V - 1) * kLanes;
#pragma GCC unroll 3
    for (int n = 0; n < kLast; n += kLanes) store(values + n, load(t.shift + n) + load(residual + n));
    store(values + kLast, load(t.shift + kLast) + load_up_to(residual + kLast, lanes));
  }
}

template <int V>
__attribute__((noinline)) void finish_any(const TileRun& t, const float* values, int pixels, const float* residual,
                                          Walk& walk) {
  constexpr int kLast = (V - 1) * kLanes;
  const int lanes = t.valid - kLast;  // of the last vector
  const Vec low = broadcast(t.clamp.low), high = broadcast(t.clamp.high);
  Vec scale[V], shift[V];
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    scale[v] = t.scale ? load(t.scale + v * kLanes) : broadcast(1.0f);
    shift[v] = t.scale ? load(t.shift + v * kLanes) : broadcast(-0.0f);  // what leaves every sum, and its sign, as it is
  }
  const bool added = t.scale && residual;
  for (int m = 0; m < pixels; ++m, values += V * kLanes) {
    float* const here = walk.next();
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      Vec y = load(values + v * kLanes) * scale[v] + shift[v];
      const float* at = residual + v * kLanes;
      if (added) y += v + 1 < V ? load(at) : load_up_to(at, lanes);
      y = at_most(high, at_least(low, y));
      if (v + 1 < V)
        store(here + v * kLanes, y);
      else
        store_up_to(here + v * kLanes, lanes, y);
    }
    if (added) residual += t.residual_stride;
  }
}

// Any finish, any number of channels.
template <int M, int V>
inline void tile_any(TileRun& state, int64_t tiles) {
  const TileRun t = state;
  const int64_t a_stride = t.a.pixel_stride, straight = 0;
  const int64_t* const runs = t.a.run_offsets ? t.a.run_offsets : &straight;
  const float *a = t.a.data, *residual = t.residual;
  Walk walk(t.to);
  Fetching fetching(state.ahead, t.a.run_count * (t.a.run_length / 4), t.w);
  alignas(64) float values[M * V * kLanes];
  for (; tiles > 0; --tiles) {
    fetching.begin_tile();
    if (t.to.far) fetch_for_writing<M, V>(walk.out, t.to.pixel_stride);
    Vec sum[M][V];
    if (!t.scale && residual) {
      begin_with_residual<V>(t, residual, M, values);
#pragma GCC unroll 64
      for (int i = 0; i < M * V; ++i) sum[i / V][i % V] = load(values + i * kLanes);
    } else {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        const Vec start = t.scale ? Vec{} : load(t.shift + v * kLanes);
#pragma GCC unroll 32
        for (int m = 0; m < M; ++m) sum[m][v] = start;
      }
    }
    const float* w = t.w;
    for (int64_t run = 0; run < t.a.run_count; ++run)
      w = tile_sum<M, V>(sum, a + runs[run], a_stride, w, t.a.run_length, fetching);
#pragma GCC unroll 64
    for (int i = 0; i < M * V; ++i) store(values + i * kLanes, sum[i / V][i % V]);
    finish_any<V>(t, values, M, residual, walk);
    a += M * a_stride;
    if (residual) residual += M * t.residual_stride;
  }
  state.a.data = a, state.residual = residual;
  walk.leave(&state.to);
}

typedef void (*TileFunction)(TileRun&, int64_t);

// The variants of one tile size.
struct TileFunctions {
  TileFunction by_finish[kFinishes], any;
};

// Tiles of less than half the most pixels are few, a map's remainder or a batch of vectors: they ask.
template <int M, int V, Finish kFinish>
constexpr TileFunction plain() {
  if constexpr (2 * M < max_tile_pixels(V))
    return tile_any<M, V>;
  else
    return tile_run<M, V, kFinish>;
}

template <int V>
struct Tiles;

#define FASTBLOCKS_TILE(V, M)                                                                           \
  {{plain<M, V, Finish::kFolded>(), plain<M, V, Finish::kFoldedRuns>(), plain<M, V, Finish::kScaled>(), \
    plain<M, V, Finish::kResidual>()},                                                                  \
   tile_any<M, V>}
#define FASTBLOCKS_TILES_4(V, M) \
  FASTBLOCKS_TILE(V, M + 1), FASTBLOCKS_TILE(V, M + 2), FASTBLOCKS_TILE(V, M + 3), FASTBLOCKS_TILE(V, M + 4)
template <>
struct Tiles<1> {
  static constexpr TileFunctions table[] = {FASTBLOCKS_TILES_4(1, 0), FASTBLOCKS_TILES_4(1, 4)};
};
template <>
struct Tiles<2> {
  static constexpr TileFunctions table[] = {FASTBLOCKS_TILES_4(2, 0), FASTBLOCKS_TILE(2, 5), FASTBLOCKS_TILE(2, 6),
#if FASTBLOCKS_VECTOR_BYTES == 64
                                            FASTBLOCKS_TILES_4(2, 6), FASTBLOCKS_TILES_4(2, 10)
#endif
  };
};
template <>
struct Tiles<3> {
  static constexpr TileFunctions table[] = {FASTBLOCKS_TILES_4(3, 0),
#if FASTBLOCKS_VECTOR_BYTES == 64
                                            FASTBLOCKS_TILES_4(3, 4), FASTBLOCKS_TILE(3, 9)
#endif
  };
};
#undef FASTBLOCKS_TILES_4
#undef FASTBLOCKS_TILE

FASTBLOCKS_INLINE const TileFunctions& tile_functions(int64_t pixels, int vectors) {
  if (vectors == 2) return Tiles<2>::table[pixels - 1];
  if (vectors == 3) return Tiles<3>::table[pixels - 1];
  return Tiles<1>::table[pixels - 1];
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
