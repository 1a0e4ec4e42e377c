// The only PYBIND11_MODULE: tensors' addresses and sizes in, memory-safety checks, one run of phases, an output out. What a
// valid call is, in the user's terms, was checked above (fastblocks/functional); here only that no kernel can leave its memory.
//
// No torch header is included: a tensor is asked for its address through its data_ptr() method, and outputs travel as DLPack.
#include <pybind11/pybind11.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "dlpack.h"
#include "memory.h"
#include "parallel.h"

namespace py = pybind11;

namespace fastblocks {
namespace {

void require(bool condition, const char* what) {
  if (!condition) throw py::value_error(what);
}

// Sizes beyond this cannot belong to memory that exists; products of four of them must not overflow.
void require_sizes(std::initializer_list<int64_t> sizes) {
  double product = 1;
  for (const int64_t size : sizes) {
    require(size >= 0, "fastblocks._C: negative size");
    product *= (double)(size > 1 ? size : 1);
  }
  require(product < 9e15, "fastblocks._C: sizes beyond the address space");
}

// A packed weight, and the shape it was made for: what the kernels will read of it depends on nothing else.
struct Pack {
  enum Kind { kConv, kConvPlanar, kDepthwise };
  Kind kind;
  int level;
  int64_t out_channels, in_channels, kernel[2];
  float* data;

  Pack(Kind k, int64_t out, int64_t in, int64_t kh, int64_t kw) : kind(k), level(current_level()), data(nullptr) {
    out_channels = out, in_channels = in, kernel[0] = kh, kernel[1] = kw;
  }
  ~Pack() { release_slab(data); }
  Pack(const Pack&) = delete;
  Pack& operator=(const Pack&) = delete;

  void allocate(int64_t floats) {
    data = static_cast<float*>(acquire_slab(floats * sizeof(float)));
    if (!data) throw std::bad_alloc();
  }
  const float* read(Kind k, int64_t out, int64_t in, int64_t kh, int64_t kw) const {
    require(kind == k && out_channels == out && in_channels == in && kernel[0] == kh && kernel[1] == kw,
            "fastblocks._C: packed weight of another shape");
    require(level == current_level(), "fastblocks._C: packed weight of another instruction set level");
    return data;
  }
};

std::unique_ptr<Pack> pack_conv(uintptr_t weight, int64_t out, int64_t in, int64_t kh, int64_t kw, int64_t s0, int64_t s1,
                                int64_t s2, int64_t s3, bool planar) {
  require_sizes({out, in, kh, kw});
  auto pack = std::make_unique<Pack>(planar ? Pack::kConvPlanar : Pack::kConv, out, in, kh, kw);
  const KernelTable& table = *level(pack->level);
  pack->allocate(table.pack_gemm_floats(out, in * kh * kw));
  std::vector<int64_t> offsets(in * kh * kw);
  const int64_t kernel[2] = {kh, kw}, strides[4] = {s0, s1, s2, s3};
  table.pack_conv(reinterpret_cast<const float*>(weight), out, in, kernel, strides, planar, offsets.data(), pack->data);
  return pack;
}

std::unique_ptr<Pack> pack_depthwise(uintptr_t weight, int64_t channels, int64_t kh, int64_t kw, int64_t s0, int64_t s2,
                                     int64_t s3) {
  require_sizes({channels, kh, kw});
  auto pack = std::make_unique<Pack>(Pack::kDepthwise, channels, 1, kh, kw);
  const KernelTable& table = *level(pack->level);
  pack->allocate(table.pack_depthwise_floats(channels, kh * kw));
  const int64_t strides[3] = {s0, s2, s3};
  table.pack_depthwise(reinterpret_cast<const float*>(weight), channels, kh, kw, strides, pack->data);
  return pack;
}

const float* address(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  if (tensor.is_none()) return nullptr;
  PyObject* const arguments[] = {tensor.ptr()};
  const py::object value = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(name, arguments, 1, nullptr));
  if (!value) throw py::error_already_set();
  return static_cast<const float*>(PyLong_AsVoidPtr(value.ptr()));
}

// conv = (weight, bias, running_mean, running_var, bn_weight, bn_bias)
BatchNorm batch_norm(const py::sequence& conv, double eps) {
  require(PyList_Check(conv.ptr()) || PyTuple_Check(conv.ptr()), "fastblocks._C: a convolution is a list or tuple");
  require(py::len(conv) == 6, "fastblocks._C: a convolution is six tensors");
  PyObject** items = PySequence_Fast_ITEMS(conv.ptr());
  BatchNorm n;
  n.conv_bias = address(items[1]);
  n.mean = address(items[2]);
  n.var = address(items[3]);
  n.weight = address(items[4]);
  n.bias = address(items[5]);
  require((n.mean == nullptr) == (n.var == nullptr), "fastblocks._C: running_mean and running_var go together");
  n.eps = (float)eps;
  return n;
}

Clamp clamp(int activation) {
  const float infinity = INFINITY;
  require(activation >= 0 && activation <= 2, "fastblocks._C: activation is 0 (none), 1 (ReLU) or 2 (ReLU6)");
  if (activation == 0) return {-infinity, infinity};
  return {0.0f, activation == 1 ? infinity : 6.0f};
}

// An output in recycled memory, which its tensor gives back.
struct Output {
  DLManagedTensor managed;
  int64_t shape[4], strides[4];

