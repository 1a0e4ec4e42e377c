// run(): the one place that knows threads. It borrows torch's own pool through a C function pointer, so there is no second
// OpenMP runtime and torch.set_num_threads is honoured by itself.
#pragma once

#include <stdint.h>

#include "kernels/params.h"

namespace fastblocks {

typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context);
typedef int32_t (*GetNumThreads)(uint32_t* threads);

// Either may be null: everything then runs on the calling thread.
void set_thread_pool(ParallelFor parallel_for, GetNumThreads get_num_threads);
bool has_thread_pool();
// In a forked child the pool's threads are gone and entering it hangs: its phases run on the calling thread.
void forget_thread_pool_after_fork();

// How many workers a run() called now would have.
int worker_count();

// Runs the phases in order. Each worker has a share of a phase's items, much the same part of every phase; when it is done it
// takes what others have left. Before a worker runs an item, it waits until what it needs of the phase before is completed: all
// items, or those of some images (params.h). Returns false when there was no memory for scratch. Does not throw.
bool run(const Phase* phases, int count, size_t worker_bytes, int workers);

}  // namespace fastblocks
