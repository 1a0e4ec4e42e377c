#include "calls.h"

namespace fastblocks {

namespace {

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
  void finish() override {
    CallOf::finish();
    other_.owner = Ref();
  }
  bool reads_in_place(PyObject* tensor) const override { return !residual_ && CallOf::reads_in_place(tensor); }

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
  explicit Window(PyObject* const* args) : eps_(number(args[2])) {
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
  explicit DenseConv(PyObject* const* args) : Window(args), record_(args[1]) {}
  Value bind(const Value& input) override {
    // An NCHW image is read where it is; the plane stride takes the pixel stride's place.
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
    conv_ = std::make_unique<Conv>(record_, eps_, Pack::kConv);
    require(conv_->in() == x_.c, "fastblocks._C: a weight of another number of channels");
    p_.in_channels = x_.c, p_.out_channels = conv_->out();
    return bind_window(input, *conv_);
  }
  void steps(std::vector<Step>& to) override {
    if (p_.images > 0 && p_.out_channels > 0) to.push_back({&kernels().conv, &p_});
  }
  RowMaker row_maker() override { return {&p_, nullptr}; }

 private:
  PyObject* record_;            // borrowed
  std::unique_ptr<Conv> conv_;  // which pack it needs depends on the input
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
    // Behind a pooling, in a chain, vectors are still images of one pixel.
    const bool vectors = input.tensor ? v.dims == 2 : v.dims == 4 && v.size[2] == 1 && v.size[3] == 1;
    require(vectors && weight_.size[1] == v.size[1], "fastblocks._C: input and weight do not fit");
    const int64_t rows = v.size[0], c = v.size[1];
    if (!input.tensor) {
      v = {nullptr, 2, {rows, c, 1, 1}, {c, 1, 1, 1}};
    } else if ((c > 1 && v.stride[1] != 1) || (rows > 1 && v.stride[0] < c)) {
      x_.owner = contiguous(input.tensor);
      v = fastblocks::view(x_.owner.get());
    }
    p_.pixels = rows, p_.in_channels = c;
    p_.x = v.data, p_.x_stride = rows > 1 ? v.stride[0] : c;
    Value out{};
    out.view = {nullptr, 2, {rows, p_.out_channels, 1, 1}, {p_.out_channels, 1, 1, 1}};
    return out;
  }
  void place(float* input, float* output) override {
    if (input) p_.x = input;
    p_.out = output;
  }
  void steps(std::vector<Step>& to) override {
    if (p_.pixels > 0 && p_.out_channels > 0) to.push_back({&kernels().pointwise, &p_});
  }

 private:
  TensorView weight_;
  std::shared_ptr<const Pack> pack_;
};

}  // namespace

std::unique_ptr<Call> conv_bn_act(PyObject* const* args) { return std::make_unique<DenseConv>(args); }
std::unique_ptr<Call> pointwise_conv_bn_act(PyObject* const* args) { return std::make_unique<Pointwise>(args); }
std::unique_ptr<Call> grouped_pointwise_conv_bn_act(PyObject* const* args) { return std::make_unique<GroupedPointwise>(args); }
std::unique_ptr<Call> depthwise_conv_bn_act(PyObject* const* args) { return std::make_unique<Depthwise>(args); }
std::unique_ptr<Call> linear(PyObject* const* args) { return std::make_unique<Linear>(args); }

}  // namespace fastblocks
