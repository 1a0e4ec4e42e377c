// Where gradients go, and who finishes them.
#include "backward.h"

#include <cmath>

#include "../ops/calls.h"

namespace fastblocks {
namespace train {

const Node* Backward::summed(int64_t value, int64_t* of) const {
  const Node* maker = b_.maker(value);
  *of = value;
  if (maker && maker->kind == Kind::kAdd && needs_[maker->other]) {
    *of = maker->other;
    maker = b_.maker(maker->other);
  }
  return maker && maker->is_conv() ? maker : nullptr;
}

Finish Backward::finish_of(int64_t value) const {
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

bool Backward::is_plain(int64_t value) const {
  const Node* maker = b_.maker(value);
  return !maker || (!maker->is_conv() && maker->kind != Kind::kAdd);
}

void Backward::want_sums(int64_t value, int64_t items, Finish* finish) {
  int64_t of;
  const Node* conv = summed(value, &of);
  if (!conv) return;
  NormSums& s = sums_[conv->conv];
  s.items = items;
  s.memory = plan_.take(items * 2 * round16(b_.shapes[value].c) * sizeof(double));
  s.partials = finish->partials = doubles(s.memory);
}

void Backward::finish_pass(int64_t value, const Grad* addend) {
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

Grad Backward::fresh(int64_t value) {
  const Shape& s = b_.shapes[value];
  Memory memory = plan_.take((s.floats() + kPadding) * sizeof(float));
  float* data = floats(memory);
  return {std::move(memory), data, s.c};
}

float* Backward::input_output() {
  const Shape& s = b_.shapes[0];
  if (!outputs_[0])
    outputs_[0] =
        std::make_unique<Output>(TensorView{nullptr, 4, {s.n, s.c, s.h, s.w}, {s.floats() / s.n, 1, s.w * s.c, s.c}}, true);
  return outputs_[0]->data();
}

Grad Backward::target(int64_t value, bool last, bool slice) {
  if (slice && grads_[value].data) return grads_[value];
  if (value == 0 && (last || slice)) {
    delivered_ = true;
    return {nullptr, input_output(), b_.shapes[0].c};
  }
  return fresh(value);
}

void Backward::deliver() {
  const Shape& s = b_.shapes[0];
  FinishPass p{};
  p.pixels = s.pixels(), p.channels = s.c;
  p.g = grads_[0].data, p.stride = grads_[0].stride;
  p.out = input_output(), p.out_stride = s.c;
  plan_.stage();
  plan_.add(kernels().train.finish, p);
}

void Backward::pass_sum(int64_t value, const Grad& before, bool last) {
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

}  // namespace train
}  // namespace fastblocks
