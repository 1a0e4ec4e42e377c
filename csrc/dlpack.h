// The part of the DLPack interchange structures (version 1: "dltensor_versioned" capsules, and the exchange API that a tensor
// type offers to C) that inputs and outputs need. The layout is the standard's; the declarations are ours.
#pragma once

#include <stdint.h>

namespace fastblocks {

constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2;
constexpr uint32_t kDLPackMajor = 1;

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

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

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};

// Of the functions, those that are used here have their types; all return 0, or set a Python error.
struct DLPackExchangeApi {
  DLPackVersion version;
  void* previous;
  void* allocator;
  void* managed_from_object;
  int (*managed_to_object)(DLManagedTensorVersioned* tensor, void** object);
  int (*view_of_object)(void* object, DLTensor* view);
  void* current_stream;
};

}  // namespace fastblocks
