// What the training kernels are told. As in inference: plain structs of pointers and sizes; activations are
// [pixel][channel], all pixels of all images evenly spaced.
//
// A convolution writes its output z as it is. BatchNorm and activation are applied where z is read (`Source`), and their
// derivative where the gradient of what was read is written (`Finish`): no activated tensor is stored.
//
// Sums over pixels (statistics, gradients of weights) are made an item, and merged in item order. How a shape is cut into items
// depends on the shape alone, so results are the same at any number of threads.
#pragma once

#include "../params.h"

namespace fastblocks {

// Vectors of channels are padded to this many floats, at any instruction set level.
constexpr int64_t kPadding = 16;
constexpr int64_t kMaxTaps = 121;

// The BatchNorm of one call: bn(z) = (z - mean) * scale + shift. Padded to kPadding, with zeros. In training `shift` also makes
// up for what is lost when the mean is rounded to a float.
struct Norm {
  float *mean, *scale, *shift, *inverse;  // inverse = 1 / sqrt(variance + eps)
};

// What a kernel reads: clamp(bn(z)), or z itself where there is no mean; with an addend clamp(bn(z) + addend).
struct Source {
  const float* data;
  int64_t stride;
  Norm norm;
  Clamp clamp;
  const float* addend;  // or null
  int64_t addend_stride;
};

// Some channels of a value. What a kernel reads of several values lies side by side, piece after piece.
struct SourcePiece {
  Source source;
  int64_t channels;
};

// A value whose channels are read some here, some there lies in planes, one behind the other: [pixel][channel] for each range
// of channels that is read together. So each is read in one piece, and whole cache lines are used.
struct Plane {
  int64_t first, channels;
};

struct Planes {
  const Plane* data;
  int64_t count;   // 0: all channels in one
  int64_t pixels;  // of the value
};

// The gradient of a convolution's output z: scale * g + slope * (z - mean) + offset, or g itself where there is no scale.
struct Gradient {
  const float* g;
  int64_t stride;
  const float* z;  // dense
  const float *mean, *scale, *slope, *offset;
  Planes planes;  // of g and z
};

enum class Mask { kNone, kNorm, kOutput, kSum };

// What is done with a gradient as it is written: it is masked by the activation of what it is the gradient of, and summed for
// the BatchNorm's own gradient.
struct Finish {
  Mask mask;       // where what lies within the clamp? kNorm: bn(z), kOutput: y, kSum: bn(z) + y
  const float* z;  // null: no sums
  int64_t z_stride;
  Norm norm;
  Clamp clamp;
  const float* y;
  int64_t y_stride;
  double* partials;  // [item][2][padded]: sums of g and of g * (z - mean)
  bool stream;       // what is written is too large for the caches
};

// Where the gradient of a `SourcePiece` goes. Pointers in `finish` are those of its first channel.
struct GradPiece {
  float* dx;  // null: not needed
  int64_t stride;
  Finish finish;
  int64_t channels;
};

// Sums over the gradient of channels [first, first + channels): item i's are `sums` and `sums_z`, both + i * stride.
struct NormSegment {
  int64_t first, channels, items, stride;
  const double *sums, *sums_z;
};

// One BatchNorm forward: statistics from the items' partials, constants for the readers, running statistics.
struct NormForward {
  int64_t channels, items, count;  // count: pixels
  const double* partials;      // [item][1 + 2 * padded]: pixels, means, sums of squares around them; null: running statistics
  const float *weight, *bias;  // or null
  float *running_mean, *running_var;
  bool update;
  double momentum, eps;
  Norm to;
};

// One BatchNorm backward: the coefficients of `Gradient`, and the gradients of weight and bias.
struct NormBackward {
  int64_t channels, count;
  const NormSegment* segments;
  int64_t segment_count;
  bool frozen;  // the statistics are no function of the input
  Norm norm;
  float *slope, *offset;
  float *grad_weight, *grad_bias;  // or null
};

// Adds the items' gradients of a weight, in item order: element (r, c) goes to out[row_offsets[r] + column_offsets[c]].
struct MergeWeights {
  int64_t items, rows, columns, stride;  // of the partials, [item][row][stride]
  const float* partials;
  const int64_t *row_offsets, *column_offsets;
  bool dense;  // columns lie side by side in `out`
  float* out;
};

// Packs one matrix a group: element (channel, depth) of group g is w[g * group_stride + channel_offsets[channel] +
// depth_offsets[depth]].
struct PackMatrix {
  const float* w;
  int64_t groups, channels, depth, group_stride;
  const int64_t *channel_offsets, *depth_offsets;
  float* out;
};

struct PackTaps {
  const float* w;
  int64_t channels, kernel[2], strides[3];
  bool flip;  // for the gradient of the input
  float* out;
};

struct TrainPointwise {
  int64_t pixels, in_channels, out_channels, groups;
  const SourcePiece* x;
  int64_t pieces;
  const float* weight;
  const float* zeros;
  float* z;
  Planes planes;
  double* partials;  // null: no statistics
  bool stream;       // z is too large for the caches
  // set by prepare
  int64_t items, item_pixels, block, panel_stride;
};

struct PointwiseGrad {
  int64_t pixels, in_channels, out_channels, groups;
  Gradient dy;
  const SourcePiece* x;
  const GradPiece* dx;
  int64_t pieces;
  const float* weight;  // packed for the transposed product; null: the input's gradient is not needed
  const float* zeros;
  const float* addend;  // what the gradient of a single piece already holds from other readers, or null
  int64_t addend_stride;
  double* sums;            // [item][2][sums_stride], the pieces' side by side, each padded; null: none
  float* weight_partials;  // [item][out_channel][weight_stride]; null: not needed
  // set by prepare
  int64_t items, item_pixels, block, part, dy_stride, x_stride, weight_stride, sums_stride;
};

struct TrainDepthwise {
  int64_t images, height, width, channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t shuffle;  // groups of the channel shuffle that the input goes through first; 1: none
  Source x;
  const float* weight;
  const float* zeros;
  float* z;
  double* partials;
  bool stream;
  // set by prepare
  int64_t items, bands, chunk, ring_rows, ring_width;
};

// Whether the input's gradient is a convolution with the flipped taps.
inline bool flips(const TrainDepthwise& p) {
  return p.stride[0] == 1 && p.stride[1] == 1 && p.padding[0] <= (p.kernel[0] - 1) * p.dilation[0] &&
         p.padding[1] <= (p.kernel[1] - 1) * p.dilation[1];
}

struct DepthwiseGrad {
  TrainDepthwise conv;  // sizes and input
  Gradient dy;
  const float* weight;  // taps, flipped where flips(); null: the input's gradient is not needed
  float* dx;
  int64_t dx_stride;
  const float* addend;
  int64_t addend_stride;
  Finish finish;
  float* weight_partials;  // [item][tap][padded]
  // set by prepare
  int64_t items, dy_ring_rows, dy_ring_width, dy_padding;
};

// Statistics of a z that another kernel wrote.
struct MomentsPass {
  int64_t pixels, channels;
  const float* z;
  double* partials;
  int64_t items, item_pixels;  // set by prepare
};

// y = clamp(a + b), b.data null: a alone.
struct Join {
  int64_t pixels, channels;
  Source a, b;
  Clamp clamp;
  float* y;
  int64_t y_stride;
  bool stream;                 // y is too large for the caches
  int64_t items, item_pixels;  // set by prepare
};

// Writes a gradient that has arrived at `out` (or, where that is null, only sums it).
struct FinishPass {
  int64_t pixels, channels;
  const float* g;
  int64_t stride;
  const float* addend;
  int64_t addend_stride;
  float* out;
  int64_t out_stride;
  Finish finish;
  int64_t items, item_pixels;  // set by prepare
};

// Which of a row's values makes each channel, where units took channels by turns: at each level every second channel is one of
// a run of values side by side, the others are the next level's channels. What is left behind the last level is in any order.
struct Interleaving {
  const int64_t* runs;  // a level: where its run begins
  int64_t levels;
  const int32_t* rest;
  int64_t rest_count;
  bool rest_is_run;
};

// Pieces of several values in one: channels of y are those of the pieces, side by side, in another order. And the gradient's
// way back.
struct Gather {
  int64_t pixels, channels, pieces;
  const SourcePiece* x;
  Interleaving order;
  float* y;
  int64_t items, item_pixels;
};

struct GatherGrad {
  int64_t pixels, channels, pieces;
  const float* g;  // of y
  int64_t stride;
  Interleaving order;
  const GradPiece* dx;
  double* sums;
  int64_t items, item_pixels, sums_stride;
};

// Pooling 3x3 or other windows, forward and backward. `places`: which tap of its window won, a byte a value,
// pixels kPadding channels apart or a multiple of that (maximum only).
struct TrainPool {
  bool average;
  int64_t images, height, width, channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2];
  Source x;
  const float* signs;  // maximum: of x times the sign of these, a channel; null: of x
  float* y;            // or its gradient
  int64_t y_stride;
  unsigned char* places;
  float* dx;  // backward
  int64_t dx_stride;
  const float* addend;
  int64_t addend_stride;
  Finish finish;
  int64_t items, bands;
};

