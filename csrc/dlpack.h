// The part of the DLPack interchange structures (version 0, the "dltensor" capsule) that an output needs. The layout is the
// standard's; the declarations are ours.
#pragma once

#include <stdint.h>

namespace fastblocks {

constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2;

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

}  // namespace fastblocks
