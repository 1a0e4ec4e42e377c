#include "site.h"

#include <memory>
#include <utility>

#include "site_checks.h"

namespace fastblocks {

namespace {

Place place(PyObject* described) {
  Place p{item(described, 0), item(described, 1), false, Ref(), {}};
  require(PyDict_Check(p.dict.get()), "fastblocks._C: a dict is expected");
  PyObject* found = PyDict_GetItemWithError(p.dict.get(), p.name.get());
  require(found, "fastblocks._C: a tensor that is not there");
  p.filled = found != Py_None;
  if (p.filled) p.type = Ref::borrow((PyObject*)Py_TYPE(found)), p.seen = view(found);
  return p;
}

Argument argument(PyObject* described) {
  const Ref kind = item(described, 0), value = item(described, 1);
  Argument a;
  if (PyUnicode_CompareWithASCIIString(kind.get(), "value") == 0) {
    a.kind = Argument::kValue, a.value = Ref::borrow(value.get());
  } else if (PyUnicode_CompareWithASCIIString(kind.get(), "tensor") == 0) {
    a.kind = Argument::kTensor, a.places.push_back(place(value.get()));
  } else {
    a.kind = Argument::kRecord;
    for (const Ref& p : list_of(value.get(), false)) a.places.push_back(place(p.get()));
  }
  return a;
}

PyObject* call(const Site& s, PyObject* input) {
  const bool grad = truth_of(s.grad_enabled.get());
  const Ref args = arguments_if_unchanged(s, input, grad, true);
  if (!args.get() || watched(s) || !fits(s, view(input))) return none();
  if (s.needs_grad && grad) {
    if (s.differentiable.get() == Py_None) return none();
    PyObject* const both[] = {s.name.get(), args.get()};
    return PyObject_Vectorcall(s.differentiable.get(), both, 2, nullptr);
  }
  const Ref function = Ref::borrow(function_of(s));
  return PyObject_Vectorcall(function.get(), &PyTuple_GET_ITEM(args.get(), 0), (size_t)PyTuple_GET_SIZE(args.get()), nullptr);
}

const char* const kCapsule = "fastblocks.site";

PyObject* call_site(PyObject* capsule, PyObject* input) {
  return guarded([&] { return call(*static_cast<const Site*>(PyCapsule_GetPointer(capsule, kCapsule)), input); });
}

PyMethodDef call_method = {"site", call_site, METH_O, nullptr};

PyObject* make(PyObject* d) {
  auto s = std::make_unique<Site>();
  s->table = item(d, 0), s->name = item(d, 1);
  require(PyDict_Check(s->table.get()), "fastblocks._C: a dict is expected");
  for (const Ref& described : list_of(item(d, 2).get(), false)) {
    s->arguments.push_back(argument(described.get()));
    for (const Place& p : s->arguments.back().places) s->tensors += p.filled;
  }
  require(s->tensors <= kMostTensors, "fastblocks._C: more tensors than a site can hold");
  s->guard = item(d, 3), s->input_guard = item(d, 4), s->watchers = list_of(item(d, 5).get(), false);
  s->grad_enabled = item(d, 6), s->differentiable = item(d, 7);
  s->needs_grad = PyObject_IsTrue(item(d, 8).get()) == 1;
  s->channels = PyLong_AsLongLong(item(d, 9).get());
  s->least[0] = PyLong_AsLongLong(item(d, 10).get()), s->least[1] = PyLong_AsLongLong(item(d, 11).get());
  s->modules = modules_at(d, 12);
  if (PyErr_Occurred()) throw PythonError();
  return function_on(std::move(s), kCapsule, &call_method);
}

const char* const kCheckCapsule = "fastblocks.check";

PyObject* call_check(PyObject* capsule, PyObject*) {
  return guarded([&] {
    const auto* modules = static_cast<const Modules*>(PyCapsule_GetPointer(capsule, kCheckCapsule));
    return PyBool_FromLong(unchanged(*modules, true));
  });
}

PyMethodDef check_method = {"check", call_check, METH_NOARGS, nullptr};

PyObject* make_check_of(PyObject* d) {
  return function_on(std::make_unique<Modules>(modules_at(d, 0)), kCheckCapsule, &check_method);
}

}  // namespace

// The site of a layer, or null where it has none now.
const Site* site_of(PyObject* layer) {
  static PyObject* const name = PyUnicode_InternFromString("_site");
  PyObject* function = PyDict_GetItemWithError(layer, name);
  if (!function && PyErr_Occurred()) throw PythonError();
  if (!function || !PyCFunction_CheckExact(function) || PyCFunction_GET_FUNCTION(function) != call_site) return nullptr;
  return static_cast<const Site*>(PyCapsule_GetPointer(PyCFunction_GET_SELF(function), kCapsule));
}

PyObject* make_check(PyObject* description) noexcept {
  return guarded([&] { return make_check_of(description); });
}

PyObject* make_site(PyObject* description) noexcept {
  return guarded([&] { return make(description); });
}

}  // namespace fastblocks
