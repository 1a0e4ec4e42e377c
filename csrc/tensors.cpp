#include "tensors.h"

#include <algorithm>
#include <new>

#include "memory.h"

namespace fastblocks {

namespace {

const DLPackExchangeApi* exchange = nullptr;
PyObject *from_dlpack = nullptr, *channels_last = nullptr;

const char* const kCapsule = "dltensor_versioned";

PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }

void read_sizes(PyObject* tensor, PyObject* name, bool call, int64_t* to, int dims) {
  const Ref values = Ref::checked(call ? PyObject_CallMethodNoArgs(tensor, name) : PyObject_GetAttr(tensor, name));
  for (int i = 0; i < dims; ++i) {
    to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(values.get(), i));
    if (to[i] == -1 && PyErr_Occurred()) throw PythonError();
  }
}

// For a torch without the exchange API.
TensorView view_by_methods(PyObject* tensor) {
  static PyObject *const data_ptr = name_of("data_ptr"), *const dim = name_of("dim"), *const shape = name_of("shape"),
                         *const stride = name_of("stride");
  TensorView v;
  const Ref data = Ref::checked(PyObject_CallMethodNoArgs(tensor, data_ptr));
  v.data = static_cast<float*>(PyLong_AsVoidPtr(data.get()));
  const Ref dims = Ref::checked(PyObject_CallMethodNoArgs(tensor, dim));
  v.dims = (int)PyLong_AsLong(dims.get());
  if (PyErr_Occurred()) throw PythonError();
  require(v.dims <= 4, "fastblocks._C: more than four dimensions");
  read_sizes(tensor, shape, false, v.size, v.dims);
  read_sizes(tensor, stride, true, v.stride, v.dims);
  return v;
}

bool is_float_on_cpu(const DLTensor& t) {
  return t.device.device_type == kDLCPU && t.dtype.code == kDLFloat && t.dtype.bits == 32 && t.dtype.lanes == 1;
}

TensorView view_of(const DLTensor& t) {
  TensorView v;
  v.data = reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
  v.dims = t.ndim;
  for (int i = 0; i < t.ndim; ++i) v.size[i] = t.shape[i], v.stride[i] = t.strides[i];
  return v;
}

// The distance of neighbouring pixels where all pixels of all images are evenly spaced, channels dense; else 0. Strides of
// dimensions of one element say nothing.
int64_t even_stride(const TensorView& v) {
  const int64_t n = v.size[0], c = v.size[1], h = v.size[2], w = v.size[3];
  if (c > 1 && v.stride[1] != 1) return 0;
  const int64_t stride = w > 1 ? v.stride[3] : h > 1 ? v.stride[2] : n > 1 ? v.stride[0] : c;
  if (stride < c || (h > 1 && v.stride[2] != w * stride) || (n > 1 && v.stride[0] != h * w * stride)) return 0;
  return stride;
}

ImageInput image_input(Ref owner, const TensorView& v, int64_t image, int64_t row, int64_t pixel) {
  return {std::move(owner), v.size[0], v.size[1], v.size[2], v.size[3], {v.data, image, row, pixel}};
}

Ref in_channels_last(PyObject* tensor) {
  static PyObject *const name = name_of("contiguous"), *const keywords = Py_BuildValue("(s)", "memory_format");
  PyObject* const arguments[] = {tensor, channels_last};
  return Ref::checked(PyObject_VectorcallMethod(name, arguments, 1, keywords));
}

}  // namespace

void fail(const char* what) {
  PyErr_SetString(PyExc_ValueError, what);
  throw PythonError();
}

void require_sizes(std::initializer_list<int64_t> sizes) {
  double product = 1;
  for (const int64_t size : sizes) {
    require(size >= 0, "fastblocks._C: negative size");
    product *= (double)(size > 1 ? size : 1);
  }
  require(product < 9e15, "fastblocks._C: sizes beyond the address space");
}

void set_tensor_functions(PyObject* exchange_api, PyObject* from_dlpack_function, PyObject* channels_last_format) {
  exchange = nullptr;
  if (exchange_api != Py_None) {
    const void* api = PyCapsule_GetPointer(exchange_api, "dlpack_exchange_api");
    if (!api) throw PythonError();
    const auto* candidate = static_cast<const DLPackExchangeApi*>(api);
    if (candidate->version.major == kDLPackMajor && candidate->managed_to_object && candidate->view_of_object)
      exchange = candidate;
  }
  Py_INCREF(from_dlpack_function);
  Py_XDECREF(from_dlpack);
  from_dlpack = from_dlpack_function;
  Py_INCREF(channels_last_format);
  Py_XDECREF(channels_last);
  channels_last = channels_last_format;
}

bool views_tell_type() { return exchange != nullptr; }

TensorView view(PyObject* tensor) {
  if (!exchange) return view_by_methods(tensor);
  DLTensor t;
  if (exchange->view_of_object(tensor, &t) != 0) throw PythonError();
  require(t.ndim <= 4, "fastblocks._C: more than four dimensions");
  require(is_float_on_cpu(t), "fastblocks._C: not a float32 tensor on the CPU");
  return view_of(t);
}

