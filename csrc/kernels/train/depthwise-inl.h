// Depthwise convolutions in training. An item is a band of rows of one image. Rows that are read more than once (the input
// through its BatchNorm, the gradient of the output) lie in rings that stay in cache.
#pragma once

#include <utility>

#include "../shuffle-inl.h"
#include "finish-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

constexpr int64_t kRingFloats = 96 * 1024;  // of rings and rows: L2 holds them, and a row's channels are read in one piece
constexpr int64_t kSumPixels = 56;

// Input row `y`, channels [first, first + channels), to the ring. Its rows have zeros at both sides, so that windows never
// leave them.
inline void read_row(const TrainDepthwise& p, int64_t image, int64_t y, int64_t first, int64_t channels, float* ring,
                     int64_t stride, float* pixel) {
  float* out = ring + (y % p.ring_rows * p.ring_width + p.padding[1]) * stride;
  const int64_t begin = (image * p.height + y) * p.width;
  if (p.shuffle == 1) {
    read_source(p.x, begin, p.width, first, channels, out, stride);
    return;
  }
  for (int64_t x = 0; x < p.width; ++x, out += stride) {
    read_source(p.x, begin + x, 1, 0, p.channels, pixel, padded(p.channels));
    interleave_streams<true>(pixel, p.channels / p.shuffle, p.shuffle, 0, p.channels, out);
  }
}

// Pixels 256 floats apart, or a multiple, would lie in few sets of the cache.
FASTBLOCKS_INLINE int64_t chunk_stride(const TrainDepthwise& p) {
  return round_up(p.chunk, kLanes) + (p.chunk % 256 == 0 ? kPadding : 0);
}

inline void train_depthwise_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const TrainDepthwise& p = *static_cast<const TrainDepthwise*>(params);
  Scratch scratch(memory);
  const int64_t stride = chunk_stride(p), all = padded(p.channels);
  float* ring = scratch.take<float>(p.ring_rows * p.ring_width * stride + kPadding);
  float* pixel = scratch.take<float>(2 * all);
  const float** rows = scratch.take<const float*>(p.kernel[0]);
  float* block = scratch.take<float>(p.stream ? (kSumPixels + p.out_width) * stride + kPadding : 0);
  Moments moments(p.channels, scratch);
  const bool square = p.kernel[0] == p.kernel[1];
  const DepthwiseFunction function = depthwise_for(square ? p.kernel[1] : 0, p.stride[1], p.dilation[1]);
  __builtin_memset(ring, 0, p.ring_rows * p.ring_width * stride * sizeof(float));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.bands, band = item % p.bands;
    const int64_t from = band * p.out_height / p.bands, to = (band + 1) * p.out_height / p.bands;
    for (int64_t c = 0; c < p.channels; c += p.chunk) {
      const int64_t channels = smaller(p.chunk, p.channels - c);
      int64_t next = larger(0, from * p.stride[0] - p.padding[0]), summed = from;
      for (int64_t oy = from; oy < to; ++oy) {
        const int64_t origin = oy * p.stride[0] - p.padding[0];
        for (next = larger(next, origin); next < smaller(p.height, origin + (p.kernel[0] - 1) * p.dilation[0] + 1); ++next)
          read_row(p, image, next, c, channels, ring, stride, pixel);
        find_rows(oy, p.stride[0], p.padding[0], p.dilation[0], p.kernel[0], p.height, rows,
                  [&](int64_t y) { return ring + y % p.ring_rows * p.ring_width * stride; });
        DepthwiseRows r;
        r.rows = rows, r.count = 1, r.kernel_height = p.kernel[0];
        r.width = p.ring_width, r.pixel_stride = stride;
        r.out_width = p.out_width, r.out_stride = p.stream ? stride : p.channels;
        r.kernel_width = p.kernel[1], r.stride = p.stride[1], r.padding = 0, r.dilation = p.dilation[1];
        r.weight = p.weight + c, r.weight_stride = all;
        r.shift = p.zeros;
        r.clamp = {-__builtin_inff(), __builtin_inff()};
        float* z = p.z + (image * p.out_height + summed) * p.out_width * p.channels + c;
        float* sum_rows = p.stream ? block : z;
        r.out = sum_rows + (oy - summed) * p.out_width * r.out_stride;
        r.channels = channels, r.pad_channels = false;
        function(r);
        // Rows are summed some at a time: a short one would not repay the sums' additions.
        const int64_t pixels = (oy + 1 - summed) * p.out_width;
        if (pixels < kSumPixels && oy + 1 < to) continue;
        if (p.stream)
          stream_moments(moments, block, pixels, stride, c, channels, summed == from, z, p.channels);
        else if (p.partials)
          add_moments(moments, z, pixels, p.channels, c, channels, summed == from);
        summed = oy + 1;
      }
    }
    if (p.stream) fence();
    if (p.partials) store_moments(moments, (to - from) * p.out_width, p.partials + item * (1 + 2 * all));
  }
}