  static void destroy(DLManagedTensor* m) {
    Output* self = static_cast<Output*>(m->manager_ctx);
    release_slab(self->managed.dl_tensor.data);
    delete self;
  }
};

// An NHWC tensor, seen as (n, c, h, w).
struct Allocation {
  std::unique_ptr<Output> output{new Output};

  Allocation(int64_t n, int64_t c, int64_t h, int64_t w) {
    require_sizes({n, c, h, w});
    Output& o = *output;
    o.shape[0] = n, o.shape[1] = c, o.shape[2] = h, o.shape[3] = w;
    o.strides[0] = h * w * c, o.strides[1] = 1, o.strides[2] = w * c, o.strides[3] = c;
    DLTensor& t = o.managed.dl_tensor;
    t.data = acquire_slab((n * c * h * w + 16) * sizeof(float));
    if (!t.data) throw std::bad_alloc();
    t.device = {kDLCPU, 0};
    t.ndim = 4;
    t.dtype = {kDLFloat, 32, 1};
    t.shape = o.shape;
    t.strides = o.strides;
    t.byte_offset = 0;
    o.managed.manager_ctx = &o;
    o.managed.deleter = Output::destroy;
  }
  float* data() const { return static_cast<float*>(output->managed.dl_tensor.data); }
  Image image() const {
    const int64_t* s = output->strides;
    return {data(), s[0], s[2], s[3]};
  }
  py::object capsule() {
    PyObject* c = PyCapsule_New(&output->managed, "dltensor", [](PyObject* capsule) {
      if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // consumed: the tensor owns it
      auto* m = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
      m->deleter(m);
    });
    if (!c) throw py::error_already_set();
    output.release();
    return py::reinterpret_steal<py::object>(c);
  }
  ~Allocation() {
    if (output) release_slab(output->managed.dl_tensor.data);
  }
};

template <class Params>
void run_op(const Op& op, Params& params, float* Params::* shared_member) {
  const int workers = worker_count();
  Work work{};
  op.prepare(&params, workers, &work);
  void* shared = acquire_slab(work.shared_bytes);
  if (!shared) throw std::bad_alloc();
  if (shared_member) params.*shared_member = static_cast<float*>(shared);
  bool done;
  {
    const py::gil_scoped_release unlocked;
    if (op.begin) op.begin(&params);
    done = run(work.phases, work.count, work.worker_bytes, workers);
  }
  release_slab(shared);
  if (!done) throw std::bad_alloc();
}

// The output size of a convolution, as torch computes it.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  require(kernel >= 1 && stride >= 1 && padding >= 0 && dilation >= 1, "fastblocks._C: bad convolution geometry");
  require_sizes({kernel, dilation, stride, 2});
  require_sizes({size + 2 * padding});
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  require(span >= 0, "fastblocks._C: kernel larger than the padded input");
  return span / stride + 1;
}

py::object pointwise(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t pixel_stride, const Pack& pack,
                     const py::sequence& conv, double eps, int activation, uintptr_t residual, int64_t residual_stride) {
  Allocation out(n, pack.out_channels, h, w);
  PointwiseParams p{};
  p.pixels = n * h * w, p.in_channels = c, p.out_channels = pack.out_channels;
  p.x = reinterpret_cast<const float*>(x), p.x_stride = pixel_stride;
  p.packed_weight = pack.read(Pack::kConv, pack.out_channels, c, 1, 1);
  p.norm = batch_norm(conv, eps), p.clamp = clamp(activation);
  p.residual = reinterpret_cast<const float*>(residual), p.residual_stride = residual_stride;
  p.out = out.data(), p.out_stride = pack.out_channels;
  if (p.pixels > 0 && p.out_channels > 0) run_op(kernels().pointwise, p, &PointwiseParams::shared);
  return out.capsule();
}

