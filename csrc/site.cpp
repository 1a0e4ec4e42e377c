#include "site.h"

#include <memory>
#include <utility>
#include <vector>

#include "cache_lines.h"
#include "ops.h"
#include "tensors.h"

namespace fastblocks {

namespace {

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

struct Chain {
  Modules modules;
  std::vector<Ref> layers;  // their __dict__s
  CacheLines lines;         // of what a check reads
};

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

bool truth_of(PyObject* function) {
  const Ref result = Ref::checked(PyObject_CallNoArgs(function));
  const int found = PyObject_IsTrue(result.get());
  if (found < 0) throw PythonError();
  return found == 1;
}

bool same_settings(const Modules& s) {
  for (const Setting& setting : s.settings) {
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

// Whether a tensor is of the same type, sizes and strides; that it is on the CPU and float32 follows from its having a view.
bool same_tensor(const Place& p, PyObject* tensor) {
  if ((PyObject*)Py_TYPE(tensor) != p.type.get()) return false;
  TensorView v;
  try {
    v = view(tensor);
  } catch (const PythonError&) {  // not for these kernels: the long way says what it is
    PyErr_Clear();
    return false;
  }
  if (v.dims != p.seen.dims) return false;
  for (int i = 0; i < v.dims; ++i)
    if (v.size[i] != p.seen.size[i] || v.stride[i] != p.seen.stride[i]) return false;
  return true;
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

bool unchanged(const Modules& m, bool grad) {
  return same_children(m) && all_empty(m.hooks) && !(grad && !all_empty(m.backward_hooks)) &&
         total_size(m.states) == m.states_size && same_settings(m);
}

// The arguments as there are now if all is as it was, else null. `input` is the input, or in a chain stands for it: its sizes
// are left out.
//
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
  const Ref& guard = guard_all ? s.guard : s.input_guard;
  const Ref same = Ref::checked(PyObject_Vectorcall(guard.get(), tensors, guard_all ? s.tensors : 1, nullptr));
  return same.get() == Py_True ? std::move(args) : Ref();
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

PyObject* none() { return Py_NewRef(Py_None); }

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

// The site of a layer, or null where it has none now.
const Site* site_of(PyObject* layer) {
  static PyObject* const name = PyUnicode_InternFromString("_site");
  PyObject* function = PyDict_GetItemWithError(layer, name);
  if (!function && PyErr_Occurred()) throw PythonError();
  if (!function || !PyCFunction_CheckExact(function) || PyCFunction_GET_FUNCTION(function) != call_site) return nullptr;
  return static_cast<const Site*>(PyCapsule_GetPointer(PyCFunction_GET_SELF(function), kCapsule));
}

void add_lines(CacheLines& lines, const Modules& m) {
  for (const Ref& dict : m.tables) lines.add_dict(dict.get(), (size_t)PyDict_GET_SIZE(dict.get()));
  for (const Ref& dict : m.states) lines.add_dict(dict.get(), (size_t)PyDict_GET_SIZE(dict.get()));
  for (const auto* hooks : {&m.hooks, &m.backward_hooks})
    for (const Ref& dict : *hooks) lines.add(dict.get(), 0, sizeof(PyDictObject));
  for (const Ref& child : m.children) lines.add(child.get(), 0, sizeof(PyObject));
  lines.add(m.settings.data(), 0, m.settings.size() * sizeof(Setting));
}

void add_lines(CacheLines& lines, const Site& s) {
  lines.add(&s, 0, sizeof(Site));
  add_lines(lines, s.modules);
  lines.add(s.arguments.data(), 0, s.arguments.size() * sizeof(Argument));
  for (const Argument& a : s.arguments) {
    lines.add(a.places.data(), 0, a.places.size() * sizeof(Place));
    for (const Place& p : a.places) {
      lines.add_dict(p.dict.get(), (size_t)PyDict_GET_SIZE(p.dict.get()));
      PyObject* tensor = PyDict_GetItemWithError(p.dict.get(), p.name.get());
      if (!tensor || !p.filled) continue;
      lines.add(tensor, 0, sizeof(PyObject) + sizeof(void*));
      // sizes stand in the middle of torch's tensor object, which is about 200 bytes long
      if (const void* record = record_of(tensor)) lines.add(record, 128, 128);
    }
  }
}

// The input stands for all that comes between: what ops give is as plain a tensor as the input that passed the first guard.
PyObject* call(const Chain& chain, PyObject* input) {
  chain.lines.fetch();
  const Site* const first = site_of(chain.layers[0].get());
  if (!first) return none();
  const bool grad = truth_of(first->grad_enabled.get());
  if (!unchanged(chain.modules, grad)) return none();
  std::vector<Ref> arguments;  // they keep alive what the calls read
  std::vector<std::unique_ptr<Call>> calls;
  std::vector<const Site*> sites;
  for (const Ref& layer : chain.layers) {
    const Site* site = site_of(layer.get());
    if (!site || (grad && site->needs_grad)) return none();
    arguments.push_back(arguments_if_unchanged(*site, input, grad, site == first));
    if (!arguments.back().get()) return none();
    sites.push_back(site);
  }
  if (watched(*first)) return none();
  for (size_t i = 0; i < sites.size(); ++i) {
    PyObject* args = arguments[i].get();
    calls.push_back(make_call(function_of(*sites[i]), &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args)));
    if (!calls.back()) return none();
  }
  return run_calls(calls, input, [&](size_t i, const TensorView& v) { return fits(*sites[i], v); }).release();
}

const char* const kChainCapsule = "fastblocks.chain";

PyObject* call_chain(PyObject* capsule, PyObject* input) {
  return guarded([&] { return call(*static_cast<const Chain*>(PyCapsule_GetPointer(capsule, kChainCapsule)), input); });
}

PyMethodDef chain_method = {"chain", call_chain, METH_O, nullptr};

// The items of a description from `at` on: tables, states, hooks, backward hooks, settings.
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
  for (const Ref& described : list_of(item(d, at + 4).get(), false))
    m.settings.push_back({item(described.get(), 0), item(described.get(), 1), item(described.get(), 2)});
  return m;
}

// A function of one argument on an object that lives as long as the function.
template <class Object>
PyObject* function_on(std::unique_ptr<Object> object, const char* name, PyMethodDef* method) {
  const Ref capsule = Ref::checked(PyCapsule_New(object.get(), name, [](PyObject* capsule) {
    delete static_cast<Object*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  }));
  object.release();
  return PyCFunction_New(method, capsule.get());
}

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

PyObject* make_chain_of(PyObject* d) {
  auto chain = std::make_unique<Chain>();
  chain->modules = modules_at(d, 0);
  chain->layers = list_of(item(d, 5).get(), true);
  require(!chain->layers.empty(), "fastblocks._C: a chain of no layers");
  add_lines(chain->lines, chain->modules);
  for (const Ref& layer : chain->layers)
    if (const Site* site = site_of(layer.get())) add_lines(chain->lines, *site);
  chain->lines.finish();
  return function_on(std::move(chain), kChainCapsule, &chain_method);
}

}  // namespace

PyObject* make_site(PyObject* description) noexcept {
  return guarded([&] { return make(description); });
}
PyObject* make_chain(PyObject* description) noexcept {
  return guarded([&] { return make_chain_of(description); });
}

}  // namespace fastblocks
