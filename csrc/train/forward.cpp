// The forward half of a chain: each convolution writes its output once, with its statistics; the next one reads it through
// them.
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "../ops/calls.h"
#include "../parallel.h"
#include "packing.h"
#include "plan.h"
#include "program.h"

namespace fastblocks {
namespace train {

namespace {

TensorView image_view(const Shape& s) { return {nullptr, 4, {s.n, s.c, s.h, s.w}, {s.floats() / s.n, 1, s.w * s.c, s.c}}; }

std::unique_ptr<Output> floats_output(int64_t count) {
  return std::make_unique<Output>(TensorView{nullptr, 1, {count, 1, 1, 1}, {1, 1, 1, 1}}, true);
}

class Forward {
 public:
  Forward(Bound& bound, Plan& plan) : b_(bound), plan_(plan), zeros_(plan.zeros(zeros_needed(bound))) {}

  void build() {
    const auto& nodes = b_.program->nodes;
    weights_.resize(nodes.size());
    for (size_t i = 0; i < nodes.size(); ++i)
      if (nodes[i].is_conv()) weights_[i] = pack_forward(plan_, b_, (int64_t)i);
    for (size_t i = 0; i < nodes.size(); ++i) {
      if (!b_.stored[i + 1]) continue;
      plan_.stage();
      add(nodes[i], (int64_t)i + 1);
    }
  }

 private:
  void add(const Node& node, int64_t value) {
    const TrainTable& t = kernels().train;
    const Shape &in = b_.shapes[node.input], &out = b_.shapes[value];
    switch (node.kind) {
      case Kind::kPointwise: {
        TrainPointwise p{};
        p.pixels = out.pixels(), p.out_channels = out.c, p.groups = node.groups;
        p.in_channels = node.channels < 0 ? in.c : node.channels;
        p.x = plan_.keep(b_.sources(b_.routes[value - 1])), p.pieces = (int64_t)b_.routes[value - 1].pieces.size();
        p.weight = weights_[value - 1], p.zeros = zeros_, p.z = b_.values[value];
        p.planes = b_.planes_of(value);
        p.stream = !node.frozen && p.planes.count == 0 && streams(out);
        TrainPointwise* job = plan_.add(t.pointwise, p);
        return normalise(node, value, job->items, &job->partials);
      }
      case Kind::kDepthwise: {
        TrainDepthwise p = b_.depthwise(node, value);
        p.weight = weights_[value - 1], p.zeros = zeros_;
        p.stream = !node.frozen && streams(out);
        TrainDepthwise* job = plan_.add(t.depthwise, p);
        return normalise(node, value, job->items, &job->partials);
      }
      case Kind::kDense: {
        add_dense(node, value);
        plan_.stage();
        MomentsPass p{};
        p.pixels = out.pixels(), p.channels = out.c, p.z = b_.values[value];
        if (node.frozen) return normalise(node, value, 0, nullptr);
        MomentsPass* job = plan_.add(t.moments, p);
        return normalise(node, value, job->items, &job->partials);
      }
      case Kind::kAdd:
      case Kind::kActivate: {
        Join p{};
        p.pixels = out.pixels(), p.channels = out.c, p.y = b_.values[value], p.y_stride = out.c;
        p.a = b_.source(node.input), p.clamp = node.clamp();
        if (node.kind == Kind::kAdd) p.b = b_.source(node.other);
        p.stream = streams(out);
        plan_.add(t.join, p);
        return;
      }
      case Kind::kPoolCat: {
        plan_.add(t.pool, pool_of(b_, node, value));
        Join p{};
        p.pixels = out.pixels(), p.channels = b_.shapes[node.other].c, p.a = b_.source(node.other);
        p.y = b_.values[value] + in.c, p.y_stride = out.c;
        plan_.add(t.join, p);
        return;
      }
      case Kind::kInterleave: {
        const Route& route = b_.routes[value - 1];
        Gather p{};
        p.pixels = out.pixels(), p.channels = out.c, p.y = b_.values[value];
        p.x = plan_.keep(b_.sources(route)), p.pieces = (int64_t)route.pieces.size();
        p.order = interleaving(plan_, route);
        plan_.add(t.gather, p);
        return;
      }
      case Kind::kMaxPool: plan_.add(t.pool, pool_of(b_, node, value)); return;
      case Kind::kMean: {
        TrainMean p = mean_of(b_, node);
        p.y = b_.values[value], p.y_stride = out.c;
        plan_.add(t.mean, p);
        return;
      }
    }
  }

  // The statistics of a convolution's output, from the items that wrote it.
  void normalise(const Node& node, int64_t value, int64_t items, double** partials) {
    const Shape& out = b_.shapes[value];
    const ConvTensors& conv = b_.convs[node.conv];
    NormForward p{};
    p.channels = out.c, p.count = out.pixels(), p.items = items;
    p.weight = conv.gamma, p.bias = conv.beta, p.running_mean = conv.running_mean, p.running_var = conv.running_var;
    p.update = node.update, p.momentum = conv.momentum, p.eps = node.eps, p.to = b_.norm(node);
    Memory memory;
    if (!node.frozen) {
      memory = plan_.take(items * (1 + 2 * round16(out.c)) * sizeof(double));
      p.partials = *partials = doubles(memory);
    }
    plan_.stage();
    plan_.add(kernels().train.norm_forward, p);
  }