// (rows, c) x (features, c)^T + bias: a pointwise convolution of `rows` pixels.
py::object linear(uintptr_t x, int64_t rows, int64_t c, int64_t row_stride, const Pack& pack, py::handle bias) {
  Allocation out(rows, pack.out_channels, 1, 1);
  out.output->managed.dl_tensor.ndim = 2;
  PointwiseParams p{};
  p.pixels = rows, p.in_channels = c, p.out_channels = pack.out_channels;
  p.x = reinterpret_cast<const float*>(x), p.x_stride = row_stride;
  p.packed_weight = pack.read(Pack::kConv, pack.out_channels, c, 1, 1);
  p.norm.conv_bias = address(bias), p.clamp = clamp(0);
  p.out = out.data(), p.out_stride = pack.out_channels;
  if (rows > 0 && pack.out_channels > 0) run_op(kernels().pointwise, p, &PointwiseParams::shared);
  return out.capsule();
}

struct Geometry {
  int64_t stride[2], padding[2], dilation[2];
};

py::object depthwise(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t image_stride, int64_t row_stride,
                     int64_t pixel_stride, const Pack& pack, const py::sequence& conv, double eps, int activation,
                     const Geometry& g) {
  const int64_t oh = output_size(h, pack.kernel[0], g.stride[0], g.padding[0], g.dilation[0]);
  const int64_t ow = output_size(w, pack.kernel[1], g.stride[1], g.padding[1], g.dilation[1]);
  Allocation out(n, c, oh, ow);
  DepthwiseParams p{};
  p.images = n, p.height = h, p.width = w, p.channels = c, p.out_height = oh, p.out_width = ow;
  for (int i = 0; i < 2; ++i)
    p.kernel[i] = pack.kernel[i], p.stride[i] = g.stride[i], p.padding[i] = g.padding[i], p.dilation[i] = g.dilation[i];
  p.x = {reinterpret_cast<float*>(x), image_stride, row_stride, pixel_stride};
  p.packed_weight = pack.read(Pack::kDepthwise, c, 1, pack.kernel[0], pack.kernel[1]);
  p.norm = batch_norm(conv, eps), p.clamp = clamp(activation);
  p.out = out.image();
  if (n > 0 && c > 0) run_op(kernels().depthwise, p, &DepthwiseParams::shared);
  return out.capsule();
}

py::object conv(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t image_stride, int64_t row_stride,
                int64_t pixel_stride, bool planar, const Pack& pack, const py::sequence& tensors, double eps, int activation,
                const Geometry& g) {
  const int64_t oh = output_size(h, pack.kernel[0], g.stride[0], g.padding[0], g.dilation[0]);
  const int64_t ow = output_size(w, pack.kernel[1], g.stride[1], g.padding[1], g.dilation[1]);
  Allocation out(n, pack.out_channels, oh, ow);
  ConvParams p{};
  p.images = n, p.height = h, p.width = w, p.in_channels = c, p.out_channels = pack.out_channels;
  p.out_height = oh, p.out_width = ow, p.planar = planar;
  for (int i = 0; i < 2; ++i)
    p.kernel[i] = pack.kernel[i], p.stride[i] = g.stride[i], p.padding[i] = g.padding[i], p.dilation[i] = g.dilation[i];
  p.x = {reinterpret_cast<float*>(x), image_stride, row_stride, pixel_stride};
  p.packed_weight = pack.read(planar ? Pack::kConvPlanar : Pack::kConv, pack.out_channels, c, pack.kernel[0], pack.kernel[1]);
  p.norm = batch_norm(tensors, eps), p.clamp = clamp(activation);
  p.out = out.image();
  if (n > 0 && p.out_channels > 0) run_op(kernels().conv, p, &ConvParams::shared);
  return out.capsule();
}

