// The backward half of a chain. Nodes are visited from the last to the first. When a node is reached, the gradient of its value
// is complete and finished: masked by the activation, and summed for the BatchNorm. The last reader to be visited sees to that
// as it writes; where it cannot, a pass of its own does.
#include <cmath>
#include <memory>
#include <vector>

#include "../ops/calls.h"
#include "packing.h"
#include "plan.h"
#include "program.h"

namespace fastblocks {
namespace train {

namespace {

// The gradient of a value so far.
struct Grad {
  Memory memory;  // empty: the caller's, or an output
  float* data;    // null: none yet
  int64_t stride;
};

// What the sums of a finished gradient are and which items made them.
struct NormSums {
  Memory memory;
  double* partials;
  int64_t items;
};

// A weight's gradient whose items must still be merged.
struct Merge {
  MergeWeights params;
  Memory memory;
};

class Backward {
 public:
  Backward(Bound& b, Plan& plan, const std::vector<bool>& needs, std::vector<std::unique_ptr<Output>>& outputs)
      : b_(b), plan_(plan), wanted_(needs), outputs_(outputs), nodes_(b.program->nodes), zeros_(plan.zeros(zeros_needed(b))) {
    const size_t count = b.shapes.size();
    needs_.assign(count, false);
    earliest_.assign(count, -1);
    grads_.resize(count);
    sums_.resize(b.program->convs);
    needs_[0] = needs[0];
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Node& n = nodes_[i];
      bool any = needs_[n.input] || (n.other > 0 && needs_[n.other]);
      for (int part = 0; n.is_conv() && part < 3; ++part) any = any || wanted_[1 + 3 * n.conv + part];
      needs_[i + 1] = any;
    }
    for (size_t i = nodes_.size(); i-- > 0;) {
      earliest_[nodes_[i].input] = (int64_t)i;
      if (nodes_[i].other > 0) earliest_[nodes_[i].other] = (int64_t)i;
    }
  }

  // `grad`: of the chain's output, evenly spaced pixels.
  void build(const Image& grad) {
    weights_.resize(nodes_.size());
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Node& n = nodes_[i];
      if (!n.is_conv() || !needs_[n.input]) continue;
      const TrainDepthwise depthwise = n.kind == Kind::kDepthwise ? b_.depthwise(n, (int64_t)i + 1) : TrainDepthwise{};
      weights_[i] = pack_backward(plan_, b_, n, n.kind == Kind::kDepthwise ? &depthwise : nullptr);
    }
    plan_.stage();
    const int64_t last = (int64_t)nodes_.size();
    grads_[last] = {nullptr, grad.data, grad.pixel_stride};
    if (needs_[last]) finish_pass(last, nullptr);
    for (int64_t i = last; i-- > 0;) {
      if (!needs_[i + 1]) continue;
      add(nodes_[i], i + 1);
      grads_[i + 1] = {};
    }
    if (needs_[0] && !delivered_) deliver();
    flush_merges();
  }

 private:
  // ------------------------------------------------------------------------------------------------ finishing

  // The convolution whose BatchNorm wants sums over the gradient of a value, and its value; or null.
  const Node* summed(int64_t value, int64_t* of) const {
    const Node* maker = b_.maker(value);
    *of = value;
    if (maker && maker->kind == Kind::kAdd && needs_[maker->other]) {
      *of = maker->other;
      maker = b_.maker(maker->other);
    }
    return maker && maker->is_conv() ? maker : nullptr;
  }

  Finish finish_of(int64_t value) const {
    Finish f{};
    int64_t of;
    const Node* conv = summed(value, &of);
    const Node* maker = b_.maker(value);
    f.clamp = {0.0f, NAN};
    if (maker && maker->is_conv() && maker->activation) {
      f.mask = Mask::kNorm;
      if (maker->activation == 2) f.clamp.high = 6.0f;
    } else if (maker && maker->kind == Kind::kAdd && maker->activation) {
      f.mask = Mask::kOutput;
      f.y = b_.values[value];
      if (maker->activation == 2) f.clamp.high = 6.0f;
    }
    f.z_stride = b_.shapes[value].c;
    if (conv) f.z = b_.values[of], f.norm = b_.norm(*conv);
    return f;
  }

  bool is_plain(int64_t value) const {
    const Node* maker = b_.maker(value);
    return !maker || (!maker->is_conv() && maker->kind != Kind::kAdd);
  }

