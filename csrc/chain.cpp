#include <stddef.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cache_lines.h"
#include "dispatch.h"
#include "ops.h"
#include "packs.h"
#include "site.h"
#include "site_checks.h"

namespace fastblocks {

namespace {

// What a chain found at its last call, without gradients, and the calls that it made of it. While no dictionary was written to,
// no tensor changed what its view says and no weight its version, a next call runs them again. That reads a third of the memory
// of a check, and nothing of it twice.
//
// Tensors and children are borrowed: they are there while the dictionaries, which are held, are as they were.
struct Known {
  struct Dict {
    Ref dict;
    uint64_t version;
  };
  struct Child {
    PyObject* object;
    PyTypeObject* type;
  };
  struct Tensor {
    PyObject* object;
    PyTypeObject* type;
    TensorView view;
    int64_t version;  // of a weight, else 0
  };
  std::vector<Dict> dicts;
  std::vector<Child> children;
  std::vector<Tensor> tensors;
  const Site* first;
  TensorView input;
  int level;
  uint64_t packs_forgotten;
  Bound bound;
  CacheLines lines;
};

struct Chain {
  Modules modules;
  std::vector<Ref> layers;  // their __dict__s
  CacheLines lines;         // of what a check reads
  std::unique_ptr<Known> known;
};

bool is_weight(const TensorView& v) { return v.dims > 1; }

void add(Known& k, const Ref& dict) { k.dicts.push_back({Ref::borrow(dict.get()), version_of_dict(dict.get())}); }

void add(Known& k, const Modules& m) {
  for (const auto* dicts : {&m.tables, &m.states, &m.hooks})
    for (const Ref& dict : *dicts) add(k, dict);
  for (const Setting& setting : m.settings) add(k, setting.dict);
  for (size_t i = 0; i < m.children.size(); i += 2)
    k.children.push_back({m.children[i].get(), (PyTypeObject*)m.children[i + 1].get()});
}

void add(Known& k, const Place& p) {
  add(k, p.dict);
  if (!p.filled) return;
  PyObject* tensor = PyDict_GetItemWithError(p.dict.get(), p.name.get());
  if (!tensor) throw PythonError();
  const TensorView v = view(tensor);
  k.tensors.push_back({tensor, Py_TYPE(tensor), v, is_weight(v) ? version_of(tensor) : 0});
  // Sizes stand in the middle of torch's record of a tensor, which is about 200 bytes long.
  k.lines.add(tensor, 0, sizeof(PyObject) + sizeof(void*));
  if (const void* record = record_of(tensor)) k.lines.add(record, 128, 128);
}

// What is to be known of a chain that was just found good; null where its tensors or this Python do not tell of changes.
std::unique_ptr<Known> known_of(const Chain& chain, const std::vector<const Site*>& sites, PyObject* input) {
  if (!views_tell_type() || version_of_dict(chain.layers[0].get()) == 0) return nullptr;
  auto k = std::make_unique<Known>();
  k->first = sites[0], k->input = view(input);
  k->level = current_level(), k->packs_forgotten = packs_forgotten();
  for (const Ref& layer : chain.layers) add(*k, layer);
  add(*k, chain.modules);
  try {
    for (const Site* site : sites) {
      add(*k, site->table);
      add(*k, site->modules);
      for (const Argument& a : site->arguments)
        for (const Place& p : a.places) add(*k, p);
    }
  } catch (const PythonError&) {  // a weight of inference mode has no version
    PyErr_Clear();
    return nullptr;
  }
  const auto before = [](const Known::Dict& a, const Known::Dict& b) { return a.dict.get() < b.dict.get(); };
  const auto same = [](const Known::Dict& a, const Known::Dict& b) { return a.dict.get() == b.dict.get(); };
  std::sort(k->dicts.begin(), k->dicts.end(), before);
  k->dicts.erase(std::unique(k->dicts.begin(), k->dicts.end(), same), k->dicts.end());
  for (const Known::Dict& d : k->dicts) k->lines.add(d.dict.get(), 0, offsetof(PyDictObject, ma_keys));
  for (const Known::Child& child : k->children) k->lines.add(child.object, 0, sizeof(PyObject));
  k->lines.finish();
  return k;
}

bool holds(const Known::Tensor& t) {
  if (Py_TYPE(t.object) != t.type) return false;
  const TensorView v = view(t.object);
  return v.data == t.view.data && alike(v, t.view) && (!is_weight(v) || version_of(t.object) == t.version);
}

// Whether all is as it was, and the input like the one before. `now` is its view.
bool holds(const Known& k, PyObject* input, TensorView* now) {
  if (k.level != current_level() || k.packs_forgotten != packs_forgotten()) return false;
  for (const Known::Dict& d : k.dicts)
    if (version_of_dict(d.dict.get()) != d.version) return false;
  for (const Known::Child& child : k.children)
    if (Py_TYPE(child.object) != child.type) return false;
  const Site& first = *k.first;
  if (truth_of(first.grad_enabled.get()) || !guarded_alike(first.input_guard, &input, 1) || watched(first)) return false;
  try {
    *now = view(input);
    return alike(*now, k.input) && std::all_of(k.tensors.begin(), k.tensors.end(), [](const auto& t) { return holds(t); });
  } catch (const PythonError&) {  // not for these kernels: the long way says what it is
    PyErr_Clear();
    return false;
  }
}

// Keeps tensors alive while the interpreter may be elsewhere.
class Holding {
 public:
  explicit Holding(const std::vector<Known::Tensor>& tensors) : tensors_(tensors) {
    for (const Known::Tensor& t : tensors_) Py_INCREF(t.object);
  }
  ~Holding() {
    for (const Known::Tensor& t : tensors_) Py_DECREF(t.object);
  }
  Holding(const Holding&) = delete;
  Holding& operator=(const Holding&) = delete;

