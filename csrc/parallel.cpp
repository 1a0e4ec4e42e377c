#include "parallel.h"

#include <sched.h>

#include <atomic>
#include <new>

#include "memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastblocks {

namespace {

std::atomic<ParallelFor> pool_for{nullptr};
std::atomic<GetNumThreads> pool_threads{nullptr};
std::atomic<bool> forked{false};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One worker's share of a phase's items: the same part of every phase, so that it finds in its own caches what it made before.
struct alignas(128) Share {
  std::atomic<int64_t> next;
  int64_t end;
  Share(int64_t worker, int64_t workers, int64_t items) : next(worker * items / workers), end((worker + 1) * items / workers) {}
};

// The counters of one phase stand alone in their cache lines.
struct alignas(128) Progress {
  std::atomic<int64_t> done{0};
  std::atomic<int64_t>* done_of = nullptr;  // each image, where the next phase asks for it
  Share* shares = nullptr;                  // of each worker
};

struct Run {
  const Phase* phases;
  int count;
  int workers;
  char* scratch;
  size_t worker_bytes;
  Progress* progress;
};

// A wait is short where all workers run; where the machine has fewer free cores than workers the others need this one.
constexpr int kSpins = 4000;

void wait_until_done(const std::atomic<int64_t>& done, int64_t items) {
  for (int spin = 0; done.load(std::memory_order_acquire) < items; ++spin) {
    if (spin < kSpins)
      relax();
    else
      sched_yield();
  }
}

// Whether items of a phase wait for no more of the phase before than for some images (params.h).
bool by_image(const Phase& before, const Phase& phase) {
  return phase.room.writes <= phase.room.held && phase.images > 1 && phase.images == before.images;
}

// One worker. It never waits for a worker that has not started, only for items that somebody has begun: it cannot deadlock
// however few callbacks the pool really runs.
void work(int64_t begin, int64_t, void* context) noexcept {
  Run& r = *static_cast<Run*>(context);
  const int64_t self = begin;
  char* scratch = r.scratch + self * r.worker_bytes;
  for (int i = 0; i < r.count; ++i) {
    const Phase& phase = r.phases[i];
    Progress& progress = r.progress[i];
    const std::atomic<int64_t>* const before = i > 0 ? r.progress[i - 1].done_of : nullptr;
    if (i > 0 && !before) wait_until_done(r.progress[i - 1].done, r.phases[i - 1].items);
    int64_t ready = -1;                                    // an image that it need not ask for again
    for (int64_t other = 0; other < r.workers; ++other) {  // its own share, and then what the others have left of theirs
      Share& share = progress.shares[(self + other) % r.workers];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      for (;;) {
        const int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= share.end) break;
        const int64_t image = phase.images > 0 ? item / (phase.items / phase.images) : 0;
        if (before && image != ready) {
          for (int64_t needed = image * phase.room.writes / phase.room.held; needed <= image; ++needed)
            wait_until_done(before[needed], r.phases[i - 1].items / phase.images);
          ready = image;
        }
        phase.run(phase.params, item, item + 1, scratch);
        if (progress.done_of) progress.done_of[image].fetch_add(1, std::memory_order_release);
        progress.done.fetch_add(1, std::memory_order_release);
      }
    }
  }
}

}  // namespace

void set_thread_pool(ParallelFor parallel_for, GetNumThreads get_num_threads) {
  pool_for = parallel_for;
  pool_threads = get_num_threads;
}

bool has_thread_pool() { return pool_for.load() && pool_threads.load() && !forked.load(); }

void forget_thread_pool_after_fork() { forked = true; }

int worker_count() {
  if (!has_thread_pool()) return 1;
  uint32_t threads = 1;
  if (pool_threads.load()(&threads) != 0 || threads < 1) return 1;
  return (int)threads;
}

bool run(const Phase* phases, int count, size_t worker_bytes, int workers) {
  int64_t most = 0;
  for (int i = 0; i < count; ++i) most = phases[i].items > most ? phases[i].items : most;
  if (most < workers) workers = most < 1 ? 1 : (int)most;
  Run r;
  r.phases = phases;
  r.count = count;
  r.workers = workers;
  r.worker_bytes = (worker_bytes + 127) / 64 * 64;
  int64_t counters = 0;
  for (int i = 0; i + 1 < count; ++i)
    if (by_image(phases[i], phases[i + 1])) counters += phases[i].images;
  const size_t progress_bytes = (count + 1) * sizeof(Progress) + (size_t)count * workers * sizeof(Share) +
                                (counters * sizeof(std::atomic<int64_t>) + 63) / 64 * 64;
  char* memory = static_cast<char*>(acquire_slab(progress_bytes + r.worker_bytes * workers));
  if (!memory) return false;
  r.progress = reinterpret_cast<Progress*>(((uintptr_t)memory + alignof(Progress) - 1) / alignof(Progress) * alignof(Progress));
  auto* share = reinterpret_cast<Share*>(r.progress + count);
  for (int i = 0; i < count; ++i) {
    new (r.progress + i) Progress;
    r.progress[i].shares = share;
    for (int64_t worker = 0; worker < workers; ++worker) new (share++) Share(worker, workers, phases[i].items);
  }
  auto* counter = reinterpret_cast<std::atomic<int64_t>*>(share);
  for (int i = 0; i + 1 < count; ++i) {
    if (!by_image(phases[i], phases[i + 1])) continue;
    r.progress[i].done_of = counter;
    for (int64_t image = 0; image < phases[i].images; ++image) new (counter++) std::atomic<int64_t>(0);
  }
  r.scratch = memory + progress_bytes;
  // A pool that refuses (a status other than 0) has left items over: this thread finishes them.
  if (workers == 1 || pool_for.load()(0, workers, 1, work, &r) != 0) work(0, 1, &r);
  release_slab(memory);
  return true;
}

}  // namespace fastblocks