// Bands, so that there are some items with few images too; and channels, so that the rings stay in L2.
FASTBLOCKS_INLINE void cut_depthwise(TrainDepthwise& p, int64_t rows, int64_t floats_a_channel) {
  p.bands = larger(1, smaller(rows / 4, divide_up(16, p.images)));
  p.items = p.images * p.bands;
  p.chunk = p.channels;
  if (p.shuffle == 1 && p.channels * floats_a_channel > kRingFloats) {
    const int64_t most = larger(64, kRingFloats / floats_a_channel / kPadding * kPadding);
    p.chunk = round_up(divide_up(p.channels, divide_up(p.channels, most)), kPadding);
  }
}

FASTBLOCKS_INLINE void size_ring(TrainDepthwise& p) {
  p.ring_rows = (p.kernel[0] - 1) * p.dilation[0] + 1;
  p.ring_width = larger(p.padding[1] + p.width, (p.out_width - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1);
}

inline void train_depthwise_prepare(void* params, TrainWork* work) {
  TrainDepthwise& p = *static_cast<TrainDepthwise*>(params);
  size_ring(p);
  cut_depthwise(p, p.out_height, p.ring_rows * p.ring_width);
  *work = {p.items, room<float>(p.ring_rows * p.ring_width * chunk_stride(p) + kPadding) + room<float>(2 * padded(p.channels)) +
                        room<float*>(p.kernel[0]) +
                        room<float>(p.stream ? (kSumPixels + p.out_width) * chunk_stride(p) + kPadding : 0) +
                        Moments::bytes(p.channels)};
}

// ---------------------------------------------------------------------------------------------------- backward

// sums[ky][kx] += sum over one output row of dy * x, for a vector of channels. Rows outside the map are zeros.
struct TapSums {
  const float* const* rows;
  int64_t x_stride, out_width, dy_stride;
  int64_t kernel[2], stride, dilation;
  const float* dy;
  float* sums;  // [ky][kx][sums_stride]
  int64_t sums_stride, channels;
};

// All taps of K x K in registers: 3x3 has nine independent sums, more than an FMA's latency needs.
template <int K>
FASTBLOCKS_INLINE void tap_sums_square(const TapSums& t, int64_t c) {
  Vec sum[K][K] = {};
  const float* dy = t.dy + c;
  const float* x[K];
#pragma GCC unroll 8
  for (int ky = 0; ky < K; ++ky) x[ky] = t.rows[ky] + c;
  const int64_t step = t.stride * t.x_stride;
  for (int64_t ox = 0; ox < t.out_width; ++ox, dy += t.dy_stride) {
    const Vec d = load(dy);
#pragma GCC unroll 8
    for (int ky = 0; ky < K; ++ky) {
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) sum[ky][kx] += d * load(x[ky] + kx * t.x_stride);
      x[ky] += step;
    }
  }
#pragma GCC unroll 8
  for (int ky = 0; ky < K; ++ky)
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      float* to = t.sums + (ky * K + kx) * t.sums_stride + c;
      store(to, load(to) + sum[ky][kx]);
    }
}

inline void tap_sums(const TapSums& t) {
  for (int64_t c = 0; c < t.channels; c += kLanes) {
    if (t.kernel[0] == 3 && t.kernel[1] == 3 && t.dilation == 1) {
      tap_sums_square<3>(t, c);
      continue;
    }
    for (int64_t ky = 0; ky < t.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < t.kernel[1]; ++kx) {
        const float *dy = t.dy + c, *x = t.rows[ky] + kx * t.dilation * t.x_stride + c;
        Vec sum{};
        for (int64_t ox = 0; ox < t.out_width; ++ox, dy += t.dy_stride, x += t.stride * t.x_stride) sum += load(dy) * load(x);
        float* out = t.sums + (ky * t.kernel[1] + kx) * t.sums_stride + c;
        store(out, load(out) + sum);
      }
  }
}

// out[pixel] (+)= sum over T taps of at[tap][pixel] * w[tap], for whole vectors of channels: `step` and `out_step` are from one
// pixel to the next.
template <int T>
inline void gradient_taps(const float* const* at, const float* const* w, int64_t step, int64_t pixels, int64_t channels,
                          bool add, float* out, int64_t out_step) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const float* from[T];
    Vec weight[T];