// The mean over all pixels of an image, forward and backward. y: [image][y_stride], or its gradient.
struct TrainMean {
  int64_t images, pixels, channels;
  Source x;
  float* y;
  int64_t y_stride;
  float* dx;  // backward
  int64_t dx_stride;
  Finish finish;
  int64_t items, parts, width;  // set by prepare: parts of an image, and their channels or pixels
};

// Dense k x k convolutions.
struct DenseGrad {
  ConvParams conv;  // sizes and input, which is no convolution's output
  Gradient dy;
  bool pooled;          // dy.g is the gradient of
  TrainPool pool;       // a maximum pool of z
  const float* weight;  // packed for the transposed product, depth order (channel, row, column); null: not needed
  const float* zeros;
  float* dx;               // dense NHWC
  bool accumulate;         // dx holds what other readers gave
  float* weight_partials;  // [item][depth][weight_stride], channels side by side; null: not needed
  // set by prepare
  int64_t items, bands, row_width, dy_stride, x_stride, weight_stride;
};

// A kernel: prepare() cuts the work into items and says what they need; run() does some of them.
struct TrainWork {
  int64_t items;
  size_t worker_bytes;
};

struct TrainOp {
  void (*prepare)(void* params, TrainWork* work);
  void (*run)(const void* params, int64_t begin, int64_t end, char* scratch) noexcept;
};

struct TrainTable {
  TrainOp norm_forward, norm_backward, merge_weights, pack_matrix, pack_taps, pointwise, pointwise_grad, depthwise,
      depthwise_grad, dense_grad, moments, join, finish, gather, gather_grad, pool, pool_grad, mean, mean_grad;
};

}  // namespace fastblocks
