#include "ops.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <utility>

#include "memory.h"
#include "packs.h"
#include "parallel.h"
#include "tensors.h"

namespace fastblocks {

namespace {

// ------------------------------------------------------------------------------------------------- arguments

int64_t integer(PyObject* value) {
  const int64_t number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw PythonError();
  return number;
}

double number(PyObject* value) {
  const double found = PyFloat_AsDouble(value);
  if (found == -1.0 && PyErr_Occurred()) throw PythonError();
  return found;
}

bool truth(PyObject* value) {
  const int found = PyObject_IsTrue(value);
  if (found < 0) throw PythonError();
  return found == 1;
}

// The items of a list or tuple of a known length.
PyObject** items(PyObject* sequence, Py_ssize_t length) {
  require((PyList_Check(sequence) || PyTuple_Check(sequence)) && PySequence_Fast_GET_SIZE(sequence) == length,
          "fastblocks._C: a list or tuple of another length");
  return PySequence_Fast_ITEMS(sequence);
}

Clamp clamp(PyObject* activation) {
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

// ------------------------------------------------------------------------------------------------------ runs

// Lets other Python threads run.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

struct Slab {
  void* memory;
  explicit Slab(size_t bytes) : memory(acquire_slab(bytes)) {
    if (!memory) throw std::bad_alloc();
  }
  ~Slab() { release_slab(memory); }
  float* floats(int64_t offset = 0) const { return static_cast<float*>(memory) + offset; }
};

struct Beginning {
  void (*begin)(void* params);
  void* params;
};

void begin_run(const void* params, int64_t begin, int64_t end, char*) noexcept {
  const auto* all = static_cast<const Beginning*>(params);
  for (int64_t i = begin; i < end; ++i) all[i].begin(all[i].params);
}

// Several ops share one entry of the pool: what they do at their beginning needs no input, so it makes one phase for all.
void run_steps(const std::vector<Step>& steps) {
  const int workers = worker_count();
  std::vector<Phase> phases(1);
  std::vector<Beginning> beginnings;
  std::vector<std::pair<float**, int64_t>> shared;
  size_t worker_bytes = 0;
  int64_t floats = 0;
  for (const auto& [op, params] : steps) {
    Work work{};
    op->prepare(params, workers, &work);
    phases.insert(phases.end(), work.phases, work.phases + work.count);
    worker_bytes = std::max(worker_bytes, work.worker_bytes);
    if (work.shared) shared.push_back({work.shared, floats});
    floats += (int64_t)(work.shared_bytes / sizeof(float) + 32) / 16 * 16;
    if (op->begin) beginnings.push_back({op->begin, params});
  }
  const Slab memory(floats * sizeof(float));
  for (const auto& [to, offset] : shared) *to = memory.floats(offset);
  bool done;
  {
    const Unlocked unlocked;
    // Alone, it is not worth a phase.
    const bool one = beginnings.size() < 2;
    if (one && !beginnings.empty()) begin_run(beginnings.data(), 0, 1, nullptr);
    phases[0] = {begin_run, beginnings.data(), (int64_t)beginnings.size()};
    done = run(phases.data() + one, (int)phases.size() - one, worker_bytes, workers);
  }
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
ImageInput even_pixels(const Value& x) {
  if (x.tensor) return even_pixels(x.tensor, x.view);
  const int64_t* size = x.view.size;
  return {Ref(), size[0], size[1], size[2], size[3], x.image};
}

ImageInput dense_channels(const Value& x) { return x.tensor ? dense_channels(x.tensor, x.view) : even_pixels(x); }

// ----------------------------------------------------------------------------------------------------- the ops

// The parameters, and the input's owner, which must outlive the run.
template <class Params>
class CallOf : public Call {
 protected:
  Params p_{};
  ImageInput x_{};
};

// (input, conv, eps, activation, residual), or (input, conv, eps, groups, shuffle, activation, residual)
class Pointwise : public CallOf<PointwiseParams> {
 public:
  explicit Pointwise(PyObject* const* args) : Pointwise(args, 1, 1, args + 3) {}
  Value bind(const Value& input) override {
    x_ = even_pixels(input);
    conv_.require_pointwise(x_.c / p_.groups);
    require(x_.c % p_.groups == 0 && conv_.out() % p_.shuffle == 0, "fastblocks._C: groups that do not divide the channels");
    p_.pixels = x_.n * x_.h * x_.w, p_.in_channels = x_.c, p_.out_channels = conv_.out();
    p_.x = x_.image.data, p_.x_stride = x_.image.pixel_stride, p_.out_stride = p_.out_channels;
    if (residual_) {
      other_ = fastblocks::even_pixels(residual_, fastblocks::view(residual_));
      require(other_.n == x_.n && other_.c == conv_.out() && other_.h == x_.h && other_.w == x_.w,
              "fastblocks._C: residual of another shape");
      p_.residual = other_.image.data, p_.residual_stride = other_.image.pixel_stride;
    }
    return output_like(input.view, x_.n, conv_.out(), x_.h, x_.w, conv_.weight);
  }
  void place(float* input, float* output) override {
    if (input) p_.x = input;
    p_.out = output;
  }
  void steps(std::vector<Step>& to) override {
    if (p_.pixels > 0 && p_.out_channels > 0) to.push_back({&kernels().pointwise, &p_});
  }

 protected:
  Pointwise(PyObject* const* args, int64_t groups, int64_t shuffle, PyObject* const* rest)
      : conv_(args[1], number(args[2]), Pack::kConv, groups), residual_(rest[1] == Py_None ? nullptr : rest[1]) {
    require(shuffle >= 1, "fastblocks._C: shuffle is 1 or more");
    p_.groups = groups, p_.shuffle = shuffle;
    p_.packed_weight = conv_.pack->data, p_.norm = conv_.norm, p_.clamp = clamp(rest[0]);
  }

 private:
  Conv conv_;
  PyObject* residual_;  // borrowed, or null
  ImageInput other_{};
};

class GroupedPointwise : public Pointwise {
 public:
  explicit GroupedPointwise(PyObject* const* args) : Pointwise(args, integer(args[3]), integer(args[4]), args + 5) {}
};

// (input, conv, eps, stride, padding, dilation, activation): what the two kinds of k x k convolution have in common.
template <class Params>
class Window : public CallOf<Params> {
 public:
  Window(PyObject* const* args) : args_(args), eps_(number(args[2])) {
    int64_t* const to[3] = {this->p_.stride, this->p_.padding, this->p_.dilation};
    for (int i = 0; i < 3; ++i) {
      PyObject** pair = items(args[3 + i], 2);
      to[i][0] = integer(pair[0]), to[i][1] = integer(pair[1]);
    }
    this->p_.clamp = clamp(args[6]);
  }
  void place(float* input, float* output) override {
    if (input) this->p_.x.data = input;
    this->p_.out.data = output;
  }

 protected:
  Value bind_window(const Value& input, const Conv& conv) {
    Params& p = this->p_;
    const ImageInput& x = this->x_;
    p.images = x.n, p.height = x.h, p.width = x.w, p.x = x.image;
    p.kernel[0] = conv.weight.size[2], p.kernel[1] = conv.weight.size[3];
    p.out_height = output_size(x.h, p.kernel[0], p.stride[0], p.padding[0], p.dilation[0]);
    p.out_width = output_size(x.w, p.kernel[1], p.stride[1], p.padding[1], p.dilation[1]);
    p.packed_weight = conv.pack->data, p.norm = conv.norm;
    Value out = output_like(input.view, x.n, conv.out(), p.out_height, p.out_width, conv.weight);
    p.out = out.image;
    return out;
  }
  PyObject* const* args_;
  double eps_;
};

class Depthwise : public Window<DepthwiseParams> {
 public:
  explicit Depthwise(PyObject* const* args) : Window(args), conv_(args[1], eps_, Pack::kDepthwise) {}
  Value bind(const Value& input) override {
    x_ = dense_channels(input);
    require(conv_.out() == x_.c, "fastblocks._C: a depthwise weight of another number of channels");
    p_.channels = x_.c;
    return bind_window(input, conv_);
  }
  void steps(std::vector<Step>& to) override {
    if (p_.images > 0 && p_.channels > 0) to.push_back({&kernels().depthwise, &p_});
  }

 private:
  Conv conv_;
};

class DenseConv : public Window<ConvParams> {
 public:
  explicit DenseConv(PyObject* const* args) : Window(args), record_(Ref::borrow(args[1])) {}
  Value bind(const Value& input) override {
    // Rows of an NCHW image are read as they are; the plane stride takes the pixel stride's place.
    const TensorView& v = input.view;
    require(v.dims == 4, "fastblocks._C: an input has four dimensions");
    p_.planar = input.tensor && !((v.size[1] < 2 || v.stride[1] == 1) && (v.size[3] < 2 || v.stride[3] >= v.size[1]));
    if (p_.planar) {
      x_.owner = v.size[3] > 1 && v.stride[3] != 1 ? contiguous(input.tensor) : Ref::borrow(input.tensor);
      const TensorView rows = fastblocks::view(x_.owner.get());
      x_.n = v.size[0], x_.c = v.size[1], x_.h = v.size[2], x_.w = v.size[3];
      x_.image = {rows.data, rows.stride[0], rows.stride[2], rows.stride[1]};
    } else {
      x_ = dense_channels(input);
    }
    conv_ = std::make_unique<Conv>(record_.get(), eps_, p_.planar ? Pack::kConvPlanar : Pack::kConv);
    require(conv_->in() == x_.c, "fastblocks._C: a weight of another number of channels");
    p_.in_channels = x_.c, p_.out_channels = conv_->out();
    return bind_window(input, *conv_);
  }
  void steps(std::vector<Step>& to) override {
    if (p_.images > 0 && p_.out_channels > 0) to.push_back({&kernels().conv, &p_});
  }

 private:
  Ref record_;
  std::unique_ptr<Conv> conv_;  // which pack it needs depends on the input
};

// What the fused blocks have in common: up to three convolutions.
class Block : public CallOf<BlockParams> {
 public:
  void place(float* input, float* output) override {
    if (input) p_.x.data = input;
    if (adds_input_) p_.residual = p_.x;
    p_.out.data = output;
  }
  void steps(std::vector<Step>& to) override { add_step(to, p_); }

 protected:
  // Records; expand may be null: no expansion.
  Block(PyObject* expand, double expand_eps, PyObject* depthwise, double depthwise_eps, PyObject* project, double project_eps,
        int64_t groups = 1)
      : depthwise_(depthwise, depthwise_eps, Pack::kDepthwise), project_(project, project_eps, Pack::kConv, groups) {
    p_.groups = groups, p_.expand_groups = 1;
    p_.kernel = depthwise_.weight.size[2];
    require(p_.kernel == depthwise_.weight.size[3], "fastblocks._C: a depthwise kernel that is not square");
    p_.hidden_channels = depthwise_.out(), p_.out_channels = project_.out();
    require(p_.hidden_channels % groups == 0, "fastblocks._C: groups that do not divide the channels");
    project_.require_pointwise(p_.hidden_channels / groups);
    p_.depthwise_weight = depthwise_.pack->data, p_.depthwise_norm = depthwise_.norm;
    p_.project_weight = project_.pack->data, p_.project_norm = project_.norm;
    p_.expand_clamp = p_.depthwise_clamp = p_.project_clamp = clamp(Py_None);
    if (!expand) return;
    // Whether the expansion is grouped, its weight says: it was packed for one group if it is not.
    expand_record_ = expand, expand_eps_ = expand_eps;
  }
  // Channels [first, first + channels) of the input.
  void bind_block(const ImageInput& x, int64_t first, int64_t channels) {
    if (expand_record_) {
      const int64_t depth = fastblocks::view(items(expand_record_, 6)[0]).size[1];
      p_.expand_groups = depth == channels ? 1 : p_.groups;
      require(depth * p_.expand_groups == channels, "fastblocks._C: a 1x1 weight of another shape");
      expand_ = std::make_unique<Conv>(expand_record_, expand_eps_, Pack::kConv, p_.expand_groups);
      expand_->require_pointwise(depth);
      p_.expand_weight = expand_->pack->data, p_.expand_norm = expand_->norm;
    }
    require((expand_ ? expand_->out() : channels) == p_.hidden_channels,
            "fastblocks._C: a depthwise weight of another number of channels");
    p_.images = x.n, p_.height = x.h, p_.width = x.w, p_.in_channels = channels, p_.x = x.image;
    if (p_.x.data) p_.x.data += first;
    p_.out_height = output_size(x.h, p_.kernel, p_.stride, p_.padding, 1);
    p_.out_width = output_size(x.w, p_.kernel, p_.stride, p_.padding, 1);
  }
  static void add_step(std::vector<Step>& to, BlockParams& p) {
    if (p.images > 0 && p.hidden_channels > 0 && p.out_channels > 0) to.push_back({&kernels().block, &p});
  }
  const TensorView& first_weight() const { return expand_ ? expand_->weight : depthwise_.weight; }

  std::unique_ptr<Conv> expand_;
  Conv depthwise_, project_;
  bool adds_input_ = false;

 private:
  PyObject* expand_record_ = nullptr;  // borrowed
  double expand_eps_ = 0;
};

// (input, expand, depthwise, project, eps, stride, padding, activation, residual)
class InvertedResidual : public Block {
 public:
  explicit InvertedResidual(PyObject* const* args)
      : Block(truth(args[1]) ? args[1] : nullptr, eps(args, 0), args[2], eps(args, 1), args[3], eps(args, 2)) {
    p_.stride = integer(args[5]), p_.padding = integer(args[6]);
    p_.expand_clamp = p_.depthwise_clamp = clamp(args[7]), adds_input_ = truth(args[8]);
  }
  Value bind(const Value& input) override {
    x_ = even_pixels(input);
    bind_block(x_, 0, x_.c);
    require(!adds_input_ || (p_.out_height == x_.h && p_.out_width == x_.w && p_.out_channels == x_.c),
            "fastblocks._C: residual of another shape");
    Value out = output_like(input.view, x_.n, p_.out_channels, p_.out_height, p_.out_width, first_weight(), depthwise_.weight,
                            project_.weight);
    p_.out = out.image;
    return out;
  }

 private:
  static double eps(PyObject* const* args, int i) { return number(items(args[4], 3)[i]); }
};

// (input, depthwise, pointwise, eps, stride, padding, activation)
class DepthwiseSeparable : public Block {
 public:
  explicit DepthwiseSeparable(PyObject* const* args)
      : Block(nullptr, 0, args[1], number(items(args[3], 2)[0]), args[2], number(items(args[3], 2)[1])) {
    p_.stride = integer(args[4]), p_.padding = integer(args[5]);
    p_.depthwise_clamp = p_.project_clamp = clamp(args[6]);
  }
  Value bind(const Value& input) override {
    x_ = even_pixels(input);
    bind_block(x_, 0, x_.c);
    Value out = output_like(input.view, x_.n, p_.out_channels, p_.out_height, p_.out_width, depthwise_.weight, project_.weight);
    p_.out = out.image;
    return out;
  }
};

// (input, compress, depthwise, expand, eps, stride, groups, activation)
class ShuffleUnit : public Block {
 public:
  explicit ShuffleUnit(PyObject* const* args)
      : Block(args[1], eps(args, 0), args[2], eps(args, 1), args[3], eps(args, 2), integer(args[6])) {
    p_.stride = integer(args[5]), p_.padding = p_.kernel / 2;
    require(p_.stride == 1 || p_.stride == 2, "fastblocks._C: a stride of 1 or 2");
    p_.expand_clamp = p_.project_clamp = clamp(args[7]), adds_input_ = p_.stride == 1;
  }
  Value bind(const Value& input) override {
    x_ = even_pixels(input);
    bind_block(x_, 0, x_.c);
    require(!adds_input_ || (p_.out_height == x_.h && p_.out_width == x_.w && p_.out_channels == x_.c),
            "fastblocks._C: residual of another shape");
    require(adds_input_ || (p_.out_height == (x_.h + 1) / 2 && p_.out_width == (x_.w + 1) / 2),
            "fastblocks._C: the branch and the pooled input differ in size");
    const int64_t channels = p_.out_channels + (adds_input_ ? 0 : x_.c);
    Value out = output_like(input.view, x_.n, channels, p_.out_height, p_.out_width, first_weight(), depthwise_.weight,
                            project_.weight);
    p_.out = out.image;
    return out;
  }
  void place(float* input, float* output) override {
    Block::place(input, output);
    if (adds_input_) return;
    p_.pooled = p_.out;
    p_.out.data += x_.c;
  }

 private:
  static double eps(PyObject* const* args, int i) { return number(items(args[4], 3)[i]); }
};

// The left branch of ShuffleNetV2's unit with stride 2.
class LeftBranch : public Block {
 public:
  LeftBranch(PyObject* depthwise, double depthwise_eps, PyObject* pointwise, double pointwise_eps, int64_t stride, Clamp act)
      : Block(nullptr, 0, depthwise, depthwise_eps, pointwise, pointwise_eps) {
    p_.stride = stride, p_.padding = p_.kernel / 2, p_.project_clamp = act;
  }
  Value bind(const Value& input) override {
    x_ = even_pixels(input);
    bind_block(x_, 0, x_.c);
    Value out = output_like(input.view, x_.n, p_.out_channels, p_.out_height, p_.out_width, depthwise_.weight, project_.weight);
    p_.out = out.image;
    return out;
  }
};

// (input, left_depthwise, left_pointwise, pointwise1, depthwise, pointwise2, eps, stride, activation)
class ShuffleUnitV2 : public Block {
 public:
  explicit ShuffleUnitV2(PyObject* const* args) : Block(args[3], eps(args, 2), args[4], eps(args, 3), args[5], eps(args, 4)) {
    p_.stride = integer(args[7]), p_.padding = p_.kernel / 2;
    p_.expand_clamp = p_.project_clamp = clamp(args[8]);
    if (truth(args[1]))
      left_ = std::make_unique<LeftBranch>(args[1], eps(args, 0), args[2], eps(args, 1), p_.stride, p_.project_clamp);
  }
  Value bind(const Value& input) override {
    x_ = even_pixels(input);
    const int64_t half = x_.c / 2;
    require(left_ || x_.c % 2 == 0, "fastblocks._C: an odd number of channels cannot be split");
    bind_block(x_, left_ ? 0 : half, left_ ? x_.c : half);
    int64_t left_channels = half;
    Value left{};
    if (left_) {
      left = left_->bind(input);
      left_channels = left.view.size[1];
    }
    require(left_channels == p_.out_channels, "fastblocks._C: the two halves differ in channels");
    require(left_ ? left.view.size[2] == p_.out_height && left.view.size[3] == p_.out_width
                  : p_.out_height == x_.h && p_.out_width == x_.w,
            "fastblocks._C: the two halves differ in size");
    Value out = output_like(input.view, x_.n, 2 * p_.out_channels, p_.out_height, p_.out_width, first_weight(),
                            depthwise_.weight, project_.weight);
    p_.out = out.image;
    if (left_) {
      const int64_t* size = left.view.size;
      memory_ = std::make_unique<Slab>((size[0] * size[1] * size[2] * size[3] + 16) * sizeof(float));
      p_.other = left.image;
      p_.other.data = memory_->floats();
    }
    return out;
  }
  void place(float* input, float* output) override {
    const int64_t half = x_.c / 2;
    Block::place(input && !left_ ? input + half : input, output);
    if (left_) {
      left_->place(input, memory_->floats());
    } else {
      p_.other = p_.x;
      p_.other.data -= half;
    }
  }
  void steps(std::vector<Step>& to) override {
    if (left_) left_->steps(to);
    add_step(to, p_);
  }

 private:
  static double eps(PyObject* const* args, int i) { return number(items(args[6], 5)[i]); }
  std::unique_ptr<LeftBranch> left_;
  std::unique_ptr<Slab> memory_;  // of the left branch's result
};

// (input)
class GlobalAvgPool : public CallOf<PoolParams> {
 public:
  explicit GlobalAvgPool(PyObject* const*) {}
  Value bind(const Value& input) override {
    x_ = even_pixels(input);
    require(x_.h * x_.w > 0, "fastblocks._C: mean of no pixels");
    p_.images = x_.n, p_.pixels = x_.h * x_.w, p_.channels = x_.c;
    p_.x = x_.image.data, p_.image_stride = x_.image.image_stride, p_.pixel_stride = x_.image.pixel_stride;
    return output_like(input.view, x_.n, x_.c, 1, 1);
  }
  void place(float* input, float* output) override {
    if (input) p_.x = input;
    p_.out = output;
  }
  void steps(std::vector<Step>& to) override {
    if (p_.images > 0 && p_.channels > 0) to.push_back({&kernels().global_avg_pool, &p_});
  }
};

// (input, kernel_size, stride, padding)
template <bool kAverage>
class WindowPool : public CallOf<WindowPoolParams> {
 public:
  explicit WindowPool(PyObject* const* args) {
    int64_t* const to[3] = {p_.kernel, p_.stride, p_.padding};
    for (int i = 0; i < 3; ++i) {
      PyObject** pair = items(args[1 + i], 2);
      to[i][0] = integer(pair[0]), to[i][1] = integer(pair[1]);
    }
    p_.average = kAverage;
  }
  Value bind(const Value& input) override {
    x_ = dense_channels(input);
    p_.images = x_.n, p_.height = x_.h, p_.width = x_.w, p_.channels = x_.c, p_.x = x_.image;
    p_.out_height = output_size(x_.h, p_.kernel[0], p_.stride[0], p_.padding[0], 1);
    p_.out_width = output_size(x_.w, p_.kernel[1], p_.stride[1], p_.padding[1], 1);
    for (int i = 0; i < 2; ++i) require(2 * p_.padding[i] <= p_.kernel[i], "fastblocks._C: windows that lie in the padding");
    Value out = output_like(input.view, x_.n, x_.c, p_.out_height, p_.out_width);
    p_.out = out.image;
    return out;
  }
  void place(float* input, float* output) override {
    if (input) p_.x.data = input;
    p_.out.data = output;
  }
  void steps(std::vector<Step>& to) override {
    if (p_.images > 0 && p_.channels > 0) to.push_back({&kernels().window_pool, &p_});
  }
};

// (input, weight, bias): a pointwise convolution of as many pixels as the input has rows.
class Linear : public CallOf<PointwiseParams> {
 public:
  explicit Linear(PyObject* const* args) : weight_(fastblocks::view(args[1])) {
    require(weight_.dims == 2, "fastblocks._C: a linear weight has two dimensions");
    pack_ = find_pack(args[1], weight_, Pack::kConv);
    p_.groups = p_.shuffle = 1;
    p_.packed_weight = pack_->data, p_.out_channels = p_.out_stride = weight_.size[0];
    p_.norm.conv_bias = vector_values(args[2], p_.out_channels), p_.clamp = clamp(Py_None);
  }
  Value bind(const Value& input) override {
    TensorView v = input.view;
    require(input.tensor && v.dims == 2 && weight_.size[1] == v.size[1], "fastblocks._C: input and weight do not fit");
    const int64_t rows = v.size[0], c = v.size[1];
    if ((c > 1 && v.stride[1] != 1) || (rows > 1 && v.stride[0] < c)) {
      x_.owner = contiguous(input.tensor);
      v = fastblocks::view(x_.owner.get());
    }
    p_.pixels = rows, p_.in_channels = c;
    p_.x = v.data, p_.x_stride = rows > 1 ? v.stride[0] : c;
    Value out{};
    out.view = {nullptr, 2, {rows, p_.out_channels, 1, 1}, {p_.out_channels, 1, 1, 1}};
    return out;
  }
  void place(float*, float* output) override { p_.out = output; }
  void steps(std::vector<Step>& to) override {
    if (p_.pixels > 0 && p_.out_channels > 0) to.push_back({&kernels().pointwise, &p_});
  }

 private:
  TensorView weight_;
  std::shared_ptr<const Pack> pack_;
};

// ------------------------------------------------------------------------------------------------- the shuffles

// One or two inputs, whose channels follow each other, shuffled in `groups` groups and dealt to one or two outputs.
PyObject* shuffle(PyObject* const* inputs, int in_count, int64_t groups, int out_count) {
  TensorView v[2];
  ShuffleParams p{};
  bool channels_last = true;
  for (int i = 0; i < in_count; ++i) {
    v[i] = view(inputs[i]);
    require(v[i].dims == 4, "fastblocks._C: an input has four dimensions");
    channels_last = channels_last && suggests_channels_last(v[i]);
    for (const int dim : {0, 2, 3}) require(v[i].size[dim] == v[0].size[dim], "fastblocks._C: inputs of other sizes");
    p.channels += v[i].size[1];
  }
  const int64_t n = v[0].size[0], h = v[0].size[2], w = v[0].size[3];
  require(groups >= 1 && p.channels % groups == 0 && p.channels % out_count == 0,
          "fastblocks._C: groups that do not divide the channels");
  p.images = n, p.pixels = h * w, p.groups = groups, p.planar = !channels_last;
  p.in_count = in_count, p.out_count = out_count;
  Ref owners[2];
  for (int i = 0; i < in_count; ++i) {
    const int64_t c = v[i].size[1];
    if (channels_last) {
      ImageInput x = even_pixels(inputs[i], v[i]);
      p.in[i] = {x.image.data, x.image.image_stride, x.image.pixel_stride, c};
      owners[i] = std::move(x.owner);
    } else {  // the planes must be dense, and nothing else
      const bool dense = (w < 2 || v[i].stride[3] == 1) && (h < 2 || v[i].stride[2] == w);
      owners[i] = dense ? Ref::borrow(inputs[i]) : contiguous(inputs[i]);
      const TensorView planes = view(owners[i].get());
      p.in[i] = {planes.data, planes.stride[0], planes.stride[1], c};
    }
  }
  const int64_t c = p.channels / out_count;
  const TensorView wanted = channels_last ? TensorView{nullptr, 4, {n, c, h, w}, {h * w * c, 1, w * c, c}}
                                          : TensorView{nullptr, 4, {n, c, h, w}, {c * h * w, h * w, w, 1}};
  std::optional<Output> outputs[2];
  for (int i = 0; i < out_count; ++i) {
    outputs[i].emplace(wanted, true);
    p.out[i] = {outputs[i]->data(), h * w * c, channels_last ? c : h * w, c};
  }
  if (n > 0 && p.channels > 0 && p.pixels > 0) run_steps({{&kernels().shuffle, &p}});
  if (out_count == 1) return outputs[0]->tensor().release();
  const Ref left = outputs[0]->tensor(), right = outputs[1]->tensor();
  return PyTuple_Pack(2, left.get(), right.get());
}

// (input, groups)
PyObject* channel_shuffle(PyObject* const* args) { return shuffle(args, 1, integer(args[1]), 1); }
PyObject* channel_shuffle_split(PyObject* const* args) { return shuffle(args, 1, integer(args[1]), 2); }
// (a, b, groups)
PyObject* cat_shuffle_split(PyObject* const* args) { return shuffle(args, 2, integer(args[2]), 2); }

// ------------------------------------------------------------------------------------------------------ entry

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

template <class Kind>
std::unique_ptr<Call> make(PyObject* const* args) {
  return std::make_unique<Kind>(args);
}

bool right_count(Py_ssize_t wanted, Py_ssize_t count) {
  if (wanted != count) PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, count);
  return wanted == count;
}

template <class Kind, Py_ssize_t kArguments>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) noexcept {
  if (!right_count(kArguments, count)) return nullptr;
  return guarded([&] {
    std::vector<std::unique_ptr<Call>> calls;
    calls.push_back(make<Kind>(args));
    return run_calls(calls, args[0]).release();
  });
}

template <PyObject* (*kFunction)(PyObject* const*), Py_ssize_t kArguments>
PyObject* function_entry(PyObject*, PyObject* const* args, Py_ssize_t count) noexcept {
  if (!right_count(kArguments, count)) return nullptr;
  return guarded([&] { return kFunction(args); });
}

struct OpRow {
  const char* name;
  PyObject* (*entry)(PyObject*, PyObject* const*, Py_ssize_t) noexcept;
  std::unique_ptr<Call> (*make)(PyObject* const*);  // null: no part of a chain
  Py_ssize_t arguments;
};

template <class Kind, Py_ssize_t kArguments>
constexpr OpRow row(const char* name) {
  return {name, entry<Kind, kArguments>, make<Kind>, kArguments};
}

template <PyObject* (*kFunction)(PyObject* const*), Py_ssize_t kArguments>
constexpr OpRow row(const char* name) {
  return {name, function_entry<kFunction, kArguments>, nullptr, kArguments};
}

constexpr OpRow kOps[] = {
    row<DenseConv, 7>("conv_bn_act"),
    row<Pointwise, 5>("pointwise_conv_bn_act"),
    row<GroupedPointwise, 7>("grouped_pointwise_conv_bn_act"),
    row<Depthwise, 7>("depthwise_conv_bn_act"),
    row<InvertedResidual, 9>("inverted_residual"),
    row<DepthwiseSeparable, 7>("depthwise_separable"),
    row<ShuffleUnit, 8>("shuffle_unit"),
    row<ShuffleUnitV2, 9>("shuffle_unit_v2"),
    row<WindowPool<false>, 4>("max_pool2d"),
    row<WindowPool<true>, 4>("avg_pool2d"),
    row<GlobalAvgPool, 1>("global_avg_pool"),
    row<Linear, 3>("linear"),
    row<channel_shuffle, 2>("channel_shuffle"),
    row<channel_shuffle_split, 2>("channel_shuffle_split"),
    row<cat_shuffle_split, 3>("cat_shuffle_split"),
};
constexpr size_t kOpCount = sizeof(kOps) / sizeof(kOps[0]);

PyCFunction function_of(const OpRow& row) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(row.entry)); }

}  // namespace

