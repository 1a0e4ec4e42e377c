#include "ops.h"

#include <algorithm>
#include <new>
#include <utility>

#include "memory.h"
#include "ops/calls.h"
#include "parallel.h"
#include "tensors.h"
#include "train/program.h"

namespace fastblocks {

namespace {

// Lets other Python threads run.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

struct Beginning {
  void (*begin)(void* params);
  void* params;
};

void begin_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const auto* all = static_cast<const Beginning*>(params);
  for (int64_t i = begin; i < end; ++i) all[i].begin(all[i].params);
}

}  // namespace

// What ops do at their beginning needs no input, so it makes one phase for all.
void run_steps(const std::vector<Step>& steps) {
  const int workers = worker_count();
  std::vector<Phase> phases(1);
  std::vector<Beginning> beginnings;
  std::vector<std::pair<float**, int64_t>> shared;
  size_t worker_bytes = 0;
  int64_t floats = 0;
  for (const auto& [op, params, room] : steps) {
    Work work{};
    op->prepare(params, workers, &work);
    work.phases[0].room = room;
    phases.insert(phases.end(), work.phases, work.phases + work.count);
    worker_bytes = std::max(worker_bytes, work.worker_bytes);
    if (work.shared) shared.push_back({work.shared, floats});
    floats += (int64_t)(work.shared_bytes / sizeof(float) + 32) / 16 * 16;
    if (op->begin) beginnings.push_back({op->begin, params});
  }
  const Slab memory(floats * sizeof(float));
  for (const auto& [to, offset] : shared) *to = memory.floats(offset);
  bool done;
  {
    const Unlocked unlocked;
    // Alone, it is not worth a phase.
    const bool one = beginnings.size() < 2;
    if (one && !beginnings.empty()) begin_run(beginnings.data(), 0, 1, nullptr);
    phases[0] = {begin_run, beginnings.data(), (int64_t)beginnings.size(), 0};
    done = run(phases.data() + one, (int)phases.size() - one, worker_bytes, workers);
  }
  if (!done) throw std::bad_alloc();
}

namespace {

bool right_count(Py_ssize_t wanted, Py_ssize_t count) {
  if (wanted != count) PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, count);
  return wanted == count;
}

template <Maker* kMake, Py_ssize_t kArguments>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) noexcept {
  if (!right_count(kArguments, count)) return nullptr;
  return guarded([&] {
    Bound bound;
    bound.calls.push_back(kMake(args));
    bind_calls(bound, args[0]);
    return run_bound(bound, nullptr).release();
  });
}

template <PyObject* (*kFunction)(PyObject* const*), Py_ssize_t kArguments>
PyObject* function_entry(PyObject*, PyObject* const* args, Py_ssize_t count) noexcept {
  if (!right_count(kArguments, count)) return nullptr;
  return guarded([&] { return kFunction(args); });
}

struct OpRow {
  const char* name;
  PyObject* (*entry)(PyObject*, PyObject* const*, Py_ssize_t) noexcept;
  Maker* make;  // null: no part of a chain
  Py_ssize_t arguments;
};

template <Maker* kMake, Py_ssize_t kArguments>
constexpr OpRow row(const char* name) {
  return {name, entry<kMake, kArguments>, kMake, kArguments};
}

template <PyObject* (*kFunction)(PyObject* const*), Py_ssize_t kArguments>
constexpr OpRow function_row(const char* name) {
  return {name, function_entry<kFunction, kArguments>, nullptr, kArguments};
}

