// The ops on tensors: what a call of torch.ops.fastblocks.NAME does in the native tier. The arguments are those of the tiers'
// tables; they were checked, in the user's terms, in fastblocks/functional. Here only that no kernel can leave its memory.
#pragma once

#include <Python.h>

#include <functional>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "tensors.h"

namespace fastblocks {

// What goes into an op and comes out of it: a tensor, or, between the ops of a chain, memory that is no tensor.
struct Value {
  TensorView view;   // as torch sees it, or would
  PyObject* tensor;  // borrowed; null: `image` has the data, NHWC and dense
  Image image;
};

struct Step {
  const Op* op;
  void* params;
  Room room = {};  // of the whole call's output; the call's other steps come behind this one
};

// What can make rows of its output for another op; one of them, or none.
struct RowMaker {
  ConvParams* conv = nullptr;
  BlockParams* block = nullptr;
};

// One call of an op. First it reads its arguments (make_call), then the input's sizes (bind), then it is told where input and
// output lie (place); then it can run. After finish() it can be placed and run again.
class Call {
 public:
  virtual ~Call() = default;
  // Returns the output, without memory.
  virtual Value bind(const Value& input) = 0;
  // `input` is null where the input is the tensor that the call was bound to.
  virtual void place(float* input, float* output) = 0;
  // What to run, in this order.
  virtual void steps(std::vector<Step>& to) = 0;
  // Lets go of what belongs to one run: the input, and memory.
  virtual void finish() = 0;
  // Whether a tensor that the call was bound to is read where it lies, so that place() may name another one like it.
  virtual bool reads_in_place(PyObject* tensor) const = 0;

  // A convolution, or a block, need not write its output where the next call is its only reader and makes the rows itself, a
  // few at a time, as it needs them. Both are asked when they are bound: what this call's rows are made by; and whether the
  // call takes over what the call before is made by. Neither is then told where that output lies.
  virtual RowMaker row_maker() { return {}; }
  virtual bool absorb(const RowMaker&) { return false; }
};

// The call of the op behind a function of the tiers' table; null where that is none of op_methods(). args[0], the input, is not
// read; the others must outlive the call.
std::unique_ptr<Call> make_call(PyObject* function, PyObject* const* args, Py_ssize_t count);

// Runs the steps in order, in one entry of the thread pool.
void run_steps(const std::vector<Step>& steps);

// Calls bound to an input and to each other.
struct Bound {
  std::vector<std::unique_ptr<Call>> calls;
  TensorView out;
  int64_t floats[2];  // of the two memories that outputs between them take turns in
  struct Between {
    bool absorbed;  // the next call makes it: it needs no memory
    int memory;     // else, which of the two
    Room room;
  };
  std::vector<Between> between;  // each call's output but the last one's
};

// Binds calls. Where `fits`, if given, says that an input is not good for its call, the result is false.
typedef std::function<bool(size_t call, const TensorView& input)> Fits;
bool bind_calls(Bound& bound, PyObject* input, const Fits& fits = {});

// Runs them in one entry of the thread pool. `input` is the data of another input like the one that they were bound to, or null
// for that one.
Ref run_bound(const Bound& bound, float* input);

// The ops as functions for Python, ended by a null row.
PyMethodDef* op_methods();

}  // namespace fastblocks
