// What both directions need: weights packed for a product, and a few sizes.
#pragma once

#include <Python.h>

#include <memory>
#include <new>
#include <vector>

#include "../dispatch.h"
#include "plan.h"
#include "program.h"

namespace fastblocks {
namespace train {

inline int64_t round16(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// Each adds a job to the plan's current stage, and returns where the packed weight of a node will be.
const float* pack_forward(Plan& plan, const Bound& b, int64_t index);
// For the gradient of the input.
const float* pack_backward(Plan& plan, const Bound& b, int64_t index, const TrainDepthwise* depthwise);

// Element offsets of a weight's depth, in the order (channel, row, column), or that in which the input's channels are read.
std::vector<int64_t> depth_offsets(const TensorView& weight, const Route& route = {});

// 0, step, 2 * step, ...
std::vector<int64_t> multiples(int64_t count, int64_t step);
// Where among a route's pieces each channel is.
Interleaving interleaving(Plan& plan, const Route& route);
TrainPool pool_of(const Bound& b, const Node& node, int64_t value);
// What both directions of a mean are told.
TrainMean mean_of(const Bound& b, const Node& node);
// Whether a dense value of this size is written past the caches: where it is too large for them, and in whole cache lines.
bool streams(const Shape& shape);
int64_t zeros_needed(const Bound& b);

// Runs it without the GIL.
void run_plan(Plan& plan);

}  // namespace train
}  // namespace fastblocks