bool try_view(PyObject* tensor, TensorView* v) noexcept {
  DLTensor t;
  if (!exchange) return false;
  if (exchange->view_of_object(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.ndim > 4 || !is_float_on_cpu(t)) return false;
  *v = view_of(t);
  return true;
}

bool alike(const TensorView& a, const TensorView& b) {
  if (a.dims != b.dims) return false;
  for (int i = 0; i < a.dims; ++i)
    if (a.size[i] != b.size[i] || a.stride[i] != b.stride[i]) return false;
  return true;
}

int64_t version_of(PyObject* tensor) {
  static PyObject* const name = name_of("_version");
  return PyLong_AsLongLong(Ref::checked(PyObject_GetAttr(tensor, name)).get());
}

const void* record_of(PyObject* tensor) {
  DLTensor t;
  if (!exchange) return nullptr;
  if (exchange->view_of_object(tensor, &t) != 0) throw PythonError();
  return t.shape;
}

const float* vector_values(PyObject* tensor, int64_t length) {
  if (tensor == Py_None) return nullptr;
  const TensorView v = view(tensor);
  require(v.dims == 1 && v.size[0] == length && (length < 2 || v.stride[0] == 1),
          "fastblocks._C: a vector of another length, or with gaps");
  return v.data;
}

bool suggests_channels_last(const TensorView& v) {
  if (v.dims != 4 || v.stride[1] == 0) return false;
  int64_t least = 0;
  for (const int dim : {1, 3, 2, 0}) {
    if (v.size[dim] == 0 || v.stride[dim] < least) return false;
    if (dim == 0 && least == v.stride[1]) return false;
    least = v.size[dim] > 1 ? v.stride[dim] * v.size[dim] : v.stride[dim];
  }
  return true;
}

ImageInput dense_channels(PyObject* tensor, const TensorView& v) {
  require(v.dims == 4, "fastblocks._C: an input has four dimensions");
  const int64_t c = v.size[1], h = v.size[2], w = v.size[3];
  const int64_t pixel = w > 1 ? v.stride[3] : c, row = h > 1 ? v.stride[2] : w * pixel;
  if ((c < 2 || v.stride[1] == 1) && pixel >= c)
    return image_input(Ref::borrow(tensor), v, v.size[0] > 1 ? v.stride[0] : h * row, row, pixel);
  return even_pixels(tensor, v);
}

ImageInput even_pixels(PyObject* tensor, const TensorView& v) {
  require(v.dims == 4, "fastblocks._C: an input has four dimensions");
  const int64_t pixel = even_stride(v), row = v.size[3] * pixel;
  if (pixel) return image_input(Ref::borrow(tensor), v, v.size[2] * row, row, pixel);
  Ref copy = in_channels_last(tensor);
  const TensorView c = view(copy.get());
  const int64_t dense_row = c.size[3] * c.size[1];
  return image_input(std::move(copy), c, c.size[2] * dense_row, dense_row, c.size[1]);
}

Ref contiguous(PyObject* tensor) {
  static PyObject* const name = name_of("contiguous");
  return Ref::checked(PyObject_CallMethodNoArgs(tensor, name));
}

Output::Output(const TensorView& wanted, bool direct) {
  const int64_t n = wanted.size[0], c = wanted.size[1];
  const int64_t h = wanted.dims == 4 ? wanted.size[2] : 1, w = wanted.dims == 4 ? wanted.size[3] : 1;
  require_sizes({n, c, h, w});
  void* data = acquire_slab((n * c * h * w + 16) * sizeof(float));
  if (!data) throw std::bad_alloc();
  memory_ = new Memory{{{kDLPackMajor, 0}, nullptr, destroy, 0, {}}, {n, c, h, w}, {h * w * c, 1, w * c, c}};
  memory_->managed.manager_ctx = memory_;
  memory_->managed.dl_tensor = {data, {kDLCPU, 0}, wanted.dims, {kDLFloat, 32, 1}, memory_->shape, memory_->strides, 0};
  if (direct) std::copy(wanted.stride, wanted.stride + wanted.dims, memory_->strides);
  copy_ = !direct && wanted.dims == 4 && !suggests_channels_last(wanted);
}

void Output::destroy(DLManagedTensorVersioned* managed) {
  Memory* memory = static_cast<Memory*>(managed->manager_ctx);
  release_slab(managed->dl_tensor.data);
  delete memory;
}

Output::~Output() {
  if (memory_) destroy(&memory_->managed);
}

Ref Output::tensor() {
  DLManagedTensorVersioned* managed = &memory_->managed;
  Ref tensor;
  if (exchange) {
    void* object = nullptr;
    if (exchange->managed_to_object(managed, &object) != 0) throw PythonError();
    memory_ = nullptr;
    tensor = Ref::checked(static_cast<PyObject*>(object));
  } else {
    const Ref capsule = Ref::checked(PyCapsule_New(managed, kCapsule, [](PyObject* capsule) {
      if (!PyCapsule_IsValid(capsule, kCapsule)) return;  // consumed: the tensor owns it
      auto* m = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, kCapsule));
      m->deleter(m);
    }));
    memory_ = nullptr;
    tensor = Ref::checked(PyObject_CallOneArg(from_dlpack, capsule.get()));
  }
  return copy_ ? contiguous(tensor.get()) : std::move(tensor);
}

}  // namespace fastblocks
