// A fully connected layer in training: functions for Python, each of which returns a new reference.
#pragma once

#include <Python.h>

namespace fastblocks {
namespace train {

// (input, weight, bias or None): the output.
PyObject* linear_forward(PyObject* const* args);
// (gradient, input, weight, (whether each is needed)): a list of the gradients of input, weight and bias, or None.
PyObject* linear_backward(PyObject* const* args);

}  // namespace train
}  // namespace fastblocks
