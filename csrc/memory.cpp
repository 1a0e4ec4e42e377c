#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace fastblocks {

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
// Small slabs are carved from chunks of this size, so that packed weights, scratch and outputs lie together in a few huge
// pages: a network's weights in pages of 4 KiB need more entries than the TLB has, and a miss in a virtual machine costs 70 ns.
constexpr size_t kChunk = 8 * kHugePage;
constexpr size_t kLargestCarved = kHugePage;

// Slabs of their own mapping are kept while all slabs, used and unused, take no more than five quarters of what was ever in
// use at once (a program that repeats itself then finds a slab of each size), or this; carved ones stay with their chunk.
constexpr int64_t kLimit = int64_t(128) << 20;

// A slab of one of these many larger classes will do, where there is none of the right one.
constexpr int kLargerClasses = 3;

struct Chunk {
  char* memory;
  size_t used;  // bytes carved so far
  int live;     // slabs in use
};

// Stands before the bytes that the user gets.
struct alignas(64) Header {
  size_t bytes;  // of the whole slab, this header included
  int size_class;
  Chunk* chunk;  // null: a mapping of its own
};

// Four classes a power of two: at most a fifth of a slab is unused.
constexpr int kClassesPerDoubling = 4;
constexpr size_t kSmallest = 512;
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

// Whole huge pages at a huge page's boundary, or null.
char* map_memory(size_t bytes) {
  const size_t room = bytes + kHugePage;
  void* mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  const size_t skip = (kHugePage - (uintptr_t)begin % kHugePage) % kHugePage;
  if (skip) munmap(begin, skip);
  begin += skip;
  munmap(begin + bytes, room - skip - bytes);
#if defined(MADV_HUGEPAGE)
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
  return begin;
}

struct Pool {
  std::mutex mutex;
  std::vector<Header*> free[kClasses];
  std::vector<Chunk*> chunks;
  MemoryStats stats{};

  Pool() {
    stats.limit_bytes = kLimit;
    // A child forked while another thread holds the lock must find it open.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
  }

  // Never destroyed: tensors that outlive the interpreter's shutdown still give their slabs back.
  static Pool& pool() {
    static Pool* p = new Pool;
    return *p;
  }

  Header* carve(int size_class, size_t bytes) {
    if (chunks.empty() || chunks.back()->used + bytes > kChunk) {
      char* memory = map_memory(kChunk);
      if (!memory) return nullptr;
      chunks.push_back(new Chunk{memory, 0, 0});
    }
    Chunk* chunk = chunks.back();
    Header* slab = reinterpret_cast<Header*>(chunk->memory + chunk->used);
    chunk->used += bytes;
    *slab = Header{bytes, size_class, chunk};
    return slab;
  }

  Header* create(int size_class) {
    size_t bytes = class_bytes(size_class);
    if (bytes <= kLargestCarved) return carve(size_class, bytes);
    char* memory = map_memory((bytes + kHugePage - 1) / kHugePage * kHugePage);
    if (!memory) return nullptr;
    Header* slab = reinterpret_cast<Header*>(memory);
    *slab = Header{bytes, size_class, nullptr};
    return slab;
  }

  static void destroy(Header* slab) { munmap(static_cast<void*>(slab), (slab->bytes + kHugePage - 1) / kHugePage * kHugePage); }

  // The unused slab to hand out for a class, or null.
  Header* reuse(int size_class) {
    for (int c = size_class; c <= size_class + kLargerClasses && c < kClasses; ++c)
      if (!free[c].empty()) {
        Header* slab = free[c].back();
        free[c].pop_back();
        stats.cached_bytes -= slab->bytes;
        return slab;
      }
    return nullptr;
  }

  // Gives the largest unused mappings back until the sum is within the limit.
  void trim() {
    for (int c = kClasses; c-- > 0 && stats.active_bytes + stats.cached_bytes > stats.limit_bytes;)
      while (!free[c].empty() && !free[c].back()->chunk && stats.active_bytes + stats.cached_bytes > stats.limit_bytes) {
        Header* slab = free[c].back();
        free[c].pop_back();
        stats.cached_bytes -= slab->bytes;
        destroy(slab);
      }
  }

  void drop_unused() {
    for (auto& slabs : free) {
      const auto unused = [](Header* slab) { return !slab->chunk || slab->chunk->live == 0; };
      for (Header* slab : slabs)
        if (unused(slab)) stats.cached_bytes -= slab->bytes;
      const auto kept = std::partition(slabs.begin(), slabs.end(), [&](Header* slab) { return !unused(slab); });
      for (auto it = kept; it != slabs.end(); ++it)
        if (!(*it)->chunk) destroy(*it);
      slabs.erase(kept, slabs.end());
    }
    const auto kept = std::partition(chunks.begin(), chunks.end(), [](Chunk* chunk) { return chunk->live > 0; });
    for (auto it = kept; it != chunks.end(); ++it) {
      munmap((*it)->memory, kChunk);
      delete *it;
    }
    chunks.erase(kept, chunks.end());
  }
};

Pool& pool() { return Pool::pool(); }

}  // namespace

void* acquire_slab(size_t bytes) {
  if (bytes > (size_t(1) << 46)) return nullptr;
  const int c = class_of(bytes + sizeof(Header) + 64);
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  Header* slab = p.reuse(c);
  const bool hit = slab != nullptr;
  if (!hit) slab = p.create(c);
  if (!slab) return nullptr;
  ++(hit ? p.stats.hits : p.stats.misses);
  if (slab->chunk) ++slab->chunk->live;
  p.stats.active_bytes += slab->bytes;
  p.stats.peak_active_bytes = std::max(p.stats.peak_active_bytes, p.stats.active_bytes);
  p.stats.limit_bytes = std::max(kLimit, p.stats.peak_active_bytes / 4 * 5);
  if (!hit) p.trim();
  return slab + 1;
}

void release_slab(void* memory) {
  if (!memory) return;
  Header* slab = static_cast<Header*>(memory) - 1;
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.stats.active_bytes -= slab->bytes;
    if (slab->chunk) --slab->chunk->live;
    if (slab->chunk || p.stats.active_bytes + p.stats.cached_bytes + (int64_t)slab->bytes <= p.stats.limit_bytes) {
      p.free[slab->size_class].push_back(slab);
      p.stats.cached_bytes += slab->bytes;
      return;
    }
  }
  Pool::destroy(slab);
}

MemoryStats memory_stats() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().stats;
}

void empty_cache() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().drop_unused();
}

}  // namespace fastblocks