#pragma GCC unroll 9
    for (int t = 0; t < T; ++t) from[t] = at[t] + c, weight[t] = load(w[t] + c);
    float* to = out + c;
    for (int64_t j = 0, i = 0; j < pixels; ++j, i += step, to += out_step) {
      Vec sum = load(from[0] + i) * weight[0];
#pragma GCC unroll 9
      for (int t = 1; t < T; ++t) sum += load(from[t] + i) * weight[t];
      store(to, add ? load(to) + sum : sum);
    }
  }
}

typedef void (*GradientTaps)(const float* const*, const float* const*, int64_t, int64_t, int64_t, bool, float*, int64_t);

constexpr int kTapsAtOnce = 9;

FASTBLOCKS_INLINE GradientTaps gradient_taps_of(int64_t taps) {
  switch (taps) {
    case 1: return gradient_taps<1>;
    case 2: return gradient_taps<2>;
    case 3: return gradient_taps<3>;
    case 4: return gradient_taps<4>;
    case 5: return gradient_taps<5>;
    case 6: return gradient_taps<6>;
    case 7: return gradient_taps<7>;
    case 8: return gradient_taps<8>;
    default: return gradient_taps<kTapsAtOnce>;
  }
}

// One row of the input's gradient at any stride: rows[i] is the dy row of kernel row ky[i], from its first column on. Columns
// that lie a stride apart meet the same taps, and their dy lie side by side; beyond the rows' ends are zeros. Whole vectors.
inline void input_gradient_row(const DepthwiseGrad& p, const float* const* rows, const int64_t* ky, int64_t count,
                               int64_t stride, const float* weight, int64_t channels, float* out) {
  const TrainDepthwise& s = p.conv;
  const int64_t all = padded(s.channels), step = s.stride[1];
  for (int64_t x = 0; x < smaller(step, s.width); ++x) {
    const float* at[kMaxTaps];
    const float* w[kMaxTaps];
    int64_t taps = 0;
    for (int64_t kx = 0; kx < s.kernel[1]; ++kx) {
      const int64_t column = x + s.padding[1] - kx * s.dilation[1];
      if (column % step) continue;
      for (int64_t i = 0; i < count; ++i, ++taps) {
        at[taps] = rows[i] + column / step * stride;
        w[taps] = weight + (ky[i] * s.kernel[1] + kx) * all;
      }
    }
    const int64_t pixels = (s.width - x + step - 1) / step;
    for (int64_t i = 0; taps == 0 && i < pixels; ++i)
      __builtin_memset(out + (x + i * step) * stride, 0, round_up(channels, kLanes) * sizeof(float));
    for (int64_t t = 0; t < taps; t += kTapsAtOnce)
      gradient_taps_of(smaller(kTapsAtOnce, taps - t))(at + t, w + t, stride, pixels, channels, t > 0, out + x * stride,
                                                       step * stride);
  }
}

struct DepthwiseGradScratch {
  float *x_ring, *dy_ring, *row, *pixel, *sums, *zeros;
  const float** rows;
  int64_t* kernel_rows;
};

// Writes row `y` of the input's gradient to `out`, in the order of the map's channels. The dy rows that it needs are in the
// ring.
inline void depthwise_grad_row(const DepthwiseGrad& p, const DepthwiseGradScratch& s, int64_t y, int64_t c, int64_t channels,
                               DepthwiseFunction function, float* out) {
  const TrainDepthwise& q = p.conv;
  const int64_t stride = chunk_stride(q), all = padded(q.channels), ring = p.dy_ring_width * stride;
  float* to = q.shuffle == 1 ? out : s.pixel;
  if (function) {  // stride 1: a convolution with the flipped taps
    find_rows(y, 1, q.dilation[0] * (q.kernel[0] - 1) - q.padding[0], q.dilation[0], q.kernel[0], q.out_height, s.rows,
              [&](int64_t row) { return s.dy_ring + row % p.dy_ring_rows * ring; });
    DepthwiseRows r;
    r.rows = s.rows, r.count = 1, r.kernel_height = q.kernel[0];
    r.width = p.dy_ring_width, r.pixel_stride = stride;
    r.out_width = q.width, r.out_stride = stride;
    r.kernel_width = q.kernel[1], r.stride = 1, r.padding = 0, r.dilation = q.dilation[1];
    r.weight = p.weight + c, r.weight_stride = all;
    r.shift = q.zeros;
    r.clamp = {-__builtin_inff(), __builtin_inff()};
    r.out = to, r.channels = round_up(channels, kLanes), r.pad_channels = true;
    function(r);
  } else {
    int64_t count = 0;
    for (int64_t ky = 0; ky < q.kernel[0]; ++ky) {
      const int64_t row = y + q.padding[0] - ky * q.dilation[0];
      if (row < 0 || row % q.stride[0] || row / q.stride[0] >= q.out_height) continue;
      s.rows[count] = s.dy_ring + row / q.stride[0] % p.dy_ring_rows * ring + p.dy_padding * stride;
      s.kernel_rows[count++] = ky;
    }
    input_gradient_row(p, s.rows, s.kernel_rows, count, stride, p.weight + c, channels, to);
  }
  if (q.shuffle != 1)
    for (int64_t x = 0; x < q.width; ++x)
      interleave_streams<true>(to + x * stride, q.shuffle, q.channels / q.shuffle, 0, q.channels, out + x * stride);
}

