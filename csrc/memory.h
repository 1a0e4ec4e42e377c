// Recycled memory: scratch and outputs come from a bounded pool of slabs, because the C allocator gives large blocks back to
// the kernel at every free and each page is then faulted in anew.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastblocks {

// At least `bytes` bytes at a 64-byte boundary, with room for one vector beyond them; null when there is no memory. Any thread.
void* acquire_slab(size_t bytes);
void release_slab(void* slab);

struct MemoryStats {
  int64_t active_bytes, peak_active_bytes, cached_bytes, hits, misses, limit_bytes;
};

MemoryStats memory_stats();
// Gives back to the system what nobody uses (of the small slabs, the chunks of which none is in use).
void empty_cache();

}  // namespace fastblocks
