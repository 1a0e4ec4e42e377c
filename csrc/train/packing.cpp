#include "packing.h"

namespace fastblocks {
namespace train {

// More than the second-level caches hold. In the last level much of it would still be there when it is read next, but writing
// past the caches spares reading what is overwritten, and leaves room for what is read: 2 MB took 0.96 to 0.99 of 16 MB.
constexpr int64_t kStreamBytes = int64_t(2) << 20;

std::vector<int64_t> depth_offsets(const TensorView& weight, const Route& route) {
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < weight.size[1]; ++i) {
    const int64_t c = route.order.empty() ? i : route.order[i];
    for (int64_t y = 0; y < weight.size[2]; ++y)
      for (int64_t x = 0; x < weight.size[3]; ++x)
        offsets.push_back(c * weight.stride[1] + y * weight.stride[2] + x * weight.stride[3]);
  }
  return offsets;
}

std::vector<int64_t> multiples(int64_t count, int64_t step) {
  std::vector<int64_t> offsets(count);
  for (int64_t i = 0; i < count; ++i) offsets[i] = i * step;
  return offsets;
}

bool streams(const Shape& shape) { return shape.c % kPadding == 0 && shape.floats() * (int64_t)sizeof(float) > kStreamBytes; }

namespace {

const float* pack_taps(Plan& plan, const TensorView& w, bool flip) {
  PackTaps p{w.data, w.size[0], {w.size[2], w.size[3]}, {w.stride[0], w.stride[2], w.stride[3]}, flip, nullptr};
  p.out = plan.floats(round16(w.size[0]) * w.size[2] * w.size[3]);
  plan.add(kernels().train.pack_taps, p);
  return p.out;
}

}  // namespace

const float* pack_forward(Plan& plan, const Bound& b, int64_t index) {
  const Node& node = b.program->nodes[index];
  const TensorView& w = b.convs[node.conv].weight;
  if (node.kind == Kind::kDepthwise) return pack_taps(plan, w, false);
  if (node.kind == Kind::kDense) {
    // It is small, and laid out as the kernel of inference has it.
    const int64_t depth = w.size[1] * w.size[2] * w.size[3];
    float* const pack = plan.floats(kernels().pack_gemm_floats(w.size[0], depth));
    std::vector<int64_t> offsets(depth);
    kernels().pack_conv(w.data, w.size[0], w.size[1], w.size + 2, w.stride, offsets.data(), pack);
    return pack;
  }
  const int64_t n = w.size[0] / node.groups;
  PackMatrix p{w.data, node.groups, n, w.size[1], n * w.stride[0], nullptr, nullptr, nullptr};
  p.channel_offsets = plan.keep(multiples(n, w.stride[0]));
  p.depth_offsets = plan.keep(depth_offsets(w, b.routes[index]));
  p.out = plan.floats(node.groups * round16(n) * w.size[1]);
  plan.add(kernels().train.pack_matrix, p);
  return p.out;
}

const float* pack_backward(Plan& plan, const Bound& b, int64_t index, const TrainDepthwise* depthwise) {
  const Node& node = b.program->nodes[index];
  const TensorView& w = b.convs[node.conv].weight;
  if (depthwise) return pack_taps(plan, w, flips(*depthwise));
  // Of the transposed matrix: its channels are the weight's depth.
  const int64_t n = w.size[0] / node.groups, depth = w.size[1] * w.size[2] * w.size[3];
  PackMatrix p{w.data, node.groups, depth, n, n * w.stride[0], nullptr, nullptr, nullptr};
  p.channel_offsets = plan.keep(depth_offsets(w, b.routes[index]));
  p.depth_offsets = plan.keep(multiples(n, w.stride[0]));
  p.out = plan.floats(node.groups * round16(depth) * n);
  plan.add(kernels().train.pack_matrix, p);
  return p.out;
}

void run_plan(Plan& plan) {
  PyThreadState* const state = PyEval_SaveThread();
  bool done = false;
  try {
    done = plan.run();
  } catch (const std::bad_alloc&) {  // not before Python has its lock again
  }
  PyEval_RestoreThread(state);
  if (!done) throw std::bad_alloc();
}

}  // namespace train
}  // namespace fastblocks
