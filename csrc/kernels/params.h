// What the kernels are told: plain structs of pointers and sizes, the same for every instruction set level. No tensors, no
// functions. Sizes are in elements, strides in floats. Activations are [image][row][pixel][channel] ("NHWC") with free image,
// row and pixel strides; the channel stride is 1.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastblocks {

// How the CPU works on the widest vectors (dispatch.cpp), by which tiles are chosen; results are the same.
enum class Pipes {
  kShared,    // whole; blending two of them takes a pipe that multiplies
  kSeparate,  // whole; there are other pipes to blend
  kHalves,    // by halves
};
Pipes vector_pipes();

// One BatchNorm and the bias of the convolution before it, as pointers to their `channels` values; any may be null.
struct BatchNorm {
  const float* conv_bias;
  const float* mean;  // null: no BatchNorm at all
  const float* var;
  const float* weight;
  const float* bias;
  float eps;
};

// y = clamp(conv * scale + shift [+ residual], low, high); low = -inf and high = +inf mean no activation.
struct Clamp {
  float low;
  float high;
};

struct Image {
  float* data;
  int64_t image_stride;
  int64_t row_stride;
  int64_t pixel_stride;
};

// How many floats the output of a phase's call has, and how many there were where it goes, which may still be read; see Phase.
struct Room {
  int64_t writes = 1, held = 1;
};

// A part of an op: `items` independent pieces of work. run() may be called from any thread, with any range of items; `scratch`
// is the calling worker's own memory.
//
// `images`: 0 where an item may need all that the phase before made. Else the items come image by image, as many each, and an
// item neither reads nor writes anything of another image. Between two such phases of as many images nobody waits for the end
// of the first: an item waits for its image, and for those that lay where its own goes. They are images before it, as long as
// the output has no more floats than there were (image i goes to where i * writes / held and those behind it lay); where it has
// more, all are waited for.
struct Phase {
  void (*run)(const void* params, int64_t begin, int64_t end, char* scratch) noexcept;
  const void* params;
  int64_t items;
  int64_t images;
  Room room = {};
};

constexpr int kMaxPhases = 4;

// What one call of an op needs: filled by the op's prepare function.
struct Work {
  Phase phases[kMaxPhases];
  int count;
  size_t worker_bytes;  // scratch of each worker
  size_t shared_bytes;  // memory that all workers see
  float** shared;       // where its address goes; null: none is needed
};

// A 1x1 convolution: `groups` products, each of its own part of the input's and of the output's channels.
struct PointwiseParams {
  int64_t pixels, in_channels, out_channels;
  int64_t groups;
  int64_t shuffle;  // groups of the channel shuffle of the output; 1: none
  const float* x;
  int64_t x_stride;  // pixel stride
  const float* packed_weight;
  BatchNorm norm;
  Clamp clamp;
  const float* residual;  // or null
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
  float* shared;
  // set by prepare
  bool fold;
  int64_t pixel_block, panel_block, pixel_blocks;
  int64_t step_pixels, step_panels;  // of groups, and of what is shuffled
};

struct DepthwiseParams {
  int64_t images, height, width, channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  Image x;
  const float* packed_weight;
  BatchNorm norm;
  Clamp clamp;
  Image out;
  float* shared;
  int64_t bands;
};

struct ConvParams {
  int64_t images, height, width, in_channels, out_channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  bool planar;  // x is NCHW: row_stride between rows of a channel plane, pixel_stride between planes
  Image x;
  const float* packed_weight;
  BatchNorm norm;
  Clamp clamp;
  Image out;
  float* shared;
  bool absorbed;  // the block that reads the output makes it, a few rows at a time: see BlockParams::stem
  // set by prepare
  bool fold;
  int64_t bands;
};

// The block of all four networks: [1x1 convolution], depthwise convolution, 1x1 convolution, and how their result meets the
// input.
struct BlockParams {
  int64_t images, height, width, in_channels, hidden_channels, out_channels, out_height, out_width;
  int64_t kernel, stride, padding;
  // Groups of the projection and of the shuffle in front of the depthwise convolution; groups of the expansion, 1 or the same.
  int64_t groups, expand_groups;
  Image x;                     // row_stride = width * pixel_stride
  const ConvParams* stem;      // makes x from an image, a few rows at a time; null: x is in memory, or `source` makes it
  BlockParams* source;         // makes x, a few rows at a time; has no source itself
  const float* expand_weight;  // null: no expansion, hidden_channels = in_channels
  const float* depthwise_weight;
  const float* project_weight;
  BatchNorm expand_norm, depthwise_norm, project_norm;
  Clamp expand_clamp, depthwise_clamp, project_clamp;
  Image residual;  // is added before the last clamp; data null: none
  Image other;     // takes the even channels of the output, and the block's result the odd ones; data null: none
  Image pooled;    // where x goes, averaged over 3x3 windows of the same stride; data null: nowhere
  Image out;       // row_stride = out_width * pixel_stride
  float* shared;
  bool absorbed;  // another block's source
  // set by prepare
  bool fold_expand, fold_project;
  int64_t bands, chunk_rows, step_rows, hidden_stride, pixel_block, pixel_blocks, panel_block, panel_blocks, pool_items,
      slice_parts;
};

struct PoolParams {
  int64_t images, pixels, channels;
  const float* x;
  int64_t image_stride, pixel_stride;
  float* out;
  int64_t channel_block, channel_blocks;
};

// Pooling over windows: the mean over all of each window (padding counts as zeros), or the largest value inside the map.
struct WindowPoolParams {
  bool average;
  int64_t images, height, width, channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2];
  Image x, out;
  const ConvParams* stem;  // makes x from an image, a few rows at a time; null: x is in memory
  int64_t bands;
};

// A permutation of channels, with a concat before it and a split behind it: the channels of the inputs, one input's after the
// other's, are shuffled in `groups` groups and dealt to the outputs.
struct ShuffleParams {
  int64_t images, pixels, groups, channels;  // of all inputs together, a pixel
  bool planar;                               // NCHW: pixels of a plane are dense, pixel_stride is that between planes
  struct Part {
    float* data;
    int64_t image_stride, pixel_stride, channels;
  } in[2], out[2];
  int in_count, out_count;
  int64_t block;  // set by prepare: an item's pixels, or planes; and whether outputs go past the caches
  bool past;
};

// `steps` multiply-adds in each of a level's chains, once a worker. Set by prepare: the floating point operations of it all.
struct PeakParams {
  int64_t steps;
  float factors[2];
  float* results;  // one a worker
  double flops;
};

}  // namespace fastblocks
