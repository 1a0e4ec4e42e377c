// A call site: a place in a program from which one op is called again and again with the same tensors.
//
// Checking a block's modules and tensors costs more than a small kernel. So Python checks them in full once and describes here
// what it saw (functional/site.py); later calls compare it all with what there is now, in one pass without Python code. Where
// anything differs the site answers None, and Python checks again.
#pragma once

#include <Python.h>

namespace fastblocks {

// The site as a function of one argument, the input: the op's result, or None. `description` is functional/site.py's tuple.
PyObject* make_site(PyObject* description) noexcept;

// Layers one after the other, each with a call site of its own, as one function of the input: the last one's result, or None.
// All of them run in one entry of the thread pool, and nothing between them becomes a tensor. `description` is a tuple of what
// a Modules tuple has (tables, states, hooks, backward hooks, settings) and of the layers' __dict__s.
PyObject* make_chain(PyObject* description) noexcept;

// Whether modules are as they were, as a function without arguments. `description` is what a Modules tuple has.
PyObject* make_check(PyObject* description) noexcept;

}  // namespace fastblocks
