// Where gradients go, and who finishes them.
#include "backward.h"

#include <cmath>

#include "../ops/calls.h"

namespace fastblocks {
namespace train {

const Node* Backward::summed(int64_t value, int64_t* of) const {
  const Node* maker = b_.maker(value);
  *of = value;
  if (maker && maker->kind == Kind::kAdd && needs_[maker->other]) *of = maker->other;
  return b_.normalised_by(*of);
}

Finish Backward::finish_of(int64_t value) const {
  Finish f{};
  int64_t of;
  const Node* conv = summed(value, &of);
  const Node* maker = b_.maker(value);
  f.clamp = {0.0f, NAN};
  if (const Node* own = b_.normalised_by(value)) {
    if (own->activation) f.mask = Mask::kNorm;
    if (own->activation == 2) f.clamp.high = 6.0f;
  } else if (maker && maker->kind == Kind::kAdd && maker->activation) {
    const bool made = b_.made_by_readers[value];
    const Source y = b_.source(made ? maker->input : value);
    f.mask = made ? Mask::kSum : Mask::kOutput;
    f.y = y.data, f.y_stride = y.stride;
    if (maker->activation == 2) f.clamp.high = 6.0f;
    if (made) of = maker->other, conv = b_.maker(of);
  }
  f.z_stride = b_.shapes[value].c;
  if (conv) f.z = b_.values[of], f.norm = b_.norm(*conv);
  return f;
}

bool Backward::is_plain(int64_t value) const {
  const Node* maker = b_.maker(value);
  return !maker || (!b_.normalised_by(value) && maker->kind != Kind::kAdd);
}

void Backward::want_sums(int64_t value, int64_t items, Finish* finish) {
  int64_t of;
  const Node* conv = summed(value, &of);
  if (!conv) return;
  const int64_t channels = b_.shapes[value].c, stride = round16(channels);
  const Memory memory = plan_.take(items * 2 * stride * sizeof(double));
  finish->partials = doubles(memory);
  sums_[conv->conv].push_back({memory, {0, channels, items, 2 * stride, finish->partials, finish->partials + stride}});
}

GradPiece* Backward::targets(const Route& route) {
  std::vector<GradPiece> pieces;
  for (const Piece& piece : route.pieces) {
    const int64_t value = piece.value, first = piece.first;
    GradPiece p{};
    p.channels = piece.channels;
    if (needs_[value]) {
      const bool whole = piece.channels == b_.shapes[value].c;
      if (!grads_[value].data) grads_[value] = target(value, true, false);
      p.dx = grads_[value].data + first, p.stride = grads_[value].stride;
      p.finish = finish_of(value);
      p.finish.stream = whole && route.pieces.size() == 1 && p.stride == piece.channels && streams(b_.shapes[value]);
      if (p.finish.z) p.finish.z += first, p.finish.norm = moved(p.finish.norm, first);
      if (p.finish.y) p.finish.y += first;
      if (!b_.planes[value].empty()) {
        const Bound::Place at = b_.place(value, first);
        p.dx = grads_[value].data + at.offset, p.stride = at.stride;
        p.finish.z = b_.values[value] + at.offset, p.finish.z_stride = at.stride;
      }
    }
    pieces.push_back(p);
  }
  return plan_.keep(std::move(pieces));
}

double* Backward::want_sums(const Route& route, GradPiece* pieces, int64_t items, int64_t stride) {
  Memory memory;
  int64_t at = 0;
  for (size_t i = 0; i < route.pieces.size(); ++i) {
    const Piece& piece = route.pieces[i];
    int64_t of;
    const Node* conv = pieces[i].dx ? summed(piece.value, &of) : nullptr;
    if (conv) {
      if (!memory) memory = plan_.take(items * 2 * stride * sizeof(double));
      double* const sums = doubles(memory) + at;
      pieces[i].finish.partials = sums;
      sums_[conv->conv].push_back({memory, {piece.first, piece.channels, items, 2 * stride, sums, sums + stride}});
    }
    at += round16(piece.channels);
  }
  return doubles(memory);
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
    p.finish.stream = streams(s);
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
