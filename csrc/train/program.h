// A chain of layers in training, as a program: nodes that each make one value from earlier ones. Python describes it once a
// chain (fastblocks/functional/training.py); shapes and addresses come with each call.
#pragma once

#include <Python.h>

#include <memory>
#include <vector>

#include "../kernels/train/params.h"
#include "../tensors.h"

namespace fastblocks {
namespace train {

enum class Kind : int64_t { kPointwise, kDepthwise, kDense, kAdd, kPoolCat, kInterleave, kMaxPool, kActivate, kMean };

// Value 0 is the chain's input, value i + 1 the output of node i. A convolution's value is read through its BatchNorm and
// activation; all others are stored as they are read.
struct Node {
  Kind kind;
  int64_t input;            // value
  int64_t first, channels;  // a slice of the input's channels; channels -1: all of them
  int64_t other;            // the second value of a join: always a convolution's, which nothing else reads; -1: none
  int64_t groups, shuffle;
  int64_t stride[2], padding[2], dilation[2], kernel[2];
  int64_t activation;  // 0 none, 1 ReLU, 2 ReLU6
  bool frozen;         // the BatchNorm uses its running statistics
  bool update;         // and, where it does not, updates them
  double eps;
  int64_t conv;  // index among the convolutions, -1: none

  bool is_conv() const { return kind <= Kind::kDense; }
  Clamp clamp() const;
};

struct Program {
  std::vector<Node> nodes;
  int64_t convs;
};

struct Shape {
  int64_t n, h, w, c;
  int64_t pixels() const { return n * h * w; }
  int64_t floats() const { return pixels() * c; }
};

// The tensors of one convolution.
struct ConvTensors {
  TensorView weight;
  const float *gamma, *beta;  // or null
  float *running_mean, *running_var;
  double momentum;
};

// Some channels of a value.
struct Piece {
  int64_t value, first, channels;
};

// What a 1x1 convolution or an interleaving reads: pieces of stored values, side by side.
struct Route {
  std::vector<Piece> pieces;
  std::vector<int64_t> order;  // which of the node's channels lies there
};

// A program with the sizes of one call, and the addresses that both directions need.
struct Bound {
  const Program* program;
  std::vector<Shape> shapes;  // a value
  std::vector<ConvTensors> convs;
  std::vector<Route> routes;  // a node
  // A value: not an interleaving whose readers take its channels from where they were made, nor a sum that its readers make.
  std::vector<bool> stored;
  std::vector<bool> made_by_readers;  // a value: a sum that is not stored; its parts are
  // A node: a maximum pool of a convolution's z itself, or of -z where BatchNorm changes its sign. What reads it applies
  // BatchNorm and activation, on a quarter of the pixels, as it would for the convolution's own output.
  std::vector<bool> pools_z;
  std::vector<bool> read_once;             // a value: each channel has one reader, and that can gather
  std::vector<std::vector<Plane>> planes;  // a value, and its gradient
  ImageInput x;
  bool planar;                        // x is NCHW, for a dense convolution
  std::vector<int64_t> norm_offsets;  // of each convolution's constants
  int64_t norm_floats;
  float* norms;
  std::vector<float*> values;          // a value
  std::vector<unsigned char*> places;  // a node: of a maximum pool

  Bound(const Program& program, PyObject* x, PyObject* weights, PyObject* affine);
  Norm norm(const Node& node) const;
  const Node* maker(int64_t value) const { return value ? &program->nodes[value - 1] : nullptr; }
  // The convolution whose BatchNorm and activation a value is read through, or null.
  const Node* normalised_by(int64_t value) const;
  // Where a channel of a value lies: floats from its beginning, and between pixels.
  struct Place {
    int64_t offset, stride;
  };
  Place place(int64_t value, int64_t channel) const;
  Planes planes_of(int64_t value) const;
  // What a reader of a slice of a value reads.
  Source source(int64_t value, int64_t first = 0) const;
  TrainDepthwise depthwise(const Node& node, int64_t value) const;
  ConvParams dense(const Node& node, int64_t value) const;
  // Whether a 1x1 convolution gives the gradient of each piece that it reads to where that was made.
  bool gathers(const Node& node) const { return read_once[node.input]; }
  std::vector<SourcePiece> sources(const Route& route) const;

 private:
  void find_routes();
  void find_planes();
  void find_sums();
  void find_pools();
};

// The constants from a channel on.
inline Norm moved(const Norm& n, int64_t first) {
  return {n.mean + first, n.scale + first, n.shift + first, n.inverse + first};
}

const Program& program_of(PyObject* capsule);

// The functions for Python; each returns a new reference. (nodes): a capsule.
PyObject* make_program(PyObject* const* args);
PyObject* forward(PyObject* const* args);
PyObject* backward(PyObject* const* args);

}  // namespace train
}  // namespace fastblocks