constexpr OpRow kOps[] = {
    row<conv_bn_act, 7>("conv_bn_act"),
    row<pointwise_conv_bn_act, 5>("pointwise_conv_bn_act"),
    row<grouped_pointwise_conv_bn_act, 7>("grouped_pointwise_conv_bn_act"),
    row<depthwise_conv_bn_act, 7>("depthwise_conv_bn_act"),
    row<inverted_residual, 9>("inverted_residual"),
    row<depthwise_separable, 7>("depthwise_separable"),
    row<shuffle_unit, 8>("shuffle_unit"),
    row<shuffle_unit_v2, 9>("shuffle_unit_v2"),
    row<max_pool2d, 4>("max_pool2d"),
    row<avg_pool2d, 4>("avg_pool2d"),
    row<global_avg_pool, 1>("global_avg_pool"),
    row<linear, 3>("linear"),
    function_row<channel_shuffle, 2>("channel_shuffle"),
    function_row<channel_shuffle_split, 2>("channel_shuffle_split"),
    function_row<cat_shuffle_split, 3>("cat_shuffle_split"),
    function_row<train::make_program, 1>("make_program"),
    function_row<train::forward, 6>("chain_forward"),
    function_row<train::backward, 7>("chain_backward"),
};
constexpr size_t kOpCount = sizeof(kOps) / sizeof(kOps[0]);

PyCFunction function_of(const OpRow& row) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(row.entry)); }

}  // namespace

std::unique_ptr<Call> make_call(PyObject* function, PyObject* const* args, Py_ssize_t count) {
  if (!PyCFunction_CheckExact(function)) return nullptr;
  const PyCFunction wanted = PyCFunction_GET_FUNCTION(function);
  for (const OpRow& row : kOps)
    if (function_of(row) == wanted && row.make && row.arguments == count) return row.make(args);
  return nullptr;
}

bool bind_calls(Bound& b, PyObject* input, const Fits& fits) {
  Value value{view(input), input, {}};
  b.floats[0] = b.floats[1] = 0;
  b.between.assign(b.calls.size() - 1, {});
  int64_t held[2] = {0, 0};
  int memory = 0;
  for (size_t i = 0; i < b.calls.size(); ++i) {
    if (fits && !fits(i, value.view)) return false;
    const TensorView before = value.view;
    value = b.calls[i]->bind(value);
    if (i == 0) continue;
    Bound::Between& between = b.between[i - 1];
    between.absorbed = b.calls[i]->absorb(b.calls[i - 1]->row_maker());
    if (between.absorbed) continue;
    // Each output takes the memory of the last but one, where the call before may still read: see Phase for who waits.
    const int64_t floats = before.size[0] * before.size[1] * before.size[2] * before.size[3];
    between.memory = memory;
    if (held[memory] > 0) between.room = {floats, held[memory]};
    held[memory] = floats;
    b.floats[memory] = std::max(b.floats[memory], floats);
    memory = 1 - memory;
  }
  b.out = value.view;
  return true;
}

Ref run_bound(const Bound& b, float* input) {
  const size_t last = b.calls.size() - 1;
  const auto bytes = [](int64_t floats) { return floats > 0 ? (size_t)(floats + 16) * sizeof(float) : 0; };
  const Slab first(bytes(b.floats[0])), second(bytes(b.floats[1]));
  Output out(b.out);
  float* const memory[2] = {first.floats(), second.floats()};
  const auto behind = [&](size_t i) { return b.between[i].absorbed ? nullptr : memory[b.between[i].memory]; };
  for (size_t i = 0; i <= last; ++i) b.calls[i]->place(i > 0 ? behind(i - 1) : input, i < last ? behind(i) : out.data());
  std::vector<Step> steps;
  for (size_t i = 0; i <= last; ++i) {
    const size_t first_step = steps.size();
    b.calls[i]->steps(steps);
    if (i < last && steps.size() > first_step) steps[first_step].room = b.between[i].room;
  }
  run_steps(steps);
  for (const auto& call : b.calls) call->finish();
  return out.tensor();
}

PyMethodDef* op_methods() {
  static PyMethodDef methods[kOpCount + 1] = {};
  for (size_t i = 0; i < kOpCount; ++i) methods[i] = {kOps[i].name, function_of(kOps[i]), METH_FASTCALL, nullptr};
  return methods;
}

}  // namespace fastblocks
