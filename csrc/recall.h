// Calls of the ops as functions, remembered by what they looked like.
//
// The checks of an op depend on its arguments' types, sizes, strides and numbers alone, never on values or on which object a
// tensor is. So what a checked call looked like is kept, and a call that looks the same goes straight to the op. No tensor is
// kept. (Layers have more to compare, and keep more: site.h.)
#pragma once

#include <Python.h>

namespace fastblocks {

// Two functions, as a tuple. `recall(name, *given)`: the op's result, or None for a call unlike those remembered.
// `remember(name, given, args, make_guard)`: after a call that passed all checks, what the user gave, what the op was given,
// and a function of the tensors that were given, which makes torch's guard of them. `description` is functional/recall.py's
// tuple.
PyObject* make_recall(PyObject* description) noexcept;

}  // namespace fastblocks