  // Memory for the sums that a job with `items` items makes of a value's gradient.
  void want_sums(int64_t value, int64_t items, Finish* finish) {
    int64_t of;
    const Node* conv = summed(value, &of);
    if (!conv) return;
    NormSums& s = sums_[conv->conv];
    s.items = items;
    s.memory = plan_.take(items * 2 * round16(b_.shapes[value].c) * sizeof(double));
    s.partials = finish->partials = doubles(s.memory);
  }

  // A pass of its own: adds `addend` to the gradient and finishes it.
  void finish_pass(int64_t value, const Grad* addend) {
    if (is_plain(value) && !addend) return;
    const Shape& s = b_.shapes[value];
    FinishPass p{};
    p.pixels = s.pixels(), p.channels = s.c;
    p.g = grads_[value].data, p.stride = grads_[value].stride;
    p.finish = finish_of(value);
    Grad to = grads_[value];
    if (p.finish.mask != Mask::kNone || addend) {
      to = fresh(value);
      p.out = to.data, p.out_stride = to.stride;
    }
    if (addend) p.addend = addend->data, p.addend_stride = addend->stride;
    plan_.stage();
    FinishPass* job = plan_.add(kernels().train.finish, p);
    want_sums(value, job->items, &job->finish);
    plan_.stage();
    grads_[value] = to;
  }

  // ------------------------------------------------------------------------------------------------ gradients

  Grad fresh(int64_t value) {
    const Shape& s = b_.shapes[value];
    Memory memory = plan_.take((s.floats() + kPadding) * sizeof(float));
    float* data = floats(memory);
    return {std::move(memory), data, s.c};
  }

  float* input_output() {
    const Shape& s = b_.shapes[0];
    if (!outputs_[0])
      outputs_[0] = std::make_unique<Output>(
          TensorView{nullptr, 4, {s.n, s.c, s.h, s.w}, {s.floats() / s.n, 1, s.w * s.c, s.c}}, true);
    return outputs_[0]->data();
  }

  // Where a reader writes its share of a value's gradient; `last`: nobody will add to it.
  Grad target(int64_t value, bool last, bool slice) {
    if (slice && grads_[value].data) return grads_[value];
    if (value == 0 && (last || slice)) {
      delivered_ = true;
      return {nullptr, input_output(), b_.shapes[0].c};
    }
    return fresh(value);
  }

  // The chain's input, where its gradient is what a join passed on.
  void deliver() {
    const Shape& s = b_.shapes[0];
    FinishPass p{};
    p.pixels = s.pixels(), p.channels = s.c;
    p.g = grads_[0].data, p.stride = grads_[0].stride;
    p.out = input_output(), p.out_stride = s.c;
    plan_.stage();
    plan_.add(kernels().train.finish, p);
  }