// Rows of the input's gradient that wait to be finished: some at a time, since the sums of one short row cost as much as
// itself.
struct GradRows {
  int64_t first, count;
};

inline void finish_rows(const DepthwiseGrad& p, const DepthwiseGradScratch& s, int64_t image, GradRows& rows, int64_t c,
                        int64_t channels, Sums& sums) {
  const TrainDepthwise& q = p.conv;
  const int64_t stride = chunk_stride(q), pixel = (image * q.height + rows.first) * q.width, pixels = rows.count * q.width;
  if (p.addend)
    for (int64_t x = 0; x < pixels; ++x)
      for_channels(channels, [&](int64_t i, auto lanes) {
        float* to = s.row + x * stride + i;
        store(to, load(to) + load_some(p.addend + (pixel + x) * p.addend_stride + c + i, lanes));
      });
  finish(p.finish, s.row, stride, p.dx + pixel * p.dx_stride + c, p.dx_stride, pixel, pixels, c, channels, sums);
  rows = {rows.first + rows.count, 0};
}

// A band of the gradient's rows [begin, end), with the dy rows [dy_begin, dy_end) whose share of the weight's gradient it sums.
struct GradBand {
  int64_t begin, end, dy_begin, dy_end;
};

FASTBLOCKS_INLINE GradBand grad_band(const DepthwiseGrad& p, int64_t band) {
  const TrainDepthwise& q = p.conv;
  return {band * q.height / q.bands, (band + 1) * q.height / q.bands, band * q.out_height / q.bands,
          (band + 1) * q.out_height / q.bands};
}

