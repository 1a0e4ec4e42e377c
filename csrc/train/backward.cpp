// The walk over the nodes, those that are no convolutions, and the function for Python.
#include "backward.h"

#include <cmath>

#include "../ops/calls.h"

namespace fastblocks {
namespace train {

Backward::Backward(Bound& b, Plan& plan, const std::vector<bool>& needs, std::vector<std::unique_ptr<Output>>& outputs)
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

void Backward::build(const Image& grad) {
  weights_.resize(nodes_.size());
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& n = nodes_[i];
    if (!n.is_conv() || !needs_[n.input]) continue;
    const TrainDepthwise depthwise = n.kind == Kind::kDepthwise ? b_.depthwise(n, (int64_t)i + 1) : TrainDepthwise{};
    weights_[i] = pack_backward(plan_, b_, (int64_t)i, n.kind == Kind::kDepthwise ? &depthwise : nullptr);
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

void Backward::add(const Node& node, int64_t value) {
  if (node.is_conv()) return add_conv(node, value);
  switch (node.kind) {
    case Kind::kAdd: return add_sum(node, value);
    case Kind::kPoolCat: return add_pool_cat(node, value);
    case Kind::kInterleave: return add_interleave(node, value);
    case Kind::kMaxPool: return add_pool(node, value, grads_[value].data, grads_[value].stride);
    case Kind::kMean: return add_mean(node, value);
    default: return pass_on(node, value);
  }
}

void Backward::add_sum(const Node& node, int64_t value) {
  if (needs_[node.other]) grads_[node.other] = grads_[value];
  if (needs_[node.input]) pass_on(node, value);
}

void Backward::pass_on(const Node& node, int64_t value) {
  const int64_t to = node.input;
  const Grad before = grads_[to];
  const bool last = earliest_[to] == value - 1;
  grads_[to] = grads_[value];
  if (before.data)
    pass_sum(to, before, last);
  else if (last)
    finish_pass(to, nullptr);
}

void Backward::add_pool(const Node& node, int64_t value, float* g, int64_t stride) {
  if (!needs_[node.input]) return;
  if (b_.pools_z[value - 1]) {  // the convolution deals the gradient to its pixels
    grads_[node.input] = grads_[value];
    return;
  }
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

void Backward::add_pool_cat(const Node& node, int64_t value) {
  const int64_t channels = b_.shapes[node.input].c;
  if (needs_[node.other]) {
    grads_[node.other] = {grads_[value].memory, grads_[value].data + channels, grads_[value].stride};
    finish_pass(node.other, nullptr);
  }
  add_pool(node, value, grads_[value].data, grads_[value].stride);
}

void Backward::add_interleave(const Node&, int64_t value) {
  if (!b_.stored[value]) return;  // its readers gave their gradients to those it was made of
  const Route& route = b_.routes[value - 1];
  GradPiece* const pieces = targets(route);
  GatherGrad p{};
  p.pixels = b_.shapes[value].pixels(), p.channels = b_.shapes[value].c, p.pieces = (int64_t)route.pieces.size();
  p.g = grads_[value].data, p.stride = grads_[value].stride;
  p.order = interleaving(plan_, route), p.dx = pieces;
  plan_.stage();
  GatherGrad* job = plan_.add(kernels().train.gather_grad, p);
  job->sums = want_sums(route, pieces, job->items, job->sums_stride);
  plan_.stage();
}

// It is the first to be visited: no other reader has given its share.
void Backward::add_mean(const Node& node, int64_t value) {
  TrainMean p = mean_of(b_, node);
  p.y = grads_[value].data, p.y_stride = grads_[value].stride;
  plan_.stage();
  contribute(node, value - 1, [&](const Grad& to, const Grad&, const Finish& finish) {
    p.dx = to.data, p.dx_stride = to.stride, p.finish = finish;
    TrainMean* job = plan_.add(kernels().train.mean_grad, p);
    return std::pair<int64_t, Finish*>(job->items, &job->finish);
  });
  plan_.stage();
}

namespace {

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
  require(v.dims == 1 && v.size[0] == count && (count < 2 || v.stride[0] == 1),
          "fastblocks._C: a saved tensor of another length");
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
  for (size_t i = 1; i < last; ++i)
    if (b.stored[i]) b.values[i] = same_image(saved[i + 1], b.shapes[i]);
  size_t at = last + 1;
  for (size_t i = 0; i < program.nodes.size(); ++i)
    if (program.nodes[i].kind == Kind::kMaxPool)
      b.places[i] =
          reinterpret_cast<unsigned char*>(same_floats(saved[at++], b.shapes[i + 1].pixels() * round16(b.shapes[i + 1].c) / 4));
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
