#include "site_checks.h"

namespace fastblocks {

namespace {

Py_ssize_t total_size(const std::vector<Ref>& dicts) {
  Py_ssize_t size = 0;
  for (const Ref& dict : dicts) size += PyDict_GET_SIZE(dict.get());
  return size;
}

bool all_empty(const std::vector<Ref>& dicts) {
  for (const Ref& dict : dicts)
    if (PyDict_GET_SIZE(dict.get()) != 0) return false;
  return true;
}

// The children are the same objects, of the same types, in the same order.
bool same_children(const Modules& s) {
  size_t next = 0;
  for (const Ref& table : s.tables) {
    Py_ssize_t position = 0;
    PyObject *key, *child;
    while (PyDict_Next(table.get(), &position, &key, &child)) {
      if (next + 2 > s.children.size() || child != s.children[next].get() ||
          (PyObject*)Py_TYPE(child) != s.children[next + 1].get())
        return false;
      next += 2;
    }
  }
  return next == s.children.size();
}

// Whether a tensor is of the same type, sizes and strides; that it is on the CPU and float32 follows from its having a view.
bool same_tensor(const Place& p, PyObject* tensor) {
  TensorView v;
  return (PyObject*)Py_TYPE(tensor) == p.type.get() && try_view(tensor, &v) && alike(v, p.seen);
}

// The arguments as there are now, and the tensors among them; false where one came or went, or, if `compare`, differs.
bool gather(const Site& s, PyObject* args, PyObject** tensors, bool compare) {
  Py_ssize_t next = 1;
  const auto take = [&](const Place& p, PyObject** to) {
    PyObject* found = PyDict_GetItemWithError(p.dict.get(), p.name.get());
    if (!found && PyErr_Occurred()) throw PythonError();
    if (!found || (found != Py_None) != p.filled) return false;
    if (compare && p.filled && !same_tensor(p, found)) return false;
    if (p.filled) *tensors++ = found;
    Py_INCREF(found);
    *to = found;
    return true;
  };
  for (const Argument& a : s.arguments) {
    PyObject* value;
    if (a.kind == Argument::kValue) {
      value = Ref::borrow(a.value.get()).release();
    } else if (a.kind == Argument::kTensor) {
      if (!take(a.places[0], &value)) return false;
    } else {
      value = PyTuple_New((Py_ssize_t)a.places.size());
      if (!value) throw PythonError();
      PyTuple_SET_ITEM(args, next, value);
      for (size_t i = 0; i < a.places.size(); ++i)
        if (!take(a.places[i], &PyTuple_GET_ITEM(value, (Py_ssize_t)i))) return false;
      ++next;
      continue;
    }
    PyTuple_SET_ITEM(args, next++, value);
  }
  return true;
}

}  // namespace

Ref item(PyObject* sequence, Py_ssize_t index) { return Ref::checked(PySequence_GetItem(sequence, index)); }

std::vector<Ref> list_of(PyObject* sequence, bool dicts) {
  std::vector<Ref> all;
  const Py_ssize_t count = PySequence_Size(sequence);
  for (Py_ssize_t i = 0; i < count; ++i) {
    all.push_back(item(sequence, i));
    require(!dicts || PyDict_Check(all.back().get()), "fastblocks._C: a dict is expected");
  }
  return all;
}

bool truth_of(PyObject* function) {
  const Ref result = Ref::checked(PyObject_CallNoArgs(function));
  const int found = PyObject_IsTrue(result.get());
  if (found < 0) throw PythonError();
  return found == 1;
}

bool same_settings(const std::vector<Setting>& settings) {
  for (const Setting& setting : settings) {
    PyObject* found = PyDict_GetItemWithError(setting.dict.get(), setting.name.get());
    if (found == setting.value.get()) continue;
    if (!found) {
      if (PyErr_Occurred()) throw PythonError();
      return false;
    }
    const Ref held = Ref::borrow(found);
    const int equal = PyObject_RichCompareBool(found, setting.value.get(), Py_EQ);
    if (equal < 0) throw PythonError();
    if (!equal) return false;
  }
  return true;
}

std::vector<Setting> settings_at(PyObject* d, Py_ssize_t at) {
  std::vector<Setting> settings;
  for (const Ref& described : list_of(item(d, at).get(), false))
    settings.push_back({item(described.get(), 0), item(described.get(), 1), item(described.get(), 2)});
  return settings;
}

Modules modules_at(PyObject* d, Py_ssize_t at) {
  Modules m;
  m.tables = list_of(item(d, at).get(), true);
  for (const Ref& table : m.tables) {
    Py_ssize_t position = 0;
    PyObject *key, *child;
    while (PyDict_Next(table.get(), &position, &key, &child)) {
      m.children.push_back(Ref::borrow(child));
      m.children.push_back(Ref::borrow((PyObject*)Py_TYPE(child)));
    }
  }
  m.states = list_of(item(d, at + 1).get(), true), m.states_size = total_size(m.states);
  m.hooks = list_of(item(d, at + 2).get(), true), m.backward_hooks = list_of(item(d, at + 3).get(), true);
  m.settings = settings_at(d, at + 4);
  return m;
}

bool unchanged(const Modules& m, bool grad) {
  return same_children(m) && all_empty(m.hooks) && !(grad && !all_empty(m.backward_hooks)) &&
         total_size(m.states) == m.states_size && same_settings(m.settings);
}

// Torch's guard knows more of a tensor than its view says (whether it needs a gradient, whether its values are negated, which
// transforms are active) and reads more memory. Without gradients it is asked of the input alone: transforms show there too,
// and a module's tensor of the same strides is negated only if somebody assigns torch._neg_view to its data.
Ref arguments_if_unchanged(const Site& s, PyObject* input, bool grad, bool first) {
  if (!unchanged(s.modules, grad)) return Ref();
  const bool guard_all = grad || !views_tell_type();
  Ref args = Ref::checked(PyTuple_New((Py_ssize_t)s.arguments.size() + 1));
  PyTuple_SET_ITEM(args.get(), 0, Py_NewRef(input));
  PyObject* tensors[kMostTensors];
  tensors[0] = input;
  if (!gather(s, args.get(), tensors + 1, !guard_all)) return Ref();
  if (!guard_all && !first) return args;
  return guarded_alike(guard_all ? s.guard : s.input_guard, tensors, guard_all ? s.tensors : 1) ? std::move(args) : Ref();
}

bool guarded_alike(const Ref& guard, PyObject* const* tensors, size_t count) {
  return Ref::checked(PyObject_Vectorcall(guard.get(), tensors, count, nullptr)).get() == Py_True;
}

bool watched(const Site& s) {
  for (const Ref& watcher : s.watchers)
    if (truth_of(watcher.get())) return true;
  return false;
}

bool fits(const Site& s, const TensorView& v) {
  return (s.channels < 0 || v.size[1] == s.channels) &&
         (s.least[0] < 0 || (v.size[2] >= s.least[0] && v.size[3] >= s.least[1]));
}

PyObject* function_of(const Site& s) {
  PyObject* function = PyDict_GetItemWithError(s.table.get(), s.name.get());
  if (!function && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, s.name.get());
  if (!function) throw PythonError();
  return function;
}

}  // namespace fastblocks