inline void depthwise_grad_run(const void* params, int64_t begin, int64_t end, char* memory) noexcept {
  const DepthwiseGrad& p = *static_cast<const DepthwiseGrad*>(params);
  const TrainDepthwise& q = p.conv;
  Scratch scratch(memory);
  const int64_t stride = chunk_stride(q), all = padded(q.channels), taps = q.kernel[0] * q.kernel[1];
  DepthwiseGradScratch s;
  s.x_ring = scratch.take<float>(q.ring_rows * q.ring_width * stride + kPadding);
  s.dy_ring = scratch.take<float>(p.dy_ring_rows * p.dy_ring_width * stride + kPadding);
  s.row = scratch.take<float>((kSumPixels + q.width) * stride + kPadding);
  s.pixel = scratch.take<float>((q.shuffle == 1 ? 0 : q.width) * stride + 2 * all);
  s.zeros = scratch.take<float>(q.ring_width * stride + kPadding);
  s.sums = scratch.take<float>(taps * all);
  s.rows = scratch.take<const float*>(q.kernel[0]);
  s.kernel_rows = scratch.take<int64_t>(q.kernel[0]);
  Sums sums(q.channels, scratch);
  const DepthwiseFunction function =
      flips(q) ? depthwise_for(q.kernel[0] == q.kernel[1] ? q.kernel[1] : 0, 1, q.dilation[1]) : nullptr;
  const int64_t reach = (q.kernel[0] - 1) * q.dilation[0];
  __builtin_memset(s.x_ring, 0, q.ring_rows * q.ring_width * stride * sizeof(float));
  __builtin_memset(s.dy_ring, 0, p.dy_ring_rows * p.dy_ring_width * stride * sizeof(float));
  __builtin_memset(s.zeros, 0, q.ring_width * stride * sizeof(float));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / q.bands;
    const GradBand band = grad_band(p, item % q.bands);
    if (p.finish.partials) sums.clear(q.channels);
    for (int64_t i = 0; i < taps * all; ++i) s.sums[i] = 0.0f;
    for (int64_t c = 0; c < q.channels; c += q.chunk) {
      const int64_t channels = smaller(q.chunk, q.channels - c);
      // The dy rows that reach into the band, or whose weights' share is the band's.
      const int64_t first_reached = divide_up(larger(0, band.begin + q.padding[0] - reach), q.stride[0]);
      const int64_t last_reached = smaller(q.out_height, (band.end - 1 + q.padding[0]) / q.stride[0] + 1);
      const int64_t from = p.weight ? smaller(first_reached, band.dy_begin) : band.dy_begin;
      const int64_t to = p.weight ? larger(last_reached, band.dy_end) : band.dy_end;
      int64_t next = larger(0, band.dy_begin * q.stride[0] - q.padding[0]), y = band.begin;
      GradRows waiting = {y, 0};
      const auto add_row = [&] {
        depthwise_grad_row(p, s, y++, c, channels, function, s.row + waiting.count * q.width * stride);
        ++waiting.count;
        if (waiting.count * q.width >= kSumPixels || y == band.end) finish_rows(p, s, image, waiting, c, channels, sums);
      };
      for (int64_t oy = from; oy < to; ++oy) {
        float* dy = s.dy_ring + (oy % p.dy_ring_rows * p.dy_ring_width + p.dy_padding) * stride;
        read_gradient(p.dy, (image * q.out_height + oy) * q.out_width, q.out_width, q.channels, c, channels, dy, stride);
        if (p.weight_partials && oy >= band.dy_begin && oy < band.dy_end) {
          TapSums t;
          const int64_t origin = oy * q.stride[0] - q.padding[0];
          for (next = larger(next, origin); next < smaller(q.height, origin + reach + 1); ++next)
            read_row(q, image, next, c, channels, s.x_ring, stride, s.pixel);
          for (int64_t ky = 0; ky < q.kernel[0]; ++ky) {
            const int64_t row = origin + ky * q.dilation[0];
            s.rows[ky] = row < 0 || row >= q.height ? s.zeros : s.x_ring + row % q.ring_rows * q.ring_width * stride;
          }
          t.rows = s.rows;
          t.x_stride = stride, t.out_width = q.out_width, t.dy_stride = stride;
          t.kernel[0] = q.kernel[0], t.kernel[1] = q.kernel[1], t.stride = q.stride[1], t.dilation = q.dilation[1];
          t.dy = dy, t.sums = s.sums + c, t.sums_stride = all, t.channels = channels;
          tap_sums(t);
        }
        if (!p.weight) continue;
        // Row y is complete when the last dy row that it reaches is here.
        while (y < band.end && smaller((y + q.padding[0]) / q.stride[0], q.out_height - 1) <= oy) add_row();
      }
      // No dy row reaches these: their gradient is zero.
      while (p.weight && y < band.end) add_row();
    }
    if (p.finish.stream) fence();
    if (p.finish.partials) sums.write(q.channels, p.finish.partials + item * 2 * all);
    if (p.weight_partials) __builtin_memcpy(p.weight_partials + item * taps * all, s.sums, taps * all * sizeof(float));
  }
}

inline void depthwise_grad_prepare(void* params, TrainWork* work) {
  DepthwiseGrad& p = *static_cast<DepthwiseGrad*>(params);
  TrainDepthwise& q = p.conv;
  size_ring(q);
  const int64_t reach = (q.kernel[1] - 1) * q.dilation[1];
  p.dy_ring_rows = q.ring_rows + 1;
  // Zeros at both sides of each dy row, as far as columns of the input look for it.
  const int64_t before = divide_up(larger(0, reach - q.padding[1]), q.stride[1]);
  p.dy_padding = flips(q) ? reach - q.padding[1] : before;
  p.dy_ring_width = flips(q) ? q.width + reach : before + larger(q.out_width, (q.width - 1 + q.padding[1]) / q.stride[1] + 1);
  cut_depthwise(q, smaller(q.height, q.out_height), q.ring_rows * q.ring_width + p.dy_ring_rows * p.dy_ring_width + q.width);
  p.items = q.items;
  const int64_t stride = chunk_stride(q), all = padded(q.channels);
  *work = {p.items, room<float>(q.ring_rows * q.ring_width * stride + kPadding) +
                        room<float>(p.dy_ring_rows * p.dy_ring_width * stride + kPadding) +
                        room<float>((kSumPixels + q.width) * stride + kPadding) +
                        room<float>((q.shuffle == 1 ? 0 : q.width) * stride + 2 * all) +
                        room<float>(q.ring_width * stride + kPadding) + room<float>(q.kernel[0] * q.kernel[1] * all) +
                        room<float*>(q.kernel[0]) + room<int64_t>(q.kernel[0]) + Sums::bytes(q.channels)};
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