std::unique_ptr<Call> make_call(PyObject* function, PyObject* const* args, Py_ssize_t count) {
  if (!PyCFunction_CheckExact(function)) return nullptr;
  const PyCFunction wanted = PyCFunction_GET_FUNCTION(function);
  for (const OpRow& row : kOps)
    if (function_of(row) == wanted && row.make && row.arguments == count) return row.make(args);
  return nullptr;
}

Ref run_calls(const std::vector<std::unique_ptr<Call>>& calls, PyObject* input, const Fits& fits) {
  Value value{view(input), input, {}};
  // Each output takes the memory of the last but one, which nobody reads any more.
  int64_t floats[2] = {0, 0};
  const size_t last = calls.size() - 1;
  for (size_t i = 0; i <= last; ++i) {
    if (fits && !fits(i, value.view)) return Ref::borrow(Py_None);
    value = calls[i]->bind(value);
    const int64_t* size = value.view.size;
    if (i < last) floats[i % 2] = std::max(floats[i % 2], size[0] * size[1] * size[2] * size[3]);
  }
  const auto room = [](int64_t count) { return (size_t)(count + 16) * sizeof(float); };
  const Slab first(last > 0 ? room(floats[0]) : 0), second(last > 1 ? room(floats[1]) : 0);
  Output out(value.view);
  const Slab* slabs[2] = {&first, &second};
  for (size_t i = 0; i <= last; ++i)
    calls[i]->place(i > 0 ? slabs[(i - 1) % 2]->floats() : nullptr, i < last ? slabs[i % 2]->floats() : out.data());
  std::vector<Step> steps;
  for (const auto& call : calls) call->steps(steps);
  run_steps(steps);
  return out.tensor();
}

PyMethodDef* op_methods() {
  static PyMethodDef methods[kOpCount + 1] = {};
  for (size_t i = 0; i < kOpCount; ++i) methods[i] = {kOps[i].name, function_of(kOps[i]), METH_FASTCALL, nullptr};
  return methods;
}

}  // namespace fastblocks
