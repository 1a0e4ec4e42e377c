// Everything that is compiled once an instruction set level, and the table by which the rest of the extension reaches it.
#pragma once

#include "../dispatch.h"
#include "blocks-inl.h"
#include "conv-inl.h"
#include "depthwise-inl.h"
#include "peak-inl.h"
#include "pointwise-inl.h"
#include "pool-inl.h"
#include "product-inl.h"
#include "shuffle_op-inl.h"

namespace fastblocks {
namespace FASTBLOCKS_LEVEL {

TrainTable train_table();  // compiled apart

inline int64_t pack_gemm_floats(int64_t channels, int64_t depth) { return Panels(channels).padded() * depth; }
inline int64_t pack_depthwise_floats(int64_t channels, int64_t taps) { return round_up(channels, kLanes) * taps; }

inline KernelTable make_table(const char* name) {
  KernelTable t{};
  t.name = name;
  t.lanes = kLanes;
  t.pack_gemm_floats = pack_gemm_floats;
  t.pack_depthwise_floats = pack_depthwise_floats;
  t.pack_conv = pack_conv;
  t.pack_depthwise = pack_depthwise;
  t.pointwise = {pointwise_prepare, pointwise_begin};
  t.depthwise = {depthwise_prepare, depthwise_begin};
  t.conv = {conv_prepare, conv_begin};
  t.block = {block_prepare, block_begin};
  t.global_avg_pool = {pool_prepare, nullptr};
  t.window_pool = {window_pool_prepare, nullptr};
  t.shuffle = {shuffle_prepare, nullptr};
  t.peak = {peak_prepare, nullptr};
  t.train = train_table();
  return t;
}

}  // namespace FASTBLOCKS_LEVEL
}  // namespace fastblocks
