// A fully connected layer in training.
#include "linear.h"

#include <memory>

#include "../ops/calls.h"
#include "packing.h"
#include "plan.h"

namespace fastblocks {
namespace train {

namespace {

// A matrix whose rows are dense, and the tensor that holds it.
struct Matrix {
  Ref owner;
  TensorView v;
};

Matrix matrix(PyObject* tensor) {
  TensorView v = view(tensor);
  require(v.dims == 2 && v.size[0] >= 1 && v.size[1] >= 1, "fastblocks._C: a matrix");
  const bool dense = v.size[1] == 1 || v.stride[1] == 1;
  Ref owner = dense ? Ref::borrow(tensor) : contiguous(tensor);
  if (!dense) v = view(owner.get());
  return {std::move(owner), v};
}

Matrix weight_of(PyObject* tensor) {
  Matrix w = matrix(tensor);
  require(w.v.size[0] == 1 || w.v.stride[0] == w.v.size[1], "fastblocks._C: a weight with gaps");
  return w;
}

std::unique_ptr<Output> matrix_output(int64_t rows, int64_t columns) {
  return std::make_unique<Output>(TensorView{nullptr, 2, {rows, columns, 1, 1}, {columns, 1, 1, 1}}, true);
}

}  // namespace

PyObject* linear_forward(PyObject* const* args) {
  const Matrix x = matrix(args[0]), w = weight_of(args[1]);
  TrainLinear p{};
  p.rows = x.v.size[0], p.in = x.v.size[1], p.out = w.v.size[0];
  require(w.v.size[1] == p.in, "fastblocks._C: a weight of another number of inputs");
  p.x = x.v.data, p.x_stride = x.v.stride[0], p.w = w.v.data;
  p.bias = vector_values(args[2], p.out);
  const auto y = matrix_output(p.rows, p.out);
  p.y = y->data();
  Plan plan;
  plan.add(kernels().train.linear, p);
  run_plan(plan);
  return y->tensor().release();
}

PyObject* linear_backward(PyObject* const* args) {
  const Matrix g = matrix(args[0]), x = matrix(args[1]), w = weight_of(args[2]);
  PyObject** flags = items(args[3], 3);
  TrainLinearGrad p{};
  p.rows = x.v.size[0], p.in = x.v.size[1], p.out = w.v.size[0];
  require(w.v.size[1] == p.in && g.v.size[0] == p.rows && g.v.size[1] == p.out, "fastblocks._C: a gradient of another shape");
  p.g = g.v.data, p.g_stride = g.v.stride[0], p.x = x.v.data, p.x_stride = x.v.stride[0], p.w = w.v.data;
  std::unique_ptr<Output> outputs[3];
  if (truth(flags[0])) outputs[0] = matrix_output(p.rows, p.in), p.dx = outputs[0]->data();
  if (truth(flags[1])) outputs[1] = matrix_output(p.out, p.in), p.dw = outputs[1]->data();
  if (truth(flags[2])) {
    outputs[2] = std::make_unique<Output>(TensorView{nullptr, 1, {p.out, 1, 1, 1}, {1, 1, 1, 1}}, true);
    p.dbias = outputs[2]->data();
  }
  Plan plan;
  plan.add(kernels().train.linear_grad, p);
  run_plan(plan);
  const Ref list = Ref::checked(PyList_New(3));
  for (Py_ssize_t i = 0; i < 3; ++i)
    PyList_SET_ITEM(list.get(), i, outputs[i] ? outputs[i]->tensor().release() : Ref::borrow(Py_None).release());
  return Ref::borrow(list.get()).release();
}

}  // namespace train
}  // namespace fastblocks
