#include <optional>

#include "calls.h"

namespace fastblocks {

namespace {

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

}  // namespace

// (input, groups)
PyObject* channel_shuffle(PyObject* const* args) { return shuffle(args, 1, integer(args[1]), 1); }
PyObject* channel_shuffle_split(PyObject* const* args) { return shuffle(args, 1, integer(args[1]), 2); }
// (a, b, groups)
PyObject* cat_shuffle_split(PyObject* const* args) { return shuffle(args, 2, integer(args[2]), 2); }

}  // namespace fastblocks
