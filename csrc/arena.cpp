#include "arena.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>

namespace fastblocks {

namespace {

// Where address space is limited, or cannot be had without memory behind it, it is reserved in pieces of this size.
constexpr size_t kSmallRegion = size_t(64) << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// As much address space as the machine has memory; nothing where that is limited.
size_t whole_machine() {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return 0;
  const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
  return pages > 0 && bytes > 0 ? round_up((size_t)pages * (size_t)bytes, kHugePage) : 0;
}

char* map_aligned(size_t bytes, int flags) {
  const size_t room = bytes + kHugePage;
  void* mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
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

}  // namespace

char* map_memory(size_t bytes) { return map_aligned(bytes, 0); }

bool Arena::reserve(size_t bytes) {
  const size_t least = std::max(kSmallRegion, round_up(bytes, kHugePage));
  size_t size = regions_.empty() ? std::max(least, whole_machine()) : least;
  char* memory = size > least ? map_aligned(size, MAP_NORESERVE) : nullptr;
  if (!memory) memory = map_aligned(size = least, 0);
  if (!memory) return false;
  auto region = std::make_unique<Region>();
  region->memory = memory, region->bytes = size;
  region->free[0] = size;
  region->resident.assign(size / kHugePage, false), region->trimmed = region->resident;
  regions_.push_back(std::move(region));
  return true;
}

char* Arena::cut(Region& region, std::map<size_t, size_t>::iterator hole, size_t bytes, size_t* fresh, size_t* again) {
  const size_t at = hole->first, room = hole->second;
  region.free.erase(hole);
  if (room > bytes) region.free[at + bytes] = room - bytes;
  for (size_t page = at / kHugePage; page <= (at + bytes - 1) / kHugePage; ++page) {
    if (region.resident[page]) continue;
    region.resident[page] = true;
    ++resident_pages_;
    *fresh += kHugePage;
    *again += region.trimmed[page] ? kHugePage : 0;
    region.trimmed[page] = false;
  }
  return region.memory + at;
}

char* Arena::take(size_t bytes, size_t* fresh, size_t* again) {
  *fresh = *again = 0;
  // The smallest hole that is large enough: large ones stay whole.
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (auto& region : regions_) {
      auto best = region->free.end();
      for (auto hole = region->free.begin(); hole != region->free.end(); ++hole)
        if (hole->second >= bytes && (best == region->free.end() || hole->second < best->second)) best = hole;
      if (best != region->free.end()) return cut(*region, best, bytes, fresh, again);
    }
    if (attempt == 0 && !reserve(bytes)) return nullptr;
  }
  return nullptr;
}

void Arena::give(char* block, size_t bytes) {
  for (auto& region : regions_) {
    if (block < region->memory || block >= region->memory + region->bytes) continue;
    size_t at = (size_t)(block - region->memory);
    auto next = region->free.lower_bound(at);
    if (next != region->free.end() && next->first == at + bytes) {
      bytes += next->second;
      next = region->free.erase(next);
    }
    if (next != region->free.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == at) {
        at = before->first, bytes += before->second;
        region->free.erase(before);
      }
    }
    region->free[at] = bytes;
    return;
  }
}

void Arena::trim(size_t bytes, bool asked) {
  for (size_t r = regions_.size(); r-- > 0;) {
    Region& region = *regions_[r];
    for (auto hole = region.free.rbegin(); hole != region.free.rend(); ++hole) {
      const size_t first = round_up(hole->first, kHugePage) / kHugePage;
      for (size_t page = (hole->first + hole->second) / kHugePage; page-- > first;) {
        if (resident_bytes() <= bytes) return;
        if (!region.resident[page]) continue;
        madvise(region.memory + page * kHugePage, kHugePage, MADV_DONTNEED);
        region.resident[page] = false, region.trimmed[page] = !asked;
        --resident_pages_;
      }
    }
  }
}

}  // namespace fastblocks
