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
    const Part* part = static_cast<const std::vector<Part>*>(stage)->data();
    int64_t at = item;
    for (; at >= part->items; ++part) at -= part->items;
    part->job->run(part->job->params, part->begin + at, part->begin + at + 1, scratch);
  }
}

bool Plan::run() {
  const int workers = worker_count();
  std::vector<std::vector<Part>> stages;
  std::vector<Phase> phases;
  stages.reserve(stages_.size());
  for (const auto& jobs : stages_) {
    int64_t items = 0;
    std::vector<Part> parts;
    for (int64_t worker = 0; worker < workers; ++worker)
      for (const Job& job : jobs) {
        const int64_t first = worker * job.items / workers, count = (worker + 1) * job.items / workers - first;
        if (count > 0) parts.push_back({&job, first, count});
        items += count;
      }
    if (items == 0) continue;
    stages.push_back(std::move(parts));
    phases.push_back({run_stage, &stages.back(), items, 0});
  }
  return phases.empty() || fastblocks::run(phases.data(), (int)phases.size(), worker_bytes_, workers);
}

}  // namespace train
}  // namespace fastblocks
