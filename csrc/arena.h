// Large blocks of recycled memory. They lie side by side in address space that is reserved once, and join with their free
// neighbours when they are given back: what a layer leaves, the next one may cut otherwise.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <memory>
#include <vector>

namespace fastblocks {

constexpr size_t kHugePage = size_t(2) << 20;

// `bytes` bytes, of whole huge pages and at a huge page's boundary; null where there are none.
char* map_memory(size_t bytes);

class Arena {
 public:
  // The size of the block that is taken for so many bytes.
  static size_t block_bytes(size_t bytes) { return (bytes + kGrain - 1) / kGrain * kGrain; }
  // A block of this size, or null. `fresh`: bytes of it that must be had from the system, `again` those of them that trim()
  // gave back unasked.
  char* take(size_t bytes, size_t* fresh, size_t* again);
  void give(char* block, size_t bytes);
  // Bytes that the system has given and that were not given back, in use or not.
  size_t resident_bytes() const { return resident_pages_ * kHugePage; }
  // Gives unused pages back, the highest first, until no more than this many bytes are resident or all are in use. `asked`: the
  // user wants that, so that needing them again is no mistake.
  void trim(size_t bytes, bool asked = false);

 private:
  static constexpr size_t kGrain = 64 << 10;

  struct Region {
    char* memory;
    size_t bytes;
    std::map<size_t, size_t> free;  // from offset to bytes
    // A huge page: whether the system has given it, and whether it was given back unasked.
    std::vector<bool> resident, trimmed;
  };
  bool reserve(size_t bytes);
  char* cut(Region& region, std::map<size_t, size_t>::iterator hole, size_t bytes, size_t* fresh, size_t* again);

  std::vector<std::unique_ptr<Region>> regions_;
  size_t resident_pages_ = 0;
};

}  // namespace fastblocks
