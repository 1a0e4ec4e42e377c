#include "memory.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <mutex>
#include <vector>

namespace fastblocks {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t(2) << 20;

// Stands before the bytes that the user gets.
struct alignas(kAlignment) Header {
  size_t bytes;  // of the whole slab, this header included
  int size_class;
};

// Four classes a power of two: at most a fifth of a slab is unused.
constexpr int kClassesPerDoubling = 4;
constexpr size_t kSmallest = 4096;
constexpr int kClasses = 40 * kClassesPerDoubling;

size_t class_bytes(int c) {
  const size_t base = kSmallest << (c / kClassesPerDoubling);
  return base + base / kClassesPerDoubling * (c % kClassesPerDoubling);
}

int class_of(size_t bytes) {
  if (bytes <= kSmallest) return 0;
  const int doubling = 63 - __builtin_clzll((bytes - 1) / kSmallest);
  int c = doubling * kClassesPerDoubling;
  while (c < kClasses && class_bytes(c) < bytes) ++c;
  return c;
}

struct Pool {
  std::mutex mutex;
  std::vector<Header*> free[kClasses];
  MemoryStats stats{};

  Pool() {
    stats.limit_bytes = int64_t(512) << 20;
    // A child forked while another thread holds the lock must find it open.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
  }

  // Never destroyed: tensors that outlive the interpreter's shutdown still give their slabs back.
  static Pool& pool() {
    static Pool* p = new Pool;
    return *p;
  }
};

Pool& pool() { return Pool::pool(); }

void give_back(Header* slab) { ::free(slab); }

}  // namespace

void* acquire_slab(size_t bytes) {
  if (bytes > (size_t(1) << 46)) return nullptr;
  const int c = class_of(bytes + sizeof(Header) + kAlignment);
  Pool& p = pool();
  Header* slab = nullptr;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (!p.free[c].empty()) {
      slab = p.free[c].back();
      p.free[c].pop_back();
      p.stats.cached_bytes -= slab->bytes;
      ++p.stats.hits;
    } else {
      ++p.stats.misses;
    }
  }
  if (!slab) {
    const size_t size = class_bytes(c);
    void* memory = nullptr;
    if (posix_memalign(&memory, size >= kHugePage ? kHugePage : kAlignment, size) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (size >= kHugePage) madvise(memory, size & ~(kHugePage - 1), MADV_HUGEPAGE);
#endif
    slab = static_cast<Header*>(memory);
    slab->bytes = size;
    slab->size_class = c;
  }
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.stats.active_bytes += slab->bytes;
  if (p.stats.active_bytes > p.stats.peak_active_bytes) p.stats.peak_active_bytes = p.stats.active_bytes;
  return slab + 1;
}

void release_slab(void* memory) {
  if (!memory) return;
  Header* slab = static_cast<Header*>(memory) - 1;
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.stats.active_bytes -= slab->bytes;
    if (p.stats.cached_bytes + (int64_t)slab->bytes <= p.stats.limit_bytes) {
      p.free[slab->size_class].push_back(slab);
      p.stats.cached_bytes += slab->bytes;
      return;
    }
  }
  give_back(slab);
}

MemoryStats memory_stats() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().stats;
}

void reset_peak_memory_stats() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().stats.peak_active_bytes = pool().stats.active_bytes;
}

void empty_cache() {
  Pool& p = pool();
  std::vector<Header*> unused;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (auto& slabs : p.free) {
      unused.insert(unused.end(), slabs.begin(), slabs.end());
      slabs.clear();
    }
    p.stats.cached_bytes = 0;
  }
  for (Header* slab : unused) give_back(slab);
}

void set_memory_limit(int64_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().stats.limit_bytes = bytes;
    if (pool().stats.cached_bytes <= bytes) return;
  }
  empty_cache();
}

}  // namespace fastblocks
