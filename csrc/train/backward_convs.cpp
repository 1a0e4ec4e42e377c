// Convolutions.
#include "backward.h"

#include <algorithm>
#include <cmath>

#include "../ops/calls.h"

namespace fastblocks {
namespace train {

float* Backward::wanted(const Node& node, int part, const TensorView& like) {
  const size_t index = 1 + 3 * node.conv + part;
  if (!wanted_[index]) return nullptr;
  outputs_[index] = std::make_unique<Output>(like, true);
  return outputs_[index]->data();
}

Gradient Backward::gradient(const Node& node, int64_t value) {
  const Shape& out = b_.shapes[value];
  const int64_t stride = round16(out.c);
  const TensorView vector{nullptr, 1, {out.c, 1, 1, 1}, {1, 1, 1, 1}};
  std::vector<NormSegment> segments;
  for (const NormSums& s : sums_[node.conv]) segments.push_back(s.segment);
  NormBackward p{};
  p.channels = out.c, p.count = out.pixels(), p.frozen = node.frozen;
  p.segment_count = (int64_t)segments.size(), p.segments = plan_.keep(std::move(segments));
  p.norm = b_.norm(node);
  p.slope = plan_.floats(2 * stride + kPadding), p.offset = p.slope + stride;  // a plane may begin amid a vector
  p.grad_weight = wanted(node, 1, vector), p.grad_bias = wanted(node, 2, vector);
  plan_.stage();
  flush_merges();
  plan_.add(kernels().train.norm_backward, p);
  plan_.stage();
  sums_[node.conv].clear();
  return {grads_[value].data, grads_[value].stride, b_.values[value], p.norm.mean, p.norm.scale, p.slope,
          p.offset,           b_.planes_of(value)};
}

void Backward::merge_later(int64_t items, int64_t rows, int64_t columns, int64_t stride, Memory memory,
                           std::vector<int64_t> row_offsets, std::vector<int64_t> column_offsets, float* out) {
  bool dense = true;
  for (int64_t c = 0; c < columns; ++c) dense = dense && column_offsets[c] == c;
  MergeWeights p{
      items, rows, columns, stride, floats(memory), plan_.keep(std::move(row_offsets)), plan_.keep(std::move(column_offsets)),
      dense, out};
  merges_.push_back({p, std::move(memory)});
}

void Backward::flush_merges() {
  if (merges_.empty()) return;
  plan_.stage();
  for (const Merge& merge : merges_) plan_.add(kernels().train.merge_weights, merge.params);
  merges_.clear();
}

TensorView Backward::weight_like(const TensorView& w) {
  TensorView like = w;
  int64_t least = 1;
  bool dense = true;
  std::vector<bool> used(4, false);
  for (int i = 0; i < 4; ++i) {
    int next = -1;
    for (int d = 0; d < 4; ++d)
      if (!used[d] && (next < 0 || w.stride[d] < w.stride[next] || (w.stride[d] == w.stride[next] && w.size[d] == 1))) next = d;
    used[next] = true;
    if (w.size[next] > 1) dense = dense && w.stride[next] == least;
    least *= w.size[next];
  }
  if (!dense) {
    int64_t stride = 1;
    for (int d = 3; d >= 0; --d) like.stride[d] = stride, stride *= w.size[d];
  }
  return like;
}

void Backward::add_conv(const Node& node, int64_t value) {
  const TensorView like = weight_like(b_.convs[node.conv].weight);
  const Gradient dy = gradient(node, value);
  float* dw = wanted(node, 0, like);
  const bool dx = needs_[node.input];
  if (!dw && !dx) return;
  if (node.kind == Kind::kPointwise) return add_pointwise(node, value, dy, dw, like, dx);
  if (node.kind == Kind::kDepthwise) return add_depthwise(node, value, dy, dw, like, dx);
  add_dense(node, value, dy, dw, like, dx);
}

void Backward::add_pointwise(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx) {
  PointwiseGrad p{};
  const Shape &in = b_.shapes[node.input], &out = b_.shapes[value];
  p.pixels = out.pixels(), p.out_channels = out.c, p.groups = node.groups;
  p.in_channels = node.channels < 0 ? in.c : node.channels;
  const Route& route = b_.routes[value - 1];
  p.dy = dy, p.x = plan_.keep(b_.sources(route)), p.pieces = (int64_t)route.pieces.size(), p.zeros = zeros_;
  PointwiseGrad* job = nullptr;
  const auto add = [&](const GradPiece* pieces) {
    p.dx = pieces;
    job = plan_.add(kernels().train.pointwise_grad, p);
  };
  dx = dx && std::any_of(route.pieces.begin(), route.pieces.end(), [&](const Piece& piece) { return needs_[piece.value]; });
  if (dx) p.weight = weights_[value - 1];
  if (!dx) {
    add(plan_.keep(std::vector<GradPiece>(route.pieces.size())));
  } else if (b_.gathers(node)) {
    GradPiece* const pieces = targets(route);
    add(pieces);
    job->sums = want_sums(route, pieces, job->items, job->sums_stride);
  } else {
    contribute(node, value - 1, [&](const Grad& to, const Grad& addend, const Finish& finish) {
      p.addend = addend.data, p.addend_stride = addend.stride;
      GradPiece* const piece = plan_.keep(std::vector<GradPiece>{{to.data + node.first, to.stride, finish, p.in_channels}});
      add(piece);
      return std::pair<int64_t, Finish*>(job->items, &piece->finish);
    });
    job->sums = job->dx->finish.partials;
  }
  if (!dw) return;
  Memory memory = plan_.take(job->items * out.c * job->weight_stride * sizeof(float));
  job->weight_partials = floats(memory);
  std::vector<int64_t> rows = multiples(out.c, like.stride[0]), columns = depth_offsets(like, route);
  merge_later(job->items, out.c, like.size[1], job->weight_stride, std::move(memory), std::move(rows), std::move(columns), dw);
}

void Backward::add_depthwise(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx) {
  DepthwiseGrad p{};
  p.conv = b_.depthwise(node, value);
  p.conv.zeros = zeros_;
  p.dy = dy;
  DepthwiseGrad* job = nullptr;
  const auto fill = [&](const Grad& to, const Grad& addend, const Finish& finish) {
    p.weight = weights_[value - 1];
    p.dx = to.data, p.dx_stride = to.stride;
    p.addend = addend.data, p.addend_stride = addend.stride, p.finish = finish;
    job = plan_.add(kernels().train.depthwise_grad, p);
    return std::pair<int64_t, Finish*>(job->items, &job->finish);
  };
  if (dx)
    contribute(node, value - 1, fill);
  else
    fill({}, {}, {});
  if (!dw) return;
  const int64_t taps = node.kernel[0] * node.kernel[1], channels = p.conv.channels;
  Memory memory = plan_.take(job->items * taps * round16(channels) * sizeof(float));
  job->weight_partials = floats(memory);
  std::vector<int64_t> rows(taps), columns = multiples(channels, like.stride[0]);
  for (int64_t i = 0; i < taps; ++i) rows[i] = i / node.kernel[1] * like.stride[2] + i % node.kernel[1] * like.stride[3];
  merge_later(job->items, taps, channels, round16(channels), std::move(memory), std::move(rows), std::move(columns), dw);
}

void Backward::add_dense(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx) {
  DenseGrad p{};
  p.conv = b_.dense(node, value);
  p.dy = dy, p.weight = weights_[value - 1], p.zeros = zeros_;
  for (size_t i = 0; i < nodes_.size(); ++i)
    if (b_.pools_z[i] && nodes_[i].input == value) {
      p.pool = pool_of(b_, nodes_[i], (int64_t)i + 1);
      p.pool.y = const_cast<float*>(dy.g), p.pool.y_stride = dy.stride;
      p.pooled = true;
    }
  if (dx) {  // it reads the chain's input
    const bool fresh_memory = !grads_[0].data;
    if (!fresh_memory && !delivered_) deliver(), plan_.stage();
    p.dx = input_output(), p.accumulate = !fresh_memory;
    delivered_ = true;
    grads_[0] = {nullptr, p.dx, b_.shapes[0].c};
  }
  DenseGrad* job = plan_.add(kernels().train.dense_grad, p);
  if (!dw) return;
  std::vector<int64_t> rows = depth_offsets(like), columns = multiples(like.size[0], like.stride[0]);
  const int64_t depth = (int64_t)rows.size();
  Memory memory = plan_.take(job->items * depth * job->weight_stride * sizeof(float));
  job->weight_partials = floats(memory);
  merge_later(job->items, depth, like.size[0], job->weight_stride, std::move(memory), std::move(rows), std::move(columns), dw);
}

}  // namespace train
}  // namespace fastblocks
