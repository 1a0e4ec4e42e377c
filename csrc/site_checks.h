// What call sites remember of modules and tensors, and whether it still holds.
#pragma once

#include <Python.h>

#include <memory>
#include <utility>
#include <vector>

#include "tensors.h"

namespace fastblocks {

// A tensor in a module's dictionary, and what it looked like; where there was none there must be none.
struct Place {
  Ref dict, name;
  bool filled;
  Ref type;
  TensorView seen;
};

struct Argument {
  enum Kind { kValue, kTensor, kRecord } kind;
  Ref value;
  std::vector<Place> places;
};

// dict[name] must be this value.
struct Setting {
  Ref dict, name, value;
};

constexpr size_t kMostTensors = 64;

// What modules looked like.
struct Modules {
  std::vector<Ref> tables, children, states, hooks, backward_hooks;
  std::vector<Setting> settings;
  Py_ssize_t states_size;
};

struct Site {
  Ref table, name, differentiable, grad_enabled;
  Ref guard, input_guard;  // of all tensors, and of the input alone
  std::vector<Ref> watchers;
  std::vector<Argument> arguments;
  size_t tensors = 1;
  bool needs_grad;
  int64_t channels, least[2];  // negative: any
  Modules modules;
};

// The site that a layer's __dict__ holds, or null where it has none now.
const Site* site_of(PyObject* layer);

Ref item(PyObject* sequence, Py_ssize_t index);
std::vector<Ref> list_of(PyObject* sequence, bool dicts);
bool truth_of(PyObject* function);
inline PyObject* none() { return Py_NewRef(Py_None); }

// The item `at` of a description: triples of dictionary, key and value; and whether the values stand there now.
std::vector<Setting> settings_at(PyObject* description, Py_ssize_t at);
bool same_settings(const std::vector<Setting>& settings);

// The items of a description from `at` on: tables, states, hooks, backward hooks, settings.
Modules modules_at(PyObject* description, Py_ssize_t at);

// Whether modules are as they were; `grad`: gradients are recorded.
bool unchanged(const Modules& m, bool grad);

// The arguments as there are now if all is as it was, else null. `input` is the input, or in a chain (not `first`) stands for
// it: its sizes are left out.
Ref arguments_if_unchanged(const Site& s, PyObject* input, bool grad, bool first);

// Whether a guard finds tensors as they were.
bool guarded_alike(const Ref& guard, PyObject* const* tensors, size_t count);

// Whether a profiler or a mode looks on.
bool watched(const Site& s);

// Whether an input has the channels and the size that the op needs.
bool fits(const Site& s, const TensorView& v);

// The op's function in the tier's table.
PyObject* function_of(const Site& s);

// A function of one argument on an object that lives as long as the function.
template <class Object>
PyObject* function_on(std::unique_ptr<Object> object, const char* name, PyMethodDef* method) {
  const Ref capsule = Ref::checked(PyCapsule_New(object.get(), name, [](PyObject* capsule) {
    delete static_cast<Object*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  }));
  object.release();
  return PyCFunction_New(method, capsule.get());
}

}  // namespace fastblocks
