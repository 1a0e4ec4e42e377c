#include "calls.h"

namespace fastblocks {

namespace {

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
  // Not where most rows of a window are the next one's, too, or where the rows are too few to share out.
  bool absorb(const RowMaker& maker) override {
    if (!maker.conv || kAverage || p_.kernel[0] > 2 * p_.stride[0] || p_.out_height < 8) return false;
    maker.conv->absorbed = true, p_.stem = maker.conv;
    return true;
  }
};

}  // namespace

std::unique_ptr<Call> max_pool2d(PyObject* const* args) { return std::make_unique<WindowPool<false>>(args); }
std::unique_ptr<Call> avg_pool2d(PyObject* const* args) { return std::make_unique<WindowPool<true>>(args); }
std::unique_ptr<Call> global_avg_pool(PyObject* const* args) { return std::make_unique<GlobalAvgPool>(args); }

}  // namespace fastblocks
