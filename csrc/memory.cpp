#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "arena.h"

namespace fastblocks {

namespace {

// Small slabs are carved from chunks of this size, so that packed weights, scratch and outputs lie together in a few huge
// pages: a network's weights in pages of 4 KiB need more entries than the TLB has, and a miss in a virtual machine costs 70 ns.
// What is carved for one size serves no other, so it is the smallest slabs alone.
constexpr size_t kChunk = 8 * kHugePage;
constexpr size_t kLargestCarved = kHugePage / 8;

// Unused memory of larger slabs is kept while all slabs, used and unused, take no more than nine eighths of what was ever in
// use at once, or this; carved slabs stay with their chunk. Where that was not enough, for memory is needed again that was
// given back, the limit grows by as much, to at most twice what was in use: a program that repeats itself comes to find what it
// needs.
constexpr int64_t kLimit = int64_t(128) << 20;

struct Chunk {
  char* memory;
  size_t used;  // bytes carved so far
  int live;     // slabs in use
};

// Stands before the bytes that the user gets.
struct alignas(64) Header {
  size_t bytes;  // of the whole slab, this header included
  int size_class;
  Chunk* chunk;  // null: a block of the arena
};

// Four classes a power of two: at most a fifth of a slab is unused.
constexpr int kClassesPerDoubling = 4;
constexpr size_t kSmallest = 512;
constexpr int kClasses = 9 * kClassesPerDoubling + 1;  // up to kLargestCarved

size_t class_bytes(int c) {
  const size_t base = kSmallest << (c / kClassesPerDoubling);
  return base + base / kClassesPerDoubling * (c % kClassesPerDoubling);
}

int class_of(size_t bytes) {
  if (bytes <= kSmallest) return 0;
  const int doubling = 63 - __builtin_clzll((bytes - 1) / kSmallest);
  int c = doubling * kClassesPerDoubling;
  while (class_bytes(c) < bytes) ++c;
  return c;
}

struct Pool {
  std::mutex mutex;
  std::vector<Header*> free[kClasses];
  std::vector<Chunk*> chunks;
  Arena arena;
  size_t large_bytes = 0;   // of the arena, in use
  int64_t again_bytes = 0;  // given back too early
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

  // A slab of a small class, unused or new.
  Header* take_small(size_t bytes, bool* hit) {
    const int size_class = class_of(bytes);
    auto& unused = free[size_class];
    *hit = !unused.empty();
    Header* slab = *hit ? unused.back() : carve(size_class, class_bytes(size_class));
    if (!slab) return nullptr;
    if (*hit) {
      unused.pop_back();
      stats.cached_bytes -= slab->bytes;
    }
    ++slab->chunk->live;
    return slab;
  }

  Header* take_large(size_t bytes, bool* hit) {
    bytes = Arena::block_bytes(bytes);
    size_t fresh, again;
    char* block = arena.take(bytes, &fresh, &again);
    if (!block) return nullptr;
    *hit = fresh == 0;
    again_bytes += (int64_t)again;
    large_bytes += bytes;
    Header* slab = reinterpret_cast<Header*>(block);
    *slab = Header{bytes, 0, nullptr};
    return slab;
  }

  void give(Header* slab) {
    if (slab->chunk) {
      --slab->chunk->live;
      free[slab->size_class].push_back(slab);
      stats.cached_bytes += slab->bytes;
      return;
    }
    const size_t bytes = slab->bytes;
    large_bytes -= bytes;
    arena.give(reinterpret_cast<char*>(slab), bytes);
  }

  void raise_limit() {
    const int64_t peak = stats.peak_active_bytes, least = std::max(kLimit, peak / 8 * 9), most = std::max(least, 2 * peak);
    again_bytes = std::min(again_bytes, most - least);
    stats.limit_bytes = std::max(stats.limit_bytes, least + again_bytes);
  }

  // Unused bytes of the arena.
  int64_t spare_bytes() const { return (int64_t)(arena.resident_bytes() - large_bytes); }

  // Gives unused memory of the arena back until all is within the limit.
  void trim() {
    const int64_t over = stats.active_bytes + stats.cached_bytes + spare_bytes() - stats.limit_bytes;
    if (over > 0) arena.trim((size_t)std::max<int64_t>(0, (int64_t)arena.resident_bytes() - over));
  }

  void drop_unused() {
    arena.trim(0, true);
    for (auto& slabs : free) {
      const auto kept = std::partition(slabs.begin(), slabs.end(), [](Header* slab) { return slab->chunk->live > 0; });
      for (auto it = kept; it != slabs.end(); ++it) stats.cached_bytes -= (*it)->bytes;
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
  bytes += sizeof(Header) + 64;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  bool hit;
  Header* slab = bytes <= kLargestCarved ? p.take_small(bytes, &hit) : p.take_large(bytes, &hit);
  if (!slab) return nullptr;
  ++(hit ? p.stats.hits : p.stats.misses);
  p.stats.active_bytes += slab->bytes;
  p.stats.peak_active_bytes = std::max(p.stats.peak_active_bytes, p.stats.active_bytes);
  p.raise_limit();
  if (!hit) p.trim();
  return slab + 1;
}

void release_slab(void* memory) {
  if (!memory) return;
  Header* slab = static_cast<Header*>(memory) - 1;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.stats.active_bytes -= slab->bytes;
  p.give(slab);
  p.trim();
}

MemoryStats memory_stats() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  MemoryStats stats = p.stats;
  stats.cached_bytes += p.spare_bytes();
  return stats;
}

void empty_cache() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().drop_unused();
}

}  // namespace fastblocks
