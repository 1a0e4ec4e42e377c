// What the training kernels share: reading through a BatchNorm, statistics, cutting into items.
#pragma once

#include "../depthwise_row-inl.h"
#include "../panels-inl.h"
#include "params.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

// Compiled with the inference kernels.
void product(const Pixels& a, int64_t pixels, int64_t channels, const float* weight, const float* zeros, const float* residual,
             int64_t residual_stride, float* out, int64_t out_stride, const Range& soon);
DepthwiseFunction depthwise_for(int64_t kernel, int64_t stride, int64_t dilation);

FASTBLOCKS_INLINE int64_t padded(int64_t channels) { return round_up(channels, kPadding); }
FASTBLOCKS_INLINE Vec load_some(const float* p, int lanes) { return lanes == kLanes ? load(p) : load_partial(p, lanes); }
FASTBLOCKS_INLINE void store_some(float* p, int lanes, Vec v) {
  if (lanes == kLanes)
    store(p, v);
  else
    store_partial(p, lanes, v);
}

// Calls f(channel, lanes) for the vectors of `channels` channels.
template <class F>
FASTBLOCKS_INLINE void for_channels(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, Number<kLanes>());
  if (c < channels) f(c, (int)(channels - c));
}

// Calls f(channel, vectors, lanes) with four vectors at a time, then two, one and a part of one.
template <class F>
FASTBLOCKS_INLINE void for_vectors(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) f(c, Number<4>(), Number<kLanes>());
  if (c + 2 * kLanes <= channels) f(c, Number<2>(), Number<kLanes>()), c += 2 * kLanes;
  for (; c + kLanes <= channels; c += kLanes) f(c, Number<1>(), Number<kLanes>());
  if (c < channels) f(c, Number<1>(), (int)(channels - c));
}

// Rows of panels are an odd number of cache lines apart: a power of two would put a column of them into a few cache sets. There
// is room for whole vectors behind each row.
FASTBLOCKS_INLINE int64_t panel_row(int64_t channels) {
  return (round_up(channels + kPadding, kPadding) / kPadding | 1) * kPadding;
}

// Memory of one worker, handed out piece by piece.
struct Scratch {
  char* at;
  explicit Scratch(char* memory) : at(memory) {}
  template <class T>
  T* take(int64_t count) {
    char* here = at;
    at += round_up(count * (int64_t)sizeof(T), 64) + 64;
    return reinterpret_cast<T*>(here);
  }
};

template <class T>
FASTBLOCKS_INLINE size_t room(int64_t count) {
  return round_up(count * (int64_t)sizeof(T), 64) + 64;
}

// ---------------------------------------------------------------------------------------------------- reading

FASTBLOCKS_INLINE Vec normalised(Vec z, const Norm& n, int64_t c) {
  return (z - load(n.mean + c)) * load(n.scale + c) + load(n.shift + c);
}

FASTBLOCKS_INLINE Vec clamped(Vec v, Vec low, Vec high) { return at_most(high, at_least(low, v)); }

// Channels of a few vectors are read some vectors at a time, whose constants stay in registers.
FASTBLOCKS_INLINE bool is_narrow(int64_t channels) { return channels <= 4 * kLanes; }

// Of rows of which much is left out the hardware fetches none ahead.
FASTBLOCKS_INLINE int64_t floats_ahead(int64_t channels, int64_t stride) { return 2 * channels <= stride ? 24 * stride : 0; }

FASTBLOCKS_INLINE void fetch_row(const float* row, int64_t channels, int64_t ahead) {
  if (!ahead) return;
  for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(row + ahead + c);
}

inline void read_narrow(const Source& s, const Norm& n, const float* from, int64_t pixels, int64_t channels, float* to,
                        int64_t stride) {
  const Vec low = broadcast(s.clamp.low), high = broadcast(s.clamp.high);
  const int64_t ahead = floats_ahead(channels, s.stride);
  for_vectors(channels, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    Vec mean[V], scale[V], shift[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const int64_t at = c + i * kLanes;
      mean[i] = load(n.mean + at), scale[i] = load(n.scale + at), shift[i] = load(n.shift + at);
    }
    const float* z = from + c;
    float* out = to + c;
    for (int64_t m = 0; m < pixels; ++m, z += s.stride, out += stride) {
      fetch_row(z, V * kLanes, ahead);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i)
        store(out + i * kLanes, clamped((load_some(z + i * kLanes, lanes) - mean[i]) * scale[i] + shift[i], low, high));
    }
  });
}