  // The kernel of inference writes a dense convolution's output.
  void add_dense(const Node& node, int64_t value) {
    auto p = std::make_shared<ConvParams>(b_.dense(node, value));
    p->packed_weight = weights_[value - 1];
    Work work{};
    kernels().conv.prepare(p.get(), worker_count(), &work);
    if (work.shared) *work.shared = plan_.floats((int64_t)(work.shared_bytes / sizeof(float)) + 16);
    kernels().conv.begin(p.get());
    plan_.keep(std::vector<std::shared_ptr<ConvParams>>{p});
    for (int i = 0; i < work.count; ++i) plan_.add_phase(work.phases[i], work.worker_bytes);
  }

  Bound& b_;
  Plan& plan_;
  const float* zeros_;
  std::vector<const float*> weights_;
};

}  // namespace

TrainPool pool_of(const Bound& b, const Node& node, int64_t value) {
  const Shape &in = b.shapes[node.input], &out = b.shapes[value];
  TrainPool p{};
  p.average = node.kind == Kind::kPoolCat;
  p.images = in.n, p.height = in.h, p.width = in.w, p.channels = in.c, p.out_height = out.h, p.out_width = out.w;
  for (int i = 0; i < 2; ++i) p.kernel[i] = node.kernel[i], p.stride[i] = node.stride[i], p.padding[i] = node.padding[i];
  p.x = b.source(node.input);
  if (b.pools_z[value - 1]) {
    p.signs = b.convs[b.maker(node.input)->conv].gamma;
    p.x.norm = {}, p.x.clamp = {-INFINITY, INFINITY};
  }
  p.y = b.values[value], p.y_stride = out.c;
  p.places = b.places[value - 1];
  return p;
}

TrainMean mean_of(const Bound& b, const Node& node) {
  const Shape& in = b.shapes[node.input];
  TrainMean p{};
  p.images = in.n, p.pixels = in.h * in.w, p.channels = in.c;
  p.x = b.source(node.input);
  return p;
}

Interleaving interleaving(Plan& plan, const Route& route) {
  constexpr size_t kFew = 16;  // as fast one by one
  std::vector<int32_t> rest(route.order.size());
  for (size_t i = 0; i < rest.size(); ++i) rest[route.order[i]] = (int32_t)i;
  const auto is_run = [](const std::vector<int32_t>& at) {
    for (size_t i = 1; i < at.size(); ++i)
      if (at[i] != at[0] + (int32_t)i) return false;
    return true;
  };
  std::vector<int64_t> runs;
  while (rest.size() > kFew && !is_run(rest)) {
    std::vector<int32_t> by_turns[2];
    for (size_t i = 0; i < rest.size(); ++i) by_turns[i % 2].push_back(rest[i]);
    if (!is_run(by_turns[1])) break;
    runs.push_back(by_turns[1][0]);
    rest = std::move(by_turns[0]);
  }
  Interleaving order{};
  order.levels = (int64_t)runs.size(), order.runs = plan.keep(std::move(runs));
  order.rest_is_run = is_run(rest);
  order.rest_count = (int64_t)rest.size(), order.rest = plan.keep(std::move(rest));
  return order;
}

int64_t zeros_needed(const Bound& b) {
  int64_t most = 0;
  for (const Shape& s : b.shapes) most = s.c > most ? s.c : most;
  for (const ConvTensors& c : b.convs) {
    const int64_t depth = c.weight.size[1] * c.weight.size[2] * c.weight.size[3];
    most = depth > most ? depth : most;
  }
  return round16(most) + 64;
}

// (program, input, weights, affine, running, momenta): a list of the output, the norms' constants, the values of all nodes but
// the last (None where one is not stored), and where maxima were.
PyObject* forward(PyObject* const* args) {
  const Program& program = program_of(args[0]);
  Bound b(program, args[1], args[2], args[3]);
  PyObject** running = items(args[4], 2 * program.convs);
  PyObject** momenta = items(args[5], program.convs);
  for (const Node& node : program.nodes) {
    if (!node.is_conv()) continue;
    ConvTensors& conv = b.convs[node.conv];
    const int64_t channels = conv.weight.size[0];
    conv.running_mean = const_cast<float*>(vector_values(running[2 * node.conv], channels));
    conv.running_var = const_cast<float*>(vector_values(running[2 * node.conv + 1], channels));
    conv.momentum = number(momenta[node.conv]);
    require((!node.frozen && !node.update) || (conv.running_mean && conv.running_var), "fastblocks._C: no running statistics");
  }
  std::vector<std::unique_ptr<Output>> outputs;
  const size_t last = b.shapes.size() - 1;
  const auto value = [&](size_t i) {
    outputs.push_back(std::make_unique<Output>(image_view(b.shapes[i]), true));
    b.values[i] = outputs.back()->data();
  };
  value(last);
  outputs.push_back(floats_output(b.norm_floats));
  b.norms = outputs.back()->data();
  for (size_t i = 1; i < last; ++i) {
    if (b.stored[i])
      value(i);
    else
      outputs.push_back(nullptr);
  }
  for (size_t i = 0; i < program.nodes.size(); ++i)
    if (program.nodes[i].kind == Kind::kMaxPool) {
      outputs.push_back(floats_output(b.shapes[i + 1].pixels() * round16(b.shapes[i + 1].c) / 4));
      b.places[i] = reinterpret_cast<unsigned char*>(outputs.back()->data());
    }
  Plan plan;
  Forward(b, plan).build();
  run_plan(plan);
  const Ref list = Ref::checked(PyList_New((Py_ssize_t)outputs.size()));
  for (size_t i = 0; i < outputs.size(); ++i)
    PyList_SET_ITEM(list.get(), (Py_ssize_t)i, outputs[i] ? outputs[i]->tensor().release() : Ref::borrow(Py_None).release());
  return Ref::borrow(list.get()).release();
}

}  // namespace train
}  // namespace fastblocks
