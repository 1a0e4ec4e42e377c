// The table of kernels of each instruction set level, and which one runs.
#pragma once

#include <stdint.h>

#include "kernels/params.h"
#include "kernels/train/params.h"

namespace fastblocks {

// prepare() cuts the work and says what memory it needs; begin() runs once, on the caller's thread, when that memory is there.
struct Op {
  void (*prepare)(void* params, int threads, Work* work);
  void (*begin)(void* params);  // or null
};

struct KernelTable {
  const char* name;
  int lanes;
  int64_t (*pack_gemm_floats)(int64_t channels, int64_t depth);
  int64_t (*pack_depthwise_floats)(int64_t channels, int64_t taps);
  void (*pack_conv)(const float* w, int64_t out_channels, int64_t in_channels, const int64_t* kernel, const int64_t* strides,
                    int64_t* offsets, float* out);
  void (*pack_depthwise)(const float* w, int64_t channels, int64_t kernel_height, int64_t kernel_width, const int64_t* strides,
                         float* out);
  Op pointwise, depthwise, conv, block, global_avg_pool, window_pool, shuffle, peak;
  TrainTable train;
};

constexpr int kLevels = 3;

// The levels from least to most; null where this build or this CPU has not got one.
const KernelTable* level(int index);
const char* level_name(int index);

// The level in use. It is chosen once: the best that the CPU has.
const KernelTable& kernels();
int current_level();
// False when the build or the CPU has not got it.
bool use_level(int index);
// As if the CPU worked so on the widest vectors; for tests.
void use_vector_pipes(Pipes other);

}  // namespace fastblocks
