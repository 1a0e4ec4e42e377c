#include "calls.h"

namespace fastblocks {

namespace {

// What the fused blocks have in common: up to three convolutions.
class Block : public CallOf<BlockParams> {
 public:
  // Of a block that reads the whole input and makes the whole output.
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
  void place(float* input, float* output) override {
    if (input) p_.x.data = input;
    if (adds_input_) p_.residual = p_.x;
    p_.out.data = output;
  }
  void steps(std::vector<Step>& to) override { add_step(to, p_); }

 protected:
  // For blocks of which the depthwise convolution alone reads the input.
  bool take_over(const RowMaker& maker) {
    if (expand_ || adds_input_) return false;
    if (maker.conv) maker.conv->absorbed = true, p_.stem = maker.conv;
    if (maker.block && pays(*maker.block)) maker.block->absorbed = true, p_.source = maker.block;
    return p_.stem || p_.source;
  }
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
  // Both blocks' weights are to stay in L2 beside some rows; and it is for maps that do not.
  bool pays(const BlockParams& source) const {
    const int64_t weights =
        source.hidden_channels * (source.in_channels * (source.expand_weight != nullptr) + source.out_channels) +
        p_.hidden_channels * p_.out_channels;
    return !source.source && weights <= 32 * 1024 && p_.out_height * p_.out_width >= 28 * 28 &&
           p_.height * p_.width * p_.in_channels >= 256 * 1024;
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
  RowMaker row_maker() override { return {nullptr, &p_}; }
  bool absorb(const RowMaker& maker) override { return take_over(maker); }

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
  RowMaker row_maker() override { return {nullptr, &p_}; }
  bool absorb(const RowMaker& maker) override { return take_over(maker); }
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
    if (adds_input_) return Block::bind(input);
    x_ = even_pixels(input);
    bind_block(x_, 0, x_.c);
    require(p_.out_height == (x_.h + 1) / 2 && p_.out_width == (x_.w + 1) / 2,
            "fastblocks._C: the branch and the pooled input differ in size");
    // torch.cat gives channels_last where both parts are: the pooled input is what the input is.
    Value out = output_like(input.view, x_.n, x_.c + p_.out_channels, p_.out_height, p_.out_width);
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
    // torch.cat gives channels_last where both parts are.
    const TensorView& like = left_ ? left.view : input.view;
    const bool right_last = suggests_channels_last(input.view) || suggests_channels_last(first_weight()) ||
                            suggests_channels_last(depthwise_.weight) || suggests_channels_last(project_.weight);
    Value out = output_like(right_last ? like : input.view, x_.n, 2 * p_.out_channels, p_.out_height, p_.out_width);
    p_.out = out.image;
    if (left_) {
      left_floats_ = left.view.size[0] * left.view.size[1] * left.view.size[2] * left.view.size[3] + 16;
      p_.other = left.image;
    }
    return out;
  }
  void place(float* input, float* output) override {
    const int64_t half = x_.c / 2;
    Block::place(input && !left_ ? input + half : input, output);
    if (left_) {
      memory_ = std::make_unique<Slab>(left_floats_ * sizeof(float));
      p_.other.data = memory_->floats();
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
  void finish() override {
    Block::finish();
    if (left_) left_->finish();
    memory_.reset();
  }
  bool reads_in_place(PyObject* tensor) const override {
    return Block::reads_in_place(tensor) && (!left_ || left_->reads_in_place(tensor));
  }

 private:
  static double eps(PyObject* const* args, int i) { return number(items(args[6], 5)[i]); }
  std::unique_ptr<LeftBranch> left_;
  int64_t left_floats_ = 0;
  std::unique_ptr<Slab> memory_;  // of the left branch's result
};

}  // namespace

std::unique_ptr<Call> inverted_residual(PyObject* const* args) { return std::make_unique<InvertedResidual>(args); }
std::unique_ptr<Call> depthwise_separable(PyObject* const* args) { return std::make_unique<DepthwiseSeparable>(args); }
std::unique_ptr<Call> shuffle_unit(PyObject* const* args) { return std::make_unique<ShuffleUnit>(args); }
std::unique_ptr<Call> shuffle_unit_v2(PyObject* const* args) { return std::make_unique<ShuffleUnitV2>(args); }

}  // namespace fastblocks
