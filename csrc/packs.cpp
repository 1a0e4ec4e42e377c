#include "packs.h"

#include <new>
#include <unordered_map>
#include <vector>

#include "dispatch.h"
#include "memory.h"

namespace fastblocks {

namespace {

struct Slot {
  Ref reference, storage;
  TensorView seen;
  long long version;
  std::shared_ptr<const Pack> packs[Pack::kKinds];
};

uint64_t forgotten = 0;

// Never destroyed: the interpreter may be gone when static objects are.
std::unordered_map<PyObject*, Slot>& slots() {
  static auto* const all = new std::unordered_map<PyObject*, Slot>;
  return *all;
}

bool call_bool(PyObject* object, const char* method) {
  return PyObject_IsTrue(Ref::checked(PyObject_CallMethod(object, method, nullptr)).get()) == 1;
}

PyObject* on_death(PyObject* key, PyObject*) {
  forget_pack(static_cast<PyObject*>(PyLong_AsVoidPtr(key)));
  Py_RETURN_NONE;
}
PyMethodDef on_death_method = {"on_death", on_death, METH_O, nullptr};

std::shared_ptr<const Pack> make_pack(const TensorView& v, Pack::Kind kind, int64_t groups) {
  require(v.dims == 4 || v.dims == 2, "fastblocks._C: a weight has two or four dimensions");
  auto pack = std::make_shared<Pack>();
  const bool image = v.dims == 4;
  pack->kind = kind, pack->level = current_level(), pack->groups = groups;
  pack->out_channels = v.size[0], pack->in_channels = v.size[1];
  pack->kernel[0] = image ? v.size[2] : 1, pack->kernel[1] = image ? v.size[3] : 1;
  const int64_t strides[4] = {v.stride[0], v.stride[1], image ? v.stride[2] : 0, image ? v.stride[3] : 0};
  const int64_t taps = pack->kernel[0] * pack->kernel[1];
  require_sizes({pack->out_channels, pack->in_channels, pack->kernel[0], pack->kernel[1]});
  require(groups >= 1 && pack->out_channels % groups == 0, "fastblocks._C: groups that do not divide the output channels");
  const KernelTable& table = *level(pack->level);
  const int64_t part = pack->out_channels / groups, part_floats = table.pack_gemm_floats(part, pack->in_channels * taps);
  const int64_t floats =
      kind == Pack::kDepthwise ? table.pack_depthwise_floats(pack->out_channels, taps) : groups * part_floats;
  pack->data = static_cast<float*>(acquire_slab(floats * sizeof(float)));
  if (!pack->data) throw std::bad_alloc();
  if (kind == Pack::kDepthwise) {
    require(pack->in_channels == 1, "fastblocks._C: a depthwise weight has one input channel");
    const int64_t depthwise_strides[3] = {strides[0], strides[2], strides[3]};
    table.pack_depthwise(v.data, pack->out_channels, pack->kernel[0], pack->kernel[1], depthwise_strides, pack->data);
  } else {
    std::vector<int64_t> offsets(pack->in_channels * taps);
    for (int64_t g = 0; g < groups; ++g)
      table.pack_conv(v.data + g * part * strides[0], part, pack->in_channels, pack->kernel, strides, offsets.data(),
                      pack->data + g * part_floats);
  }
  return pack;
}

}  // namespace

Pack::~Pack() { release_slab(data); }

std::shared_ptr<const Pack> find_pack(PyObject* weight, const TensorView& v, Pack::Kind kind, int64_t groups) {
  const auto found = slots().find(weight);
  const bool there = found != slots().end();
  const bool known =
      there && found->second.seen.data == v.data && alike(found->second.seen, v) && found->second.version == version_of(weight);
  if (known) {
    const std::shared_ptr<const Pack>& pack = found->second.packs[kind];
    if (pack && pack->level == current_level() && pack->groups == groups) return pack;
  }
  std::shared_ptr<const Pack> pack = make_pack(v, kind, groups);
  // A tensor of inference mode carries no version, so nothing would tell that it was changed: packed at each call.
  if (call_bool(weight, "is_inference")) return pack;
  if (!known) {
    if (there) ++forgotten;  // the old slot's storage, and its address, are free
    const Ref key = Ref::checked(PyLong_FromVoidPtr(weight));
    const Ref callback = Ref::checked(PyCFunction_New(&on_death_method, key.get()));
    Slot slot;
    slot.reference = Ref::checked(PyWeakref_NewRef(weight, callback.get()));
    slot.storage = Ref::checked(PyObject_CallMethod(weight, "untyped_storage", nullptr));
    slot.seen = v;
    slot.version = version_of(weight);
    slots()[weight] = std::move(slot);
  }
  slots()[weight].packs[kind] = pack;
  return pack;
}

// What a slot holds may run Python code as it goes, so it goes when the table has let go of it.
void forget_pack(PyObject* weight) {
  ++forgotten;
  slots().extract(weight);
}

void forget_packs() {
  ++forgotten;
  std::unordered_map<PyObject*, Slot> all;
  all.swap(slots());
}

int64_t pack_slots() { return (int64_t)slots().size(); }

uint64_t packs_forgotten() { return forgotten; }

}  // namespace fastblocks
