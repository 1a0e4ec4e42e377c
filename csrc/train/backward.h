// The backward half of a chain, as a plan. Nodes are visited from the last to the first. When a node is reached, the gradient
// of its value is complete and finished: masked by the activation, and summed for the BatchNorm. The last reader to be visited
// sees to that as it writes; where it cannot, a pass of its own does.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "packing.h"
#include "plan.h"
#include "program.h"

namespace fastblocks {
namespace train {

// The gradient of a value so far.
struct Grad {
  Memory memory;  // empty: the caller's, or an output
  float* data;    // null: none yet
  int64_t stride;
};

// Sums of some channels of a finished gradient, and their memory.
struct NormSums {
  Memory memory;
  NormSegment segment;
};

// A weight's gradient whose items must still be merged.
struct Merge {
  MergeWeights params;
  Memory memory;
};

class Backward {
 public:
  // `needs`: of the input, then of weight, gamma and beta of each convolution; `outputs` has a place for each.
  Backward(Bound& b, Plan& plan, const std::vector<bool>& needs, std::vector<std::unique_ptr<Output>>& outputs);
  // `grad`: of the chain's output, evenly spaced pixels.
  void build(const Image& grad);

 private:
  // backward_grads.cpp: where gradients go
  // The convolution whose BatchNorm wants sums over the gradient of a value, and its value; or null.
  const Node* summed(int64_t value, int64_t* of) const;
  Finish finish_of(int64_t value) const;
  bool is_plain(int64_t value) const;
  // Memory for the sums that a job with `items` items makes of a value's gradient.
  void want_sums(int64_t value, int64_t items, Finish* finish);
  // Where the gradients of a route's pieces go; each is finished there.
  GradPiece* targets(const Route& route);
  // Memory for the sums of all pieces, [item][2][stride]; null where none has any.
  double* want_sums(const Route& route, GradPiece* pieces, int64_t items, int64_t stride);
  // A pass of its own: adds `addend` to the gradient and finishes it.
  void finish_pass(int64_t value, const Grad* addend);
  Grad fresh(int64_t value);
  float* input_output();
  // Where a reader writes its share of a value's gradient; `last`: nobody will add to it.
  Grad target(int64_t value, bool last, bool slice);
  // The chain's input, where its gradient is what a join passed on.
  void deliver();
  // Adds what a value's gradient was before to what it is now, and finishes it where that was all.
  void pass_sum(int64_t value, const Grad& before, bool last);
  // A convolution that reads a value gives its share of the gradient, through `fill(target, addend, finish)`, which adds the
  // job and returns where its finish is.
  template <class Fill>
  void contribute(const Node& node, int64_t index, Fill fill);

  // backward.cpp: the nodes that join or pool
  void add(const Node& node, int64_t value);
  // The gradient goes on as it is, to the convolution finished.
  void add_sum(const Node& node, int64_t value);
  // The gradient of a value is, or is added to, that of the node's input.
  void pass_on(const Node& node, int64_t value);
  void add_pool(const Node& node, int64_t value, float* g, int64_t stride);
  void add_pool_cat(const Node& node, int64_t value);
  void add_interleave(const Node& node, int64_t value);
  void add_mean(const Node& node, int64_t value);

  // backward_convs.cpp
  // An output with a vector's or a weight's shape, or null where it is not wanted.
  float* wanted(const Node& node, int part, const TensorView& like);
  Gradient gradient(const Node& node, int64_t value);
  // The merge of a weight's gradient waits for the next stage of small passes.
  void merge_later(int64_t items, int64_t rows, int64_t columns, int64_t stride, Memory memory,
                   std::vector<int64_t> row_offsets, std::vector<int64_t> column_offsets, float* out);
  void flush_merges();
  // A tensor with the weight's shape, and its strides where they leave no gaps.
  static TensorView weight_like(const TensorView& w);
  void add_conv(const Node& node, int64_t value);
  void add_pointwise(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx);
  void add_depthwise(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx);
  void add_dense(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx);

  Bound& b_;
  Plan& plan_;
  const std::vector<bool>& wanted_;
  std::vector<std::unique_ptr<Output>>& outputs_;
  const std::vector<Node>& nodes_;
  const float* zeros_;
  std::vector<const float*> weights_;
  std::vector<bool> needs_;        // a value: its gradient
  std::vector<int64_t> earliest_;  // a value: the node that is the last of its readers to be visited
  std::vector<Grad> grads_;
  std::vector<std::vector<NormSums>> sums_;  // a convolution
  std::vector<Merge> merges_;
  bool delivered_ = false;
};

template <class Fill>
void Backward::contribute(const Node& node, int64_t index, Fill fill) {
  const int64_t value = node.input;
  const bool slice = node.channels >= 0 && node.channels < b_.shapes[value].c;
  const bool last = earliest_[value] == index;
  const Grad before = grads_[value];
  const Grad to = target(value, last, slice);
  Finish finish{};
  if (last && !slice) {
    finish = finish_of(value);
    finish.stream = node.is_conv() && to.stride == b_.shapes[value].c && streams(b_.shapes[value]);
  }
  const auto [items, at] = fill(to, slice ? Grad{} : before, finish);
  if (last && !slice) want_sums(value, items, at);
  grads_[value] = to;
  if (last && slice) finish_pass(value, nullptr);
}

}  // namespace train
}  // namespace fastblocks
