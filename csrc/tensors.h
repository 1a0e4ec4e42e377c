// torch's tensors without torch's headers: their addresses, sizes and strides come through the DLPack exchange API of the
// tensor type, or, where a torch has none, through the tensor's own methods. Outputs travel as DLPack too, in recycled memory.
//
// Everything here needs the GIL. A PythonError is thrown where a Python exception has been set.
#pragma once

#include <Python.h>
#include <stdint.h>

#include <initializer_list>
#include <memory>
#include <new>

#include "dlpack.h"
#include "kernels/params.h"

namespace fastblocks {

struct PythonError {};

// Runs what Python called: a new reference, or null with a Python exception set.
template <class Run>
PyObject* guarded(Run run) noexcept {
  try {
    return run();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// Raises a ValueError.
[[noreturn]] void fail(const char* what);
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}
// Sizes whose product cannot belong to memory that exists are refused, so that products of them do not overflow.
void require_sizes(std::initializer_list<int64_t> sizes);

// An owned reference.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  // For a new reference that a call returned: null means that the call raised.
  static Ref checked(PyObject* owned) {
    if (!owned) throw PythonError();
    return Ref(owned);
  }
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    PyObject* old = object_;
    object_ = other.release();
    Py_XDECREF(old);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_ = nullptr;
};

// What the functions below need of torch: the capsule with the exchange API (or None), torch's from_dlpack, and
// torch.channels_last.
void set_tensor_functions(PyObject* exchange_api, PyObject* from_dlpack, PyObject* channels_last);

struct TensorView {
  float* data;
  int dims;
  int64_t size[4], stride[4];
};

// Whether sizes and strides are the same.
bool alike(const TensorView& a, const TensorView& b);

// Any tensor of up to four dimensions.
TensorView view(PyObject* tensor);
// The same without an error: false for a tensor that is not for the kernels, and for all tensors where views do not tell the
// type.
bool try_view(PyObject* tensor, TensorView* v) noexcept;
// Whether view() makes sure that a tensor is a float32 tensor on the CPU (without the exchange API it does not).
bool views_tell_type();
// The values of a tensor with one dimension of this length, or null for None.
const float* vector_values(PyObject* tensor, int64_t length);

// Counts the edits of a tensor's values. Raises for a tensor of inference mode, which has no such number.
int64_t version_of(PyObject* tensor);

// An address inside torch's record of a tensor's sizes, or null where it is not known.
const void* record_of(PyObject* tensor);

// Whether torch's convolutions take a tensor for channels_last: the rule of backends/layout.py.
bool suggests_channels_last(const TensorView& v);

// An image batch whose channels are dense: the tensor itself, or a channels_last copy.
struct ImageInput {
  Ref owner;
  int64_t n, c, h, w;
  Image image;
};
ImageInput dense_channels(PyObject* tensor, const TensorView& v);
// And whose rows and images follow each other at the pixel stride.
ImageInput even_pixels(PyObject* tensor, const TensorView& v);
// The tensor with its last dimension dense.
Ref contiguous(PyObject* tensor);

// An output in recycled memory, which its tensor gives back.
class Output {
 public:
  // The sizes, and the strides that the tensor shall have. Kernels write NHWC, which is copied where the strides are others;
  // `direct`: the kernel writes these strides.
  explicit Output(const TensorView& wanted, bool direct = false);
  ~Output();
  float* data() const { return static_cast<float*>(memory_->managed.dl_tensor.data); }
  Ref tensor();

 private:
  struct Memory {
    DLManagedTensorVersioned managed;
    int64_t shape[4], strides[4];
  };
  static void destroy(DLManagedTensorVersioned* managed);
  Memory* memory_;
  bool copy_;  // the wanted format is another: NCHW
};

}  // namespace fastblocks
