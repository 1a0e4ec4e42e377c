// Packed weights: one slot a weight tensor, in a table that holds the tensors weakly.
//
// A pack depends on the weight alone (BatchNorm is folded per call), so training and evaluation share it and running statistics
// cannot make one stale. A slot is good while the tensor's address and version are those it was made from; it holds the
// storage, so that the address cannot be given to another tensor meanwhile. Edits through .data and numpy change no version:
// forget_pack. Everything here needs the GIL.
#pragma once

#include <memory>

#include "tensors.h"

namespace fastblocks {

// A packed weight, and the shape it was made for: what the kernels will read of it depends on nothing else.
struct Pack {
  enum Kind { kConv, kDepthwise, kKinds };
  Kind kind;
  int level;
  int64_t groups;  // packed one after the other
  int64_t out_channels, in_channels, kernel[2];
  float* data = nullptr;

  Pack() = default;
  ~Pack();
  Pack(const Pack&) = delete;
  Pack& operator=(const Pack&) = delete;
};

// The pack of a weight (out, in of a group, kh, kw), or (out, in), for the current instruction set level. Hold it while a
// kernel reads it: another thread may exchange the slot's.
std::shared_ptr<const Pack> find_pack(PyObject* weight, const TensorView& v, Pack::Kind kind, int64_t groups = 1);
void forget_pack(PyObject* weight);
void forget_packs();
int64_t pack_slots();
// How often packs were forgotten: who keeps packs by himself compares it.
uint64_t packs_forgotten();

}  // namespace fastblocks