  // A convolution that reads a value gives its share of the gradient, through `fill(target, addend, finish)`, which adds the job
  // and returns where its finish is.
  template <class Fill>
  void contribute(const Node& node, int64_t index, Fill fill) {
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

  // ------------------------------------------------------------------------------------------------ nodes

  void add(const Node& node, int64_t value) {
    if (node.is_conv()) return add_conv(node, value);
    switch (node.kind) {
      case Kind::kAdd: return add_sum(node, value);
      case Kind::kPoolCat: return add_pool_cat(node, value);
      case Kind::kInterleave: return add_interleave(node, value);
      case Kind::kMaxPool: return add_pool(node, value, grads_[value].data, grads_[value].stride);
      default: return add_activate(node, value);
    }
  }

  // The gradient goes on as it is, to the convolution finished.
  void add_sum(const Node& node, int64_t value) {
    if (needs_[node.other]) grads_[node.other] = grads_[value];
    if (needs_[node.input]) pass_on(node, value);
  }

  // The gradient of a value is, or is added to, that of the node's input.
  void pass_on(const Node& node, int64_t value) {
    const int64_t to = node.input;
    const Grad before = grads_[to], more = grads_[value];
    grads_[to] = more;
    const bool last = earliest_[to] == value - 1;
    if (before.data || (last && !is_plain(to))) {
      if (!last) {  // summed now, finished later
        FinishPass p{};
        const Shape& s = b_.shapes[to];
        const Grad sum = fresh(to);
        p.pixels = s.pixels(), p.channels = s.c, p.g = more.data, p.stride = more.stride;
        p.addend = before.data, p.addend_stride = before.stride, p.out = sum.data, p.out_stride = sum.stride;
        plan_.stage();
        plan_.add(kernels().train.finish, p);
        plan_.stage();
        grads_[to] = sum;
      } else {
        finish_pass(to, before.data ? &before : nullptr);
      }
    }
  }

  void add_activate(const Node& node, int64_t value) { pass_on(node, value); }

  void add_pool(const Node& node, int64_t value, float* g, int64_t stride) {
    if (!needs_[node.input]) return;
    TrainPool p = pool_of(b_, node, value);
    p.y = g, p.y_stride = stride;
    plan_.stage();
    contribute(node, value - 1, [&](const Grad& to, const Grad& addend, const Finish& finish) {
      p.dx = to.data, p.dx_stride = to.stride, p.addend = addend.data, p.addend_stride = addend.stride, p.finish = finish;
      TrainPool* job = plan_.add(kernels().train.pool_grad, p);
      return std::pair<int64_t, Finish*>(job->items, &job->finish);
    });
    plan_.stage();
  }

  void add_pool_cat(const Node& node, int64_t value) {
    const int64_t channels = b_.shapes[node.input].c;
    if (needs_[node.other]) {
      grads_[node.other] = {grads_[value].memory, grads_[value].data + channels, grads_[value].stride};
      finish_pass(node.other, nullptr);
    }
    add_pool(node, value, grads_[value].data, grads_[value].stride);
  }

  void add_interleave(const Node& node, int64_t value) {
    InterleaveGrad p{};
    p.pixels = b_.shapes[value].pixels(), p.channels = b_.shapes[value].c / 2;
    p.g = grads_[value].data, p.stride = grads_[value].stride;
    const int64_t left = node.input, index = value - 1;
    const bool slice = p.channels < b_.shapes[left].c, last = earliest_[left] == index;
    Grad to{}, right{};
    const Grad before = grads_[left];
    if (needs_[left]) {
      to = target(left, last && !before.data, slice);
      p.left = to.data + node.first, p.left_stride = to.stride;
      if (last && !slice && !before.data) p.left_finish = finish_of(left);
    }
    if (needs_[node.other]) {
      right = fresh(node.other);
      p.right = right.data, p.right_stride = right.stride, p.right_finish = finish_of(node.other);
    }
    plan_.stage();
    InterleaveGrad* job = plan_.add(kernels().train.interleave_grad, p);
    if (needs_[left]) {
      grads_[left] = to;
      if (slice) {
        if (last) finish_pass(left, nullptr);
      } else if (before.data) {
        pass_sum(left, before, last);
      } else if (last) {
        want_sums(left, job->items, &job->left_finish);
      }
    }
    if (needs_[node.other]) {
      grads_[node.other] = right;
      want_sums(node.other, job->items, &job->right_finish);
    }
    plan_.stage();
  }

  void pass_sum(int64_t value, const Grad& before, bool last) {
    const Grad more = before;
    if (last) return finish_pass(value, &more);
    const Shape& s = b_.shapes[value];
    FinishPass p{};
    const Grad sum = fresh(value);
    p.pixels = s.pixels(), p.channels = s.c, p.g = grads_[value].data, p.stride = grads_[value].stride;
    p.addend = more.data, p.addend_stride = more.stride, p.out = sum.data, p.out_stride = sum.stride;
    plan_.stage();
    plan_.add(kernels().train.finish, p);
    plan_.stage();
    grads_[value] = sum;
  }

  // ------------------------------------------------------------------------------------------------ convolutions

  // An output with a vector's or a weight's shape, or null where it is not wanted.
  float* wanted(const Node& node, int part, const TensorView& like) {
    const size_t index = 1 + 3 * node.conv + part;
    if (!wanted_[index]) return nullptr;
    outputs_[index] = std::make_unique<Output>(like, true);
    return outputs_[index]->data();
  }

  Gradient gradient(const Node& node, int64_t value) {
    const Shape& out = b_.shapes[value];
    const int64_t stride = round16(out.c);
    const TensorView vector{nullptr, 1, {out.c, 1, 1, 1}, {1, 1, 1, 1}};
    const NormSums& s = sums_[node.conv];
    NormBackward p{};
    p.channels = out.c, p.items = s.items, p.count = out.pixels(), p.partials = s.partials, p.frozen = node.frozen;
    p.norm = b_.norm(node);
    p.slope = plan_.floats(2 * stride), p.offset = p.slope + stride;
    p.grad_weight = wanted(node, 1, vector), p.grad_bias = wanted(node, 2, vector);
    plan_.stage();
    flush_merges();
    plan_.add(kernels().train.norm_backward, p);
    plan_.stage();
    sums_[node.conv] = {};
    return {grads_[value].data, grads_[value].stride, b_.values[value], p.norm.mean, p.norm.scale, p.slope, p.offset};
  }

  // The merge of a weight's gradient, in a stage of its own choosing: with the next small pass.
  void merge_later(int64_t items, int64_t rows, int64_t columns, int64_t stride, Memory memory,
                   std::vector<int64_t> row_offsets, std::vector<int64_t> column_offsets, float* out) {
    bool dense = true;
    for (int64_t c = 0; c < columns; ++c) dense = dense && column_offsets[c] == c;
    MergeWeights p{items, rows, columns, stride, floats(memory), plan_.keep(std::move(row_offsets)),
                   plan_.keep(std::move(column_offsets)), dense, out};
    merges_.push_back({p, std::move(memory)});
  }

  void flush_merges() {
    if (merges_.empty()) return;
    plan_.stage();
    for (const Merge& merge : merges_) plan_.add(kernels().train.merge_weights, merge.params);
    merges_.clear();
  }

  // A tensor with the weight's shape, and its strides where they leave no gaps.
  static TensorView weight_like(const TensorView& w) {
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

  void add_conv(const Node& node, int64_t value) {
    const TensorView like = weight_like(b_.convs[node.conv].weight);
    const Gradient dy = gradient(node, value);
    float* dw = wanted(node, 0, like);
    const bool dx = needs_[node.input];
    if (!dw && !dx) return;
    if (node.kind == Kind::kPointwise) return add_pointwise(node, value, dy, dw, like, dx);
    if (node.kind == Kind::kDepthwise) return add_depthwise(node, value, dy, dw, like, dx);
    add_dense(node, value, dy, dw, like, dx);
  }

  void add_pointwise(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx) {
    PointwiseGrad p{};
    const Shape &in = b_.shapes[node.input], &out = b_.shapes[value];
    p.pixels = out.pixels(), p.out_channels = out.c, p.groups = node.groups;
    p.in_channels = node.channels < 0 ? in.c : node.channels;
    p.dy = dy, p.x = b_.source(node.input, node.first), p.zeros = zeros_;
    PointwiseGrad* job = nullptr;
    const auto fill = [&](const Grad& to, const Grad& addend, const Finish& finish) {
      p.weight = weights_[value - 1];
      if (to.data) p.dx = to.data + node.first, p.dx_stride = to.stride;
      p.addend = addend.data, p.addend_stride = addend.stride, p.finish = finish;
      job = plan_.add(kernels().train.pointwise_grad, p);
      return std::pair<int64_t, Finish*>(job->items, &job->finish);
    };
    if (dx)
      contribute(node, value - 1, fill);
    else
      fill({}, {}, {});
    if (!dw) return;
    Memory memory = plan_.take(job->items * out.c * job->weight_stride * sizeof(float));
    job->weight_partials = floats(memory);
    std::vector<int64_t> rows(out.c), columns(like.size[1]);
    for (int64_t i = 0; i < out.c; ++i) rows[i] = i * like.stride[0];
    for (int64_t i = 0; i < like.size[1]; ++i) columns[i] = i * like.stride[1];
    merge_later(job->items, out.c, like.size[1], job->weight_stride, std::move(memory), std::move(rows),
                std::move(columns), dw);
  }

  void add_depthwise(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx) {
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
    std::vector<int64_t> rows(taps), columns(channels);
    for (int64_t i = 0; i < taps; ++i)
      rows[i] = i / node.kernel[1] * like.stride[2] + i % node.kernel[1] * like.stride[3];
    for (int64_t i = 0; i < channels; ++i) columns[i] = i * like.stride[0];
    merge_later(job->items, taps, channels, round16(channels), std::move(memory), std::move(rows), std::move(columns), dw);
  }

  void add_dense(const Node& node, int64_t value, const Gradient& dy, float* dw, const TensorView& like, bool dx) {
    DenseGrad p{};
    p.conv = b_.dense(node, value);
    p.dy = dy, p.weight = weights_[value - 1], p.zeros = zeros_;
    if (dx) {  // it reads the chain's input
      const bool fresh_memory = !grads_[0].data;
      if (!fresh_memory && !delivered_) deliver(), plan_.stage();
      p.dx = input_output(), p.accumulate = !fresh_memory;
      delivered_ = true;
      grads_[0] = {nullptr, p.dx, b_.shapes[0].c};
    }
    DenseGrad* job = plan_.add(kernels().train.dense_grad, p);
    if (!dw) return;
    Memory memory = plan_.take(job->items * like.size[0] * job->weight_stride * sizeof(float));
    job->weight_partials = floats(memory);
    std::vector<int64_t> rows(like.size[0]);
    for (int64_t i = 0; i < like.size[0]; ++i) rows[i] = i * like.stride[0];
    std::vector<int64_t> columns = depth_offsets(like);
    const int64_t depth = (int64_t)columns.size();
    merge_later(job->items, like.size[0], depth, job->weight_stride, std::move(memory), std::move(rows),
                std::move(columns), dw);
  }

  Bound& b_;
  Plan& plan_;
  const std::vector<bool>& wanted_;
  std::vector<std::unique_ptr<Output>>& outputs_;
  const std::vector<Node>& nodes_;
  const float* zeros_;
  std::vector<const float*> weights_;
  std::vector<bool> needs_;         // a value: its gradient
  std::vector<int64_t> earliest_;  // a value: the node that is the last of its readers to be visited
  std::vector<Grad> grads_;
  std::vector<NormSums> sums_;
  std::vector<Merge> merges_;
  bool delivered_ = false;
};

float* same_image(PyObject* tensor, const Shape& s) {
  const TensorView v = view(tensor);
  require(v.dims == 4 && v.size[0] == s.n && v.size[1] == s.c && v.size[2] == s.h && v.size[3] == s.w,
          "fastblocks._C: a saved tensor of another shape");
  const ImageInput image = even_pixels(tensor, v);
  require(image.image.data == v.data && (image.image.pixel_stride == s.c || s.pixels() == 1),
          "fastblocks._C: a saved tensor that is not dense");
  return v.data;
}

float* same_floats(PyObject* tensor, int64_t count) {
  const TensorView v = view(tensor);
  require(v.dims == 1 && v.size[0] == count && (count < 2 || v.stride[0] == 1), "fastblocks._C: a saved tensor of another length");
  return v.data;
}

}  // namespace

// (program, grad, input, weights, affine, saved, needs): `saved` as forward() returned it (the output only where it is a
// sum with an activation); `needs` of the input, then of weight,
// gamma and beta of each convolution. A list of gradients in that order, None where none is needed.
PyObject* backward(PyObject* const* args) {
  const Program& program = program_of(args[0]);
  Bound b(program, args[2], args[3], args[4]);
  const size_t last = b.shapes.size() - 1;
  size_t pools = 0;
  for (const Node& node : program.nodes) pools += node.kind == Kind::kMaxPool;
  PyObject** saved = items(args[5], (Py_ssize_t)(last + 1 + pools));
  const Node& end = program.nodes.back();
  if (end.kind == Kind::kAdd && end.activation) b.values[last] = same_image(saved[0], b.shapes[last]);
  b.norms = same_floats(saved[1], b.norm_floats);
  for (size_t i = 1; i < last; ++i) b.values[i] = same_image(saved[i + 1], b.shapes[i]);
  size_t at = last + 1;
  for (size_t i = 0; i < program.nodes.size(); ++i)
    if (program.nodes[i].kind == Kind::kMaxPool)
      b.places[i] = reinterpret_cast<unsigned char*>(same_floats(saved[at++], b.shapes[i + 1].floats() / 4 + 1));
  const Py_ssize_t count = 1 + 3 * program.convs;
  PyObject** flags = items(args[6], count);
  std::vector<bool> needs;
  for (Py_ssize_t i = 0; i < count; ++i) needs.push_back(truth(flags[i]));
  const TensorView g = view(args[1]);
  const Shape& s = b.shapes[last];
  require(g.dims == 4 && g.size[0] == s.n && g.size[1] == s.c && g.size[2] == s.h && g.size[3] == s.w,
          "fastblocks._C: a gradient of another shape");
  const ImageInput grad = even_pixels(args[1], g);
  std::vector<std::unique_ptr<Output>> outputs((size_t)count);
  Plan plan;
  Backward(b, plan, needs, outputs).build(grad.image);
  run_plan(plan);
  const Ref list = Ref::checked(PyList_New(count));
  for (Py_ssize_t i = 0; i < count; ++i)
    PyList_SET_ITEM(list.get(), i, outputs[i] ? outputs[i]->tensor().release() : Ref::borrow(Py_None).release());
  return Ref::borrow(list.get()).release();
}

}  // namespace train
}  // namespace fastblocks