 private:
  const std::vector<Known::Tensor>& tensors_;
};

// Runs the calls of the last time, or answers null. They are taken out of the chain meanwhile: another thread makes its own.
PyObject* call_known(Chain& chain, PyObject* input) {
  std::unique_ptr<Known> known = std::move(chain.known);
  if (!known) return nullptr;
  known->lines.fetch();
  TensorView now;
  if (!holds(*known, input, &now)) return nullptr;
  Ref result;
  {
    const Holding holding(known->tensors);
    result = run_bound(known->bound, now.data);
  }
  chain.known = std::move(known);
  return result.release();
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
PyObject* call(Chain& chain, PyObject* input) {
  if (PyObject* result = call_known(chain, input)) return result;
  chain.lines.fetch();
  const Site* const first = site_of(chain.layers[0].get());
  if (!first) return none();
  const bool grad = truth_of(first->grad_enabled.get());
  if (!unchanged(chain.modules, grad)) return none();
  std::vector<Ref> arguments;  // they keep alive what the calls read
  std::vector<const Site*> sites;
  Bound bound;
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
    bound.calls.push_back(make_call(function_of(*sites[i]), &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args)));
    if (!bound.calls.back()) return none();
  }
  if (!bind_calls(bound, input, [&](size_t i, const TensorView& v) { return fits(*sites[i], v); })) return none();
  std::unique_ptr<Known> known;
  if (!grad && bound.calls[0]->reads_in_place(input)) known = known_of(chain, sites, input);
  Ref result = run_bound(bound, nullptr);
  if (known) {
    known->bound = std::move(bound);
    chain.known = std::move(known);
  }
  return result.release();
}

const char* const kChainCapsule = "fastblocks.chain";

PyObject* call_chain(PyObject* capsule, PyObject* input) {
  return guarded([&] { return call(*static_cast<Chain*>(PyCapsule_GetPointer(capsule, kChainCapsule)), input); });
}

PyMethodDef chain_method = {"chain", call_chain, METH_O, nullptr};

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

PyObject* make_chain(PyObject* description) noexcept {
  return guarded([&] { return make_chain_of(description); });
}

}  // namespace fastblocks