// Channels [first, first + channels) of `pixels` pixels from `pixel` on, to rows of `stride` floats. Stores whole vectors.
inline void read_source(const Source& s, int64_t pixel, int64_t pixels, int64_t first, int64_t channels, float* out,
                        int64_t stride) {
  const Vec low = broadcast(s.clamp.low), high = broadcast(s.clamp.high);
  const float* z = s.data + pixel * s.stride + first;
  const int64_t ahead = floats_ahead(channels, s.stride);
  if (!s.norm.mean) {
    for (int64_t m = 0; m < pixels; ++m, z += s.stride, out += stride) {
      fetch_row(z, channels, ahead);
      for_channels(channels, [&](int64_t c, auto lanes) { store(out + c, clamped(load_some(z + c, lanes), low, high)); });
    }
    return;
  }
  const Norm n = {s.norm.mean + first, s.norm.scale + first, s.norm.shift + first, nullptr};
  if (s.addend) {
    const float* addend = s.addend + pixel * s.addend_stride + first;
    for (int64_t m = 0; m < pixels; ++m, z += s.stride, addend += s.addend_stride, out += stride)
      for_channels(channels, [&](int64_t c, auto lanes) {
        store(out + c, clamped(normalised(load_some(z + c, lanes), n, c) + load_some(addend + c, lanes), low, high));
      });
    return;
  }
  if (is_narrow(channels)) return read_narrow(s, n, z, pixels, channels, out, stride);
  for (int64_t m = 0; m < pixels; ++m, z += s.stride, out += stride) {
    fetch_row(z, channels, ahead);
    for_channels(channels,
                 [&](int64_t c, auto lanes) { store(out + c, clamped(normalised(load_some(z + c, lanes), n, c), low, high)); });
  }
}

// All channels of some pixels of several values, side by side.
inline void read_pieces(const SourcePiece* pieces, int64_t count, int64_t pixel, int64_t pixels, float* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const Source& s = pieces[i].source;
    read_source(s, pixel, pixels, 0, pieces[i].channels, out, stride);
    out += pieces[i].channels;
  }
}

// The gradient of z, the same way, from channel `first` of g and z on; `g` and `z` are those of its first pixel.
inline void read_gradient_from(const float* g, int64_t g_stride, const float* z, int64_t z_stride, const Gradient& d,
                               int64_t pixels, int64_t first, int64_t channels, float* out, int64_t stride) {
  if (!d.scale) {
    for (int64_t m = 0; m < pixels; ++m, g += g_stride, out += stride)
      for_channels(channels, [&](int64_t c, auto lanes) { store(out + c, load_some(g + c, lanes)); });
    return;
  }
  const float *mean = d.mean + first, *scale = d.scale + first, *slope = d.slope + first, *offset = d.offset + first;
  if (is_narrow(channels)) {
    for_vectors(channels, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
      constexpr int V = decltype(vectors)::value;
      Vec centre[V], factor[V], slopes[V], offsets[V];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const int64_t at = c + i * kLanes;
        centre[i] = load(mean + at), factor[i] = load(scale + at), slopes[i] = load(slope + at), offsets[i] = load(offset + at);
      }
      const float *gradient = g + c, *value = z + c;
      float* to = out + c;
      for (int64_t m = 0; m < pixels; ++m, gradient += g_stride, value += z_stride, to += stride)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          const Vec centred = load_some(value + i * kLanes, lanes) - centre[i];
          store(to + i * kLanes, load_some(gradient + i * kLanes, lanes) * factor[i] + (centred * slopes[i] + offsets[i]));
        }
    });
    return;
  }
  const auto add = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    const Vec centred = load_some(z + c, lanes) - load(mean + c);
    store(out + c, load_some(g + c, lanes) * load(scale + c) + (centred * load(slope + c) + load(offset + c)));
  };
  for (int64_t m = 0; m < pixels; ++m, g += g_stride, z += z_stride, out += stride) for_channels(channels, add);
}

inline void read_gradient(const Gradient& d, int64_t pixel, int64_t pixels, int64_t all_channels, int64_t first,
                          int64_t channels, float* out, int64_t stride) {
  read_gradient_from(d.g + pixel * d.stride + first, d.stride, d.z + pixel * all_channels + first, all_channels, d, pixels,
                     first, channels, out, stride);
}

// All channels, which may lie in planes.
inline void read_whole_gradient(const Gradient& d, int64_t pixel, int64_t pixels, int64_t channels, float* out,
                                int64_t stride) {
  if (d.planes.count == 0) return read_gradient(d, pixel, pixels, channels, 0, channels, out, stride);
  for (int64_t i = 0; i < d.planes.count; ++i) {
    const Plane& plane = d.planes.data[i];
    const int64_t at = plane.first * d.planes.pixels + pixel * plane.channels;
    read_gradient_from(d.g + at, plane.channels, d.z + at, plane.channels, d, pixels, plane.first, plane.channels,
                       out + plane.first, stride);
  }
}

// Whole rows of `stride` floats, to planes.
inline void write_planes(const Planes& planes, const float* rows, int64_t stride, int64_t pixel, int64_t pixels, float* out) {
  for (int64_t i = 0; i < planes.count; ++i) {
    const Plane& plane = planes.data[i];
    float* to = out + plane.first * planes.pixels + pixel * plane.channels;
    const float* row = rows + plane.first;
    for (int64_t m = 0; m < pixels; ++m, row += stride, to += plane.channels)
      for_channels(plane.channels, [&](int64_t c, auto lanes) { store_some(to + c, lanes, load_some(row + c, lanes)); });
  }
}