py::object inverted_residual(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t image_stride,
                             int64_t pixel_stride, const Pack* expand_pack, const py::sequence& expand, double expand_eps,
                             const Pack& depthwise_pack, const py::sequence& depthwise, double depthwise_eps,
                             const Pack& project_pack, const py::sequence& project, double project_eps, int64_t stride,
                             int64_t padding, int activation, bool residual) {
  InvertedResidualParams p{};
  p.kernel = depthwise_pack.kernel[0], p.stride = stride, p.padding = padding;
  p.images = n, p.height = h, p.width = w, p.in_channels = c;
  p.hidden_channels = depthwise_pack.out_channels, p.out_channels = project_pack.out_channels;
  p.out_height = output_size(h, p.kernel, stride, padding, 1), p.out_width = output_size(w, p.kernel, stride, padding, 1);
  require(!residual || (p.out_height == h && p.out_width == w && p.out_channels == c),
          "fastblocks._C: residual of another shape");
  require(expand_pack || p.hidden_channels == c, "fastblocks._C: channels of the depthwise weight");
  Allocation out(n, p.out_channels, p.out_height, p.out_width);
  p.x = {reinterpret_cast<float*>(x), image_stride, w * pixel_stride, pixel_stride};
  if (expand_pack) {
    p.expand_weight = expand_pack->read(Pack::kConv, p.hidden_channels, c, 1, 1);
    p.expand_norm = batch_norm(expand, expand_eps);
  }
  p.depthwise_weight = depthwise_pack.read(Pack::kDepthwise, p.hidden_channels, 1, p.kernel, p.kernel);
  p.project_weight = project_pack.read(Pack::kConv, p.out_channels, p.hidden_channels, 1, 1);
  p.depthwise_norm = batch_norm(depthwise, depthwise_eps), p.project_norm = batch_norm(project, project_eps);
  p.clamp = clamp(activation);
  p.residual = residual;
  p.out = out.image();
  if (n > 0 && p.hidden_channels > 0 && p.out_channels > 0)
    run_op(kernels().inverted_residual, p, &InvertedResidualParams::shared);
  return out.capsule();
}

py::object global_avg_pool(uintptr_t x, int64_t n, int64_t c, int64_t pixels, int64_t image_stride, int64_t pixel_stride) {
  require(pixels > 0, "fastblocks._C: mean of no pixels");
  Allocation out(n, c, 1, 1);
  PoolParams p{};
  p.images = n, p.pixels = pixels, p.channels = c;
  p.x = reinterpret_cast<const float*>(x), p.image_stride = image_stride, p.pixel_stride = pixel_stride;
  p.out = out.data();
  if (n > 0 && c > 0) run_op<PoolParams>(kernels().global_avg_pool, p, nullptr);
  return out.capsule();
}

py::dict stats() {
  const MemoryStats s = memory_stats();
  py::dict d;
  d["active_bytes"] = s.active_bytes;
  d["peak_active_bytes"] = s.peak_active_bytes;
  d["cached_bytes"] = s.cached_bytes;
  d["limit_bytes"] = s.limit_bytes;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  return d;
}

}  // namespace
}  // namespace fastblocks

PYBIND11_MODULE(_C, m) {
  using namespace fastblocks;
  py::class_<Pack>(m, "Pack").def_readonly("level", &Pack::level);
  py::class_<Geometry>(m, "Geometry").def(py::init([](int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1) {
    return Geometry{{s0, s1}, {p0, p1}, {d0, d1}};
  }));
  m.def("pack_conv", &pack_conv);
  m.def("pack_depthwise", &pack_depthwise);
  m.def("pointwise", &pointwise);
  m.def("depthwise", &depthwise);
  m.def("linear", &linear);
  m.def("conv", &conv);
  m.def("inverted_residual", &inverted_residual);
  m.def("global_avg_pool", &global_avg_pool);
  m.def("set_thread_pool", [](uintptr_t parallel_for, uintptr_t get_num_threads) {
    set_thread_pool(reinterpret_cast<ParallelFor>(parallel_for), reinterpret_cast<GetNumThreads>(get_num_threads));
  });
  m.def("has_thread_pool", &has_thread_pool);
  m.def("forget_thread_pool_after_fork", &forget_thread_pool_after_fork);
  m.def("worker_count", &worker_count);
  m.def("level_names", [] {
    py::list names;
    for (int i = 0; i < kLevels; ++i)
      if (level(i)) names.append(level_name(i));
    return names;
  });
  m.def("current_level", &current_level);
  m.def("use_level", [](const std::string& name) {
    for (int i = 0; i < kLevels; ++i)
      if (name == level_name(i)) return use_level(i);
    return false;
  });
  m.def("memory_stats", &stats);
  m.def("empty_cache", &empty_cache, py::call_guard<py::gil_scoped_release>());
}
