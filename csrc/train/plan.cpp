#include "plan.h"

#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "../memory.h"
#include "../parallel.h"

namespace fastblocks {
namespace train {

namespace {
constexpr size_t kTaken = SIZE_MAX;
}

Plan::Plan() : pool_(std::make_shared<Pool>()) { stage(); }

Plan::~Plan() {
  held_.clear();
  for (const Piece& piece : pool_->pieces) release_slab(piece.slab);
}

void Plan::stage() {
  if (!stages_.empty() && stages_.back().empty()) return;
  stages_.emplace_back();
  ++pool_->stage;
}

void Plan::add_job(const TrainOp& op, void* params) {
  TrainWork work{};
  op.prepare(params, &work);
  worker_bytes_ = std::max(worker_bytes_, work.worker_bytes);
  if (work.items > 0) stages_.back().push_back({op.run, params, work.items});
}

void Plan::add_phase(const Phase& phase, size_t worker_bytes) {
  worker_bytes_ = std::max(worker_bytes_, worker_bytes);
  if (phase.items > 0) stages_.back().push_back({phase.run, phase.params, phase.items});
}

Memory Plan::take(size_t bytes) {
  bytes = std::max<size_t>(bytes, 64);
  Piece* best = nullptr;
  for (Piece& piece : pool_->pieces)
    if (piece.free_from <= pool_->stage && piece.bytes >= bytes && piece.bytes <= 2 * bytes + (64 << 10) &&
        (!best || piece.bytes < best->bytes))
      best = &piece;
  if (!best) {
    void* slab = acquire_slab(bytes);
    if (!slab) throw std::bad_alloc();
    pool_->pieces.push_back({slab, bytes, 0});
    best = &pool_->pieces.back();
  }
  best->free_from = kTaken;
  return Memory(best->slab, [pool = pool_, best](void*) { best->free_from = pool->stage + 1; });
}

float* Plan::floats(int64_t count) {
  held_.push_back(take(count * sizeof(float)));
  return train::floats(held_.back());
}

const float* Plan::zeros(int64_t count) {
  float* memory = floats(count);
  std::memset(memory, 0, count * sizeof(float));
  return memory;
}

void Plan::run_stage(const void* stage, int64_t begin, int64_t end, char* scratch) noexcept {
  for (int64_t item = begin; item < end; ++item) {
    int64_t at = item;
    for (const Job& job : *static_cast<const std::vector<Job>*>(stage)) {
      if (at < job.items) {
        job.run(job.params, at, at + 1, scratch);
        break;
      }
      at -= job.items;
    }
  }
}

bool Plan::run() {
  std::vector<Phase> phases;
  for (const auto& jobs : stages_) {
    int64_t items = 0;
    for (const Job& job : jobs) items += job.items;
    if (items > 0) phases.push_back({run_stage, &jobs, items, 0, false});
  }
  return phases.empty() || fastblocks::run(phases.data(), (int)phases.size(), worker_bytes_, worker_count());
}

}  // namespace train
}  // namespace fastblocks