// ---------------------------------------------------------------------------------------------------- statistics

// Mean and variance of an item, block by block. Values are summed around the mean of the item's first pixels, so that nothing
// cancels: that mean is at most sqrt(pixels / kFirst) standard deviations off.
struct Moments {
  int64_t channels;
  float* centre;          // padded
  double *sum, *squares;  // padded
  int64_t count;

  static size_t bytes(int64_t channels) { return room<float>(padded(channels)) + 2 * room<double>(padded(channels)); }
  Moments(int64_t c, Scratch& scratch)
      : channels(c),
        centre(scratch.take<float>(padded(c))),
        sum(scratch.take<double>(padded(c))),
        squares(scratch.take<double>(padded(c))),
        count(0) {}
};

constexpr int64_t kFirstPixels = 16;

typedef double Doubles __attribute__((vector_size(2 * FASTBLOCKS_VECTOR_BYTES)));
typedef double DoublesInMemory __attribute__((vector_size(2 * FASTBLOCKS_VECTOR_BYTES), aligned(8), may_alias));

// Adds whole vectors: `to` is padded, and lanes without a channel are never read.
FASTBLOCKS_INLINE void add_lanes(double* to, Vec v) {
  *reinterpret_cast<DoublesInMemory*>(to) += __builtin_convertvector(v, Doubles);
}

// V vectors of channels at once: the sums of one alone would wait for each other.
template <int V>
FASTBLOCKS_INLINE void add_moments_of(Moments& m, const float* z, int64_t pixels, int64_t stride, int64_t c, int lanes,
                                      bool begins, float* copy, int64_t copy_stride) {
  if (begins) {
    const int64_t n = smaller(pixels, kFirstPixels);
    for (int v = 0; v < V; ++v) {
      Vec total{};
      for (int64_t i = 0; i < n; ++i) total += load_some(z + i * stride + v * kLanes, lanes);
      store(m.centre + c + v * kLanes, total / broadcast((float)n));
    }
    for (int i = 0; i < V * kLanes; ++i) m.sum[c + i] = m.squares[c + i] = 0.0;
  }
  Vec centre[V], sum[V] = {}, squares[V] = {};
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) centre[v] = load(m.centre + c + v * kLanes);
  for (int64_t i = 0; i < pixels; ++i, z += stride)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec value = load_some(z + v * kLanes, lanes), d = value - centre[v];
      sum[v] += d;
      squares[v] += d * d;
      if (copy) stream(copy + i * copy_stride + v * kLanes, value);
    }
  for (int v = 0; v < V; ++v) {
    add_lanes(m.sum + c + v * kLanes, sum[v]);
    add_lanes(m.squares + c + v * kLanes, squares[v]);
  }
}

// Channels [first, first + channels) of some pixels, whose first is `z`; `begins`: they are the first of the item.
inline void add_moments(Moments& m, const float* z, int64_t pixels, int64_t stride, int64_t first, int64_t channels,
                        bool begins) {
  for_vectors(channels, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
    add_moments_of<decltype(vectors)::value>(m, z + c, pixels, stride, first + c, lanes, begins, nullptr, 0);
  });
}

// The same, streaming the pixels to `copy` on the way: whole vectors, aligned.
inline void stream_moments(Moments& m, const float* z, int64_t pixels, int64_t stride, int64_t first, int64_t channels,
                           bool begins, float* copy, int64_t copy_stride) {
  for_vectors(channels, [&](int64_t c, auto vectors, auto lanes) __attribute__((always_inline)) {
    add_moments_of<decltype(vectors)::value>(m, z + c, pixels, stride, first + c, lanes, begins, copy + c, copy_stride);
  });
}

inline void store_moments(const Moments& m, int64_t count, double* out) {
  const int64_t p = padded(m.channels);
  out[0] = (double)count;
  for (int64_t c = 0; c < m.channels; ++c) {
    out[1 + c] = (double)m.centre[c] + m.sum[c] / (double)count;
    out[1 + p + c] = m.squares[c] - m.sum[c] * m.sum[c] / (double)count;
  }
}

// Cuts `pixels` into items of about `wanted` pixels, at most `most` items.
FASTBLOCKS_INLINE void cut_pixels(int64_t pixels, int64_t wanted, int64_t most, int64_t* items, int64_t* item_pixels) {
  // A multiple of what threads may share evenly.
  int64_t count = divide_up(pixels, larger(wanted, 1));
  if (count > 2) count = round_up(count, 8);
  count = larger(1, smaller(most, count));
  *item_pixels = larger(1, divide_up(pixels, count));
  *items = divide_up(pixels, *item_pixels);
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
