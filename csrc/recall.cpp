#include "recall.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "site_checks.h"

namespace fastblocks {

namespace {

constexpr size_t kMostWords = 384;
constexpr size_t kMostCalls = 1024;  // remembered; then all are forgotten
constexpr Py_ssize_t kRecord = 6;    // tensors of a convolution with its BatchNorm

// Where an argument of the op comes from.
struct Origin {
  enum Kind { kValue, kTensor, kRecord } kind;
  Ref value;
  int tensors[6];  // which of those given, negative: None
};

struct Remembered {
  std::vector<int64_t> words;
  Ref name, function, guard;
  std::vector<Origin> origins;
};

struct Recall {
  Ref table, record_type, grad_enabled;
  std::vector<Ref> tensor_types, watchers;
  std::vector<Setting> settings;
  std::unordered_map<uint64_t, std::shared_ptr<const Remembered>> calls;
};

// What a call looks like, as numbers that say where they end, and the tensors in it.
struct Look {
  int64_t words[kMostWords];
  size_t count = 0;
  PyObject* tensors[kMostTensors];
  size_t tensor_count = 0;

  bool add(int64_t word) {
    if (count == kMostWords) return false;
    words[count++] = word;
    return true;
  }
  uint64_t hash() const {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; ++i) h = (h ^ (uint64_t)words[i]) * 0x100000001b3u, h ^= h >> 29;
    return h;
  }
  bool is(const Remembered& r) const { return r.words.size() == count && std::equal(words, words + count, r.words.begin()); }
};

enum Kind : int64_t { kNone, kFalse, kTrue, kInt, kFloat, kText, kTuple, kList, kConv, kTensor };

int type_index(const Recall& r, PyObject* object) {
  for (size_t i = 0; i < r.tensor_types.size(); ++i)
    if ((PyObject*)Py_TYPE(object) == r.tensor_types[i].get()) return (int)i;
  return -1;
}

// False for what no remembered call can have: the checks decide.
bool add_tensor(PyObject* tensor, int type, Look& look) {
  if (look.tensor_count == kMostTensors) return false;
  look.tensors[look.tensor_count++] = tensor;
  TensorView v;
  if (!try_view(tensor, &v)) return false;
  bool room = look.add(kTensor | type << 8 | v.dims << 16);
  for (int i = 0; i < v.dims; ++i) room = room && look.add(v.size[i]) && look.add(v.stride[i]);
  return room;
}

bool add_text(PyObject* text, Look& look) {
  Py_ssize_t length;
  const char* bytes = PyUnicode_AsUTF8AndSize(text, &length);
  int64_t word = 0;
  if (!bytes) PyErr_Clear();
  if (!bytes || length > (Py_ssize_t)sizeof(word)) return false;
  std::memcpy(&word, bytes, (size_t)length);
  return look.add(kText | length << 8) && look.add(word);
}

bool add(const Recall& r, PyObject* value, Look& look) {
  if (value == Py_None) return look.add(kNone);
  if (value == Py_False || value == Py_True) return look.add(value == Py_True ? kTrue : kFalse);
  if (PyLong_CheckExact(value)) {
    int overflow;
    const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    return !overflow && look.add(kInt) && look.add(number);
  }
  if (PyFloat_CheckExact(value)) {
    int64_t bits;
    const double number = PyFloat_AS_DOUBLE(value);
    std::memcpy(&bits, &number, sizeof(bits));
    return look.add(kFloat) && look.add(bits);
  }
  if (PyUnicode_CheckExact(value)) return add_text(value, look);
  const bool record = (PyObject*)Py_TYPE(value) == r.record_type.get();
  if (record || PyTuple_CheckExact(value) || PyList_CheckExact(value)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
    bool room = look.add((record ? kConv : PyList_CheckExact(value) ? kList : kTuple) | (int64_t)count << 8);
    for (Py_ssize_t i = 0; room && i < count; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(value, i);
      room = (record || PyLong_CheckExact(item)) && add(r, item, look);  // else a pair of numbers
    }
    return room;
  }
  const int type = type_index(r, value);
  return type >= 0 && add_tensor(value, type, look);
}

bool look_at(const Recall& r, PyObject* name, PyObject* const* given, Py_ssize_t count, Look& look) {
  bool room = look.add((int64_t)(intptr_t)name) && look.add(truth_of(r.grad_enabled.get()));
  for (Py_ssize_t i = 0; room && i < count; ++i) room = add(r, given[i], look);
  return room && look.tensor_count > 0;
}

PyObject* value_of(const Origin& origin, const Look& look) {
  if (origin.kind == Origin::kValue) return Py_NewRef(origin.value.get());
  if (origin.kind == Origin::kTensor) return Py_NewRef(look.tensors[origin.tensors[0]]);
  PyObject* record = PyTuple_New(kRecord);
  if (!record) throw PythonError();
  for (Py_ssize_t i = 0; i < kRecord; ++i) {
    const int tensor = origin.tensors[i];
    PyTuple_SET_ITEM(record, i, Py_NewRef(tensor < 0 ? Py_None : look.tensors[tensor]));
  }
  return record;
}

PyObject* recall(const Recall& r, PyObject* const* args, Py_ssize_t count) {
  require(count >= 1, "fastblocks._C: a name is expected");
  Look look;
  if (!look_at(r, args[0], args + 1, count - 1, look)) return none();
  const auto found = r.calls.find(look.hash());
  if (found == r.calls.end() || !look.is(*found->second)) return none();
  const std::shared_ptr<const Remembered> call = found->second;  // held: another thread may forget it
  if (PyDict_GetItemWithError(r.table.get(), args[0]) != call->function.get()) {
    if (PyErr_Occurred()) throw PythonError();
    return none();
  }
  for (const Ref& watcher : r.watchers)
    if (truth_of(watcher.get())) return none();
  if (!same_settings(r.settings) || !guarded_alike(call->guard, look.tensors, look.tensor_count)) return none();
  std::vector<Ref> held;
  std::vector<PyObject*> arguments;
  held.reserve(call->origins.size());
  arguments.reserve(call->origins.size());
  for (const Origin& origin : call->origins) {
    held.emplace_back(value_of(origin, look));
    arguments.push_back(held.back().get());
  }
  return PyObject_Vectorcall(call->function.get(), arguments.data(), arguments.size(), nullptr);
}

int index_of(PyObject* tensor, const Look& look) {
  for (size_t i = 0; i < look.tensor_count; ++i)
    if (look.tensors[i] == tensor) return (int)i;
  return -1;
}

// False where an argument is a tensor that was not given. Marks those that were.
bool find_origin(PyObject* argument, const Recall& r, const Look& look, Origin& origin, bool* used) {
  const auto is_tensor = [&](PyObject* object) { return type_index(r, object) >= 0; };
  origin.kind = Origin::kValue;
  if (is_tensor(argument)) {
    origin.kind = Origin::kTensor;
    origin.tensors[0] = index_of(argument, look);
    if (origin.tensors[0] >= 0) used[origin.tensors[0]] = true;
    return origin.tensors[0] >= 0;
  }
  if (PyTuple_CheckExact(argument) && PyTuple_GET_SIZE(argument) == kRecord && is_tensor(PyTuple_GET_ITEM(argument, 0))) {
    origin.kind = Origin::kRecord;
    for (Py_ssize_t i = 0; i < kRecord; ++i) {
      PyObject* item = PyTuple_GET_ITEM(argument, i);
      origin.tensors[i] = index_of(item, look);
      if (origin.tensors[i] >= 0)
        used[origin.tensors[i]] = true;
      else if (item != Py_None)
        return false;
    }
    return true;
  }
  origin.value = Ref::borrow(argument);
  return true;
}

PyObject* remember(Recall& r, PyObject* const* args, Py_ssize_t count) {
  require(count == 4 && PyTuple_CheckExact(args[1]) && PyTuple_CheckExact(args[2]),
          "fastblocks._C: a name, two tuples and a function are expected");
  Look look;
  if (!look_at(r, args[0], &PyTuple_GET_ITEM(args[1], 0), PyTuple_GET_SIZE(args[1]), look)) return none();
  // The origin of a tensor that was given twice cannot be told.
  for (size_t i = 0; i < look.tensor_count; ++i)
    if (index_of(look.tensors[i], look) != (int)i) return none();
  auto call = std::make_shared<Remembered>();
  call->words.assign(look.words, look.words + look.count);
  PyObject* function = PyDict_GetItemWithError(r.table.get(), args[0]);
  if (!function) return PyErr_Occurred() ? throw PythonError() : none();
  call->name = Ref::borrow(args[0]), call->function = Ref::borrow(function);
  call->origins.resize((size_t)PyTuple_GET_SIZE(args[2]));
  bool used[kMostTensors] = {};
  for (size_t i = 0; i < call->origins.size(); ++i)
    if (!find_origin(PyTuple_GET_ITEM(args[2], (Py_ssize_t)i), r, look, call->origins[i], used)) return none();
  // A tensor that became something else, such as a truth value, was asked for what it holds.
  if (!std::all_of(used, used + look.tensor_count, [](bool u) { return u; })) return none();
  call->guard = Ref::checked(PyObject_Vectorcall(args[3], look.tensors, look.tensor_count, nullptr));
  if (r.calls.size() >= kMostCalls) r.calls.clear();
  r.calls[look.hash()] = std::move(call);
  return none();
}

const char* const kCapsule = "fastblocks.recall";

Recall& recall_of(PyObject* capsule) { return *static_cast<Recall*>(PyCapsule_GetPointer(capsule, kCapsule)); }

PyObject* call_recall(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] { return recall(recall_of(capsule), args, count); });
}

PyObject* call_remember(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] { return remember(recall_of(capsule), args, count); });
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef recall_method = {"recall", fast(call_recall), METH_FASTCALL, nullptr};
PyMethodDef remember_method = {"remember", fast(call_remember), METH_FASTCALL, nullptr};

PyObject* make(PyObject* d) {
  auto r = std::make_unique<Recall>();
  r->table = item(d, 0), r->record_type = item(d, 1), r->grad_enabled = item(d, 2);
  require(PyDict_Check(r->table.get()), "fastblocks._C: a dict is expected");
  r->tensor_types = list_of(item(d, 3).get(), false), r->watchers = list_of(item(d, 4).get(), false);
  r->settings = settings_at(d, 5);
  const Ref recalling = Ref::checked(function_on(std::move(r), kCapsule, &recall_method));
  const Ref remembering = Ref::checked(PyCFunction_New(&remember_method, PyCFunction_GET_SELF(recalling.get())));
  return PyTuple_Pack(2, recalling.get(), remembering.get());
}

}  // namespace

PyObject* make_recall(PyObject* description) noexcept {
  return guarded([&] { return make(description); });
}

}  // namespace fastblocks
