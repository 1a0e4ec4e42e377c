#include "program.h"

#include <cmath>

#include "../ops/calls.h"

namespace fastblocks {
namespace train {

namespace {

const char* const kName = "fastblocks.program";
constexpr Py_ssize_t kFields = 19;

Node read_node(PyObject* tuple) {
  PyObject** f = items(tuple, kFields);
  int64_t v[kFields - 1];
  for (Py_ssize_t i = 0; i + 1 < kFields; ++i) v[i] = integer(f[i]);
  Node n{};
  require(v[0] >= 0 && v[0] <= (int64_t)Kind::kMean, "fastblocks._C: no such node");
  n.kind = (Kind)v[0];
  n.input = v[1], n.first = v[2], n.channels = v[3], n.other = v[4], n.groups = v[5], n.shuffle = v[6];
  for (int i = 0; i < 2; ++i)
    n.stride[i] = v[7 + i], n.padding[i] = v[9 + i], n.dilation[i] = v[11 + i], n.kernel[i] = v[13 + i];
  n.activation = v[15], n.frozen = v[16] != 0, n.update = v[17] != 0;
  n.eps = number(f[kFields - 1]);
  n.conv = -1;
  return n;
}

bool is_join(Kind kind) { return kind == Kind::kAdd || kind == Kind::kPoolCat || kind == Kind::kInterleave; }

// That nothing reads a value that is not there, and that a join's second value has no other reader.
void check(const Program& program) {
  const int64_t count = (int64_t)program.nodes.size();
  require(count > 0, "fastblocks._C: a program without nodes");
  std::vector<int> readers(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const Node& n = program.nodes[i];
    require(n.input >= 0 && n.input <= i && n.other >= -1 && n.other <= i, "fastblocks._C: a value that is not there yet");
    require(is_join(n.kind) == (n.other > 0), "fastblocks._C: a join has two values, other nodes one");
    require(n.groups >= 1 && n.shuffle >= 1 && n.activation >= 0 && n.activation <= 2, "fastblocks._C: bad node");
    ++readers[n.input];
    if (n.other > 0) ++readers[n.other];
    if (n.kind == Kind::kDense) require(n.input == 0, "fastblocks._C: a dense convolution reads the input");
    require(n.kind != Kind::kMean || i + 1 == count, "fastblocks._C: nothing reads a mean");
  }
  for (const Node& n : program.nodes)
    if (n.other > 0)
      require(program.nodes[n.other - 1].is_conv() && readers[n.other] == 1,
              "fastblocks._C: a join's second value is a convolution's, and the join's alone");
  require(!program.nodes.back().is_conv(), "fastblocks._C: a chain ends in a stored value");
}

}  // namespace

Clamp Node::clamp() const {
  if (activation == 0) return {-INFINITY, INFINITY};
  return {0.0f, activation == 2 ? 6.0f : INFINITY};
}

PyObject* make_program(PyObject* const* args) {
  PyObject* const nodes = args[0];
  auto program = std::make_unique<Program>();
  require(PyTuple_Check(nodes), "fastblocks._C: nodes are a tuple");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(nodes); ++i) {
    program->nodes.push_back(read_node(PyTuple_GET_ITEM(nodes, i)));
    Node& node = program->nodes.back();
    if (node.is_conv()) node.conv = program->convs++;
  }
  check(*program);
  Ref capsule = Ref::checked(PyCapsule_New(
      program.get(), kName, [](PyObject* capsule) { delete static_cast<Program*>(PyCapsule_GetPointer(capsule, kName)); }));
  program.release();
  return capsule.release();
}

const Program& program_of(PyObject* capsule) {
  const auto* program = static_cast<const Program*>(PyCapsule_GetPointer(capsule, kName));
  if (!program) throw PythonError();
  return *program;
}

Bound::Bound(const Program& p, PyObject* input, PyObject* weights, PyObject* affine) : program(&p) {
  const TensorView v = view(input);
  require(v.dims == 4, "fastblocks._C: an input has four dimensions");
  planar =
      p.nodes[0].kind == Kind::kDense && !((v.size[1] < 2 || v.stride[1] == 1) && (v.size[3] < 2 || v.stride[3] >= v.size[1]));
  if (planar) {
    x.owner = v.size[3] > 1 && v.stride[3] != 1 ? contiguous(input) : Ref::borrow(input);
    const TensorView rows = view(x.owner.get());
    x.n = v.size[0], x.c = v.size[1], x.h = v.size[2], x.w = v.size[3];
    x.image = {rows.data, rows.stride[0], rows.stride[2], rows.stride[1]};
  } else {
    x = even_pixels(input, v);
  }
  for (const Node& n : p.nodes) require(!planar || n.input != 0 || n.kind == Kind::kDense, "fastblocks._C: an NCHW input");
  shapes.push_back({x.n, x.h, x.w, x.c});
  require(x.n * x.h * x.w > 0, "fastblocks._C: an empty input");
  PyObject** w = items(weights, p.convs);
  PyObject** a = items(affine, 2 * p.convs);
  norm_floats = 0;
  for (const Node& n : p.nodes) {
    const Shape in = shapes[n.input];
    const int64_t channels = n.channels < 0 ? in.c : n.channels;
    require(n.first >= 0 && channels > 0 && n.first + channels <= in.c, "fastblocks._C: a slice beyond the channels");
    const bool whole = n.first == 0 && channels == in.c;
    Shape out = {in.n, in.h, in.w, channels};
    if (n.is_conv()) {
      const TensorView weight = view(w[n.conv]);
      require(weight.dims == 4, "fastblocks._C: a convolution's weight has four dimensions");
      for (int i = 0; i < 4; ++i) require(weight.size[i] >= 1, "fastblocks._C: an empty weight");
      out.c = weight.size[0];
      require(weight.size[2] == n.kernel[0] && weight.size[3] == n.kernel[1], "fastblocks._C: a kernel of another size");
      require_sizes({n.kernel[0], n.kernel[1], 1});
      require(n.kernel[0] * n.kernel[1] <= kMaxTaps, "fastblocks._C: too large a kernel");
      const bool depthwise = n.kind == Kind::kDepthwise;
      if (depthwise) {
        require(out.c == channels && weight.size[1] == 1 && whole && channels % n.shuffle == 0,
                "fastblocks._C: a depthwise weight");
      } else {
        require(channels % n.groups == 0 && out.c % n.groups == 0 && weight.size[1] == channels / n.groups && n.shuffle == 1,
                "fastblocks._C: a weight of another number of channels");
        require(n.groups == 1 || n.kind == Kind::kPointwise, "fastblocks._C: groups");
      }
      if (n.kind == Kind::kPointwise) {
        require(n.kernel[0] == 1 && n.kernel[1] == 1, "fastblocks._C: not a 1x1 weight");
      } else {
        require(whole, "fastblocks._C: a slice");
        out.h = output_size(in.h, n.kernel[0], n.stride[0], n.padding[0], n.dilation[0]);
        out.w = output_size(in.w, n.kernel[1], n.stride[1], n.padding[1], n.dilation[1]);
      }
      ConvTensors tensors{};
      tensors.weight = weight;
      tensors.gamma = vector_values(a[2 * n.conv], out.c);
      tensors.beta = vector_values(a[2 * n.conv + 1], out.c);
      convs.push_back(tensors);
      norm_offsets.push_back(norm_floats);
      norm_floats += 4 * ((out.c + kPadding - 1) / kPadding * kPadding);
    } else if (n.kind == Kind::kMaxPool || n.kind == Kind::kPoolCat) {
      require(whole && n.kernel[0] * n.kernel[1] <= kMaxTaps && n.kernel[0] >= 1 && n.kernel[1] >= 1, "fastblocks._C: a pool");
      out.h = output_size(in.h, n.kernel[0], n.stride[0], n.padding[0], 1);
      out.w = output_size(in.w, n.kernel[1], n.stride[1], n.padding[1], 1);
      for (int i = 0; i < 2; ++i) require(2 * n.padding[i] <= n.kernel[i], "fastblocks._C: a pool's padding");
    } else {
      require(whole || n.kind == Kind::kInterleave, "fastblocks._C: a slice");
      if (n.kind == Kind::kMean) out.h = out.w = 1;
    }
    if (n.other > 0) {
      const Shape& b = shapes[n.other];
      require(b.n == out.n && b.h == out.h && b.w == out.w && (n.kind == Kind::kPoolCat || b.c == out.c),
              "fastblocks._C: branches of different shapes");
      if (n.kind == Kind::kPoolCat) out.c += b.c;
      if (n.kind == Kind::kInterleave) out.c *= 2;
    }
    require_sizes({out.n, out.h, out.w, out.c});
    shapes.push_back(out);
  }
  find_routes();
  find_planes();
  find_pools();
  find_sums();
  values.assign(shapes.size(), nullptr);
  values[0] = x.image.data;
  places.assign(p.nodes.size(), nullptr);
  norms = nullptr;
}

Norm Bound::norm(const Node& node) const {
  const int64_t stride = (convs[node.conv].weight.size[0] + kPadding - 1) / kPadding * kPadding;
  float* at = norms + norm_offsets[node.conv];
  return {at, at + stride, at + 2 * stride, at + 3 * stride};
}

// Of sums in a row, each the first part of the next, every second is not stored: what reads it adds its two parts, which are
// there for other reasons. A sum of three parts would be read slower than it is written.
void Bound::find_sums() {
  made_by_readers.assign(shapes.size(), false);
  for (size_t i = 0; i + 1 < program->nodes.size(); ++i) {
    const Node& node = program->nodes[i];
    if (node.kind != Kind::kAdd || !stored[node.input]) continue;
    if (normalised_by(node.input) || maker(node.other)->activation) continue;
    stored[i + 1] = false, made_by_readers[i + 1] = true;
  }
}

// BatchNorm and activation keep the order of values, or turn it round: they may be exchanged with a maximum. Where the scale is
// 0 all values of a window are equal, and the first one is taken.
void Bound::find_pools() {
  const std::vector<Node>& nodes = program->nodes;
  pools_z.assign(nodes.size(), false);
  for (size_t i = 0; i + 1 < nodes.size(); ++i) {
    if (nodes[i].kind != Kind::kMaxPool || nodes[i].input == 0 || maker(nodes[i].input)->kind != Kind::kDense) continue;
    int readers = 0;
    for (const Node& n : nodes) readers += (n.input == nodes[i].input) + (n.other == nodes[i].input);
    pools_z[i] = readers == 1;
  }
}

const Node* Bound::normalised_by(int64_t value) const {
  const Node* node = maker(value);
  if (node && node->kind == Kind::kMaxPool && pools_z[value - 1]) node = maker(node->input);
  return node && node->is_conv() ? node : nullptr;
}

Bound::Place Bound::place(int64_t value, int64_t channel) const {
  for (const Plane& plane : planes[value])
    if (channel < plane.first + plane.channels)
      return {plane.first * shapes[value].pixels() + channel - plane.first, plane.channels};
  return {channel, shapes[value].c};
}

Planes Bound::planes_of(int64_t value) const {
  return {planes[value].data(), (int64_t)planes[value].size(), shapes[value].pixels()};
}

Source Bound::source(int64_t value, int64_t first) const {
  const Node* node = maker(value);
  if (made_by_readers[value]) {
    Source s = source(node->other, first);
    const Source addend = source(node->input, first);
    s.addend = addend.data, s.addend_stride = addend.stride;
    s.clamp = node->clamp();
    return s;
  }
  const Place at = place(value, first);
  Source s{values[value] + at.offset, value ? at.stride : x.image.pixel_stride, {}, {-INFINITY, INFINITY}, nullptr, 0};
  if (const Node* conv = normalised_by(value)) {
    s.norm = moved(norm(*conv), first);
    s.clamp = conv->clamp();
  }
  return s;
}

std::vector<SourcePiece> Bound::sources(const Route& route) const {
  std::vector<SourcePiece> pieces;
  for (const Piece& piece : route.pieces) pieces.push_back({source(piece.value, piece.first), piece.channels});
  return pieces;
}

TrainDepthwise Bound::depthwise(const Node& node, int64_t value) const {
  const Shape &in = shapes[node.input], &out = shapes[value];
  TrainDepthwise p{};
  p.images = in.n, p.height = in.h, p.width = in.w, p.channels = in.c, p.out_height = out.h, p.out_width = out.w;
  for (int i = 0; i < 2; ++i)
    p.kernel[i] = node.kernel[i], p.stride[i] = node.stride[i], p.padding[i] = node.padding[i],
    p.dilation[i] = node.dilation[i];
  p.shuffle = node.shuffle;
  p.x = source(node.input);
  p.z = values[value];
  return p;
}

ConvParams Bound::dense(const Node& node, int64_t value) const {
  const Shape &in = shapes[node.input], &out = shapes[value];
  ConvParams p{};
  p.images = in.n, p.height = in.h, p.width = in.w, p.in_channels = in.c, p.out_channels = out.c;
  p.out_height = out.h, p.out_width = out.w;
  for (int i = 0; i < 2; ++i)
    p.kernel[i] = node.kernel[i], p.stride[i] = node.stride[i], p.padding[i] = node.padding[i],
    p.dilation[i] = node.dilation[i];
  p.planar = planar;
  p.x = x.image;
  p.clamp = {-INFINITY, INFINITY};
  p.out = {values[value], out.h * out.w * out.c, out.w * out.c, out.c};
  return p;
}

}  // namespace train
}  // namespace fastblocks
