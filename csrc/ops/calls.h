// What the ops have in common: reading their arguments, and the shape of their output. The calls themselves are in the files of
// this folder, by kind.
#pragma once

#include <cmath>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../memory.h"
#include "../ops.h"
#include "../packs.h"
#include "../tensors.h"

namespace fastblocks {

// ------------------------------------------------------------------------------------------------- arguments

inline int64_t integer(PyObject* value) {
  const int64_t number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw PythonError();
  return number;
}

inline double number(PyObject* value) {
  const double found = PyFloat_AsDouble(value);
  if (found == -1.0 && PyErr_Occurred()) throw PythonError();
  return found;
}

inline bool truth(PyObject* value) {
  const int found = PyObject_IsTrue(value);
  if (found < 0) throw PythonError();
  return found == 1;
}

// The items of a list or tuple of a known length.
inline PyObject** items(PyObject* sequence, Py_ssize_t length) {
  require((PyList_Check(sequence) || PyTuple_Check(sequence)) && PySequence_Fast_GET_SIZE(sequence) == length,
          "fastblocks._C: a list or tuple of another length");
  return PySequence_Fast_ITEMS(sequence);
}

inline Clamp clamp(PyObject* activation) {
  const float infinity = INFINITY;
  if (activation == Py_None) return {-infinity, infinity};
  require(PyUnicode_Check(activation), "fastblocks._C: activation is None, 'relu' or 'relu6'");
  if (PyUnicode_CompareWithASCIIString(activation, "relu6") == 0) return {0.0f, 6.0f};
  require(PyUnicode_CompareWithASCIIString(activation, "relu") == 0, "fastblocks._C: activation is None, 'relu' or 'relu6'");
  return {0.0f, infinity};
}

// One convolution and its BatchNorm: (weight, bias, running_mean, running_var, bn_weight, bn_bias).
struct Conv {
  TensorView weight;
  std::shared_ptr<const Pack> pack;
  BatchNorm norm;

  Conv(PyObject* record, double eps, Pack::Kind kind, int64_t groups = 1) {
    PyObject** tensors = items(record, 6);
    weight = view(tensors[0]);
    require(weight.dims == 4, "fastblocks._C: a convolution's weight has four dimensions");
    const int64_t n = weight.size[0];
    norm = {vector_values(tensors[1], n), vector_values(tensors[2], n), vector_values(tensors[3], n),
            vector_values(tensors[4], n), vector_values(tensors[5], n), (float)eps};
    require((norm.mean == nullptr) == (norm.var == nullptr), "fastblocks._C: running_mean and running_var go together");
    pack = find_pack(tensors[0], weight, kind, groups);
  }
  int64_t out() const { return weight.size[0]; }
  int64_t in() const { return weight.size[1]; }
  void require_pointwise(int64_t channels) const {
    require(in() == channels && weight.size[2] == 1 && weight.size[3] == 1, "fastblocks._C: a 1x1 weight of another shape");
  }
};

// -------------------------------------------------------------------------------------------------- calls

// Recycled memory for the time of a call.
struct Slab {
  void* memory;
  explicit Slab(size_t bytes) : memory(acquire_slab(bytes)) {
    if (!memory) throw std::bad_alloc();
  }
  ~Slab() { release_slab(memory); }
  float* floats(int64_t offset = 0) const { return static_cast<float*>(memory) + offset; }
};

// The output size of a convolution, as torch computes it.
inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  require(kernel >= 1 && stride >= 1 && padding >= 0 && dilation >= 1, "fastblocks._C: bad convolution geometry");
  require_sizes({kernel, dilation, stride, 2});
  require_sizes({size + 2 * padding});
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  require(span >= 0, "fastblocks._C: kernel larger than the padded input");
  return span / stride + 1;
}

// The output (n, c, h, w) of a convolution as torch would give it: channels_last if the input or a weight is.
template <class... Views>
Value output_like(const TensorView& input, int64_t n, int64_t c, int64_t h, int64_t w, const Views&... weights) {
  require_sizes({n, c, h, w});
  const bool channels_last = (suggests_channels_last(input) || ... || suggests_channels_last(weights));
  Value out{};
  out.view = channels_last ? TensorView{nullptr, 4, {n, c, h, w}, {h * w * c, 1, w * c, c}}
                           : TensorView{nullptr, 4, {n, c, h, w}, {c * h * w, h * w, w, 1}};
  out.image = {nullptr, h * w * c, w * c, c};
  return out;
}

// A value whose pixels are evenly spaced.
inline ImageInput even_pixels(const Value& x) {
  if (x.tensor) return even_pixels(x.tensor, x.view);
  const int64_t* size = x.view.size;
  return {Ref(), size[0], size[1], size[2], size[3], x.image};
}

inline ImageInput dense_channels(const Value& x) { return x.tensor ? dense_channels(x.tensor, x.view) : even_pixels(x); }

// The parameters, and the input's owner, which must outlive the run.
template <class Params>
class CallOf : public Call {
 public:
  void finish() override { x_.owner = Ref(); }
  bool reads_in_place(PyObject* tensor) const override { return !x_.owner.get() || x_.owner.get() == tensor; }

 protected:
  Params p_{};
  ImageInput x_{};
};

// Each makes the call of the op of its name from the arguments that the tiers' tables have.
typedef std::unique_ptr<Call> Maker(PyObject* const* args);
Maker conv_bn_act, pointwise_conv_bn_act, grouped_pointwise_conv_bn_act, depthwise_conv_bn_act, linear, inverted_residual,
    depthwise_separable, shuffle_unit, shuffle_unit_v2, max_pool2d, avg_pool2d, global_avg_pool;

// These are no part of a chain. They return a tensor, or a tuple of two.
PyObject* channel_shuffle(PyObject* const* args);
PyObject* channel_shuffle_split(PyObject* const* args);
PyObject* cat_shuffle_split(PyObject* const* args);

}  // namespace fastblocks
