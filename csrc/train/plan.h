// What one call runs: stages of jobs. The jobs of a stage run side by side, stages one after the other.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "../kernels/train/params.h"

namespace fastblocks {
namespace train {

typedef std::shared_ptr<void> Memory;

class Plan {
 public:
  Plan();
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Jobs added from here on wait for those before.
  void stage();
  // A copy of the parameters, cut into items; more may be filled in until run().
  template <class Params>
  Params* add(const TrainOp& op, const Params& params) {
    auto owned = std::make_shared<Params>(params);
    add_job(op, owned.get());
    owned_.push_back(owned);
    return owned.get();
  }
  // A job that is no training kernel.
  void add_phase(const Phase& phase, size_t worker_bytes);
  template <class T>
  T* keep(std::vector<T> values) {
    auto owned = std::make_shared<std::vector<T>>(std::move(values));
    owned_.push_back(owned);
    return owned->data();
  }

  // Memory until the last copy of the result is gone: then the stages that follow the one being planned may have it.
  Memory take(size_t bytes);
  // Memory for the whole run.
  float* floats(int64_t count);
  // `count` zeros, for the whole run.
  const float* zeros(int64_t count);

  // False where there was no memory for scratch.
  bool run();

 private:
  struct Job {
    void (*run)(const void* params, int64_t begin, int64_t end, char* scratch) noexcept;
    const void* params;
    int64_t items;
  };
  struct Piece {
    void* slab;
    size_t bytes;
    size_t free_from;  // the first stage that may have it
  };
  struct Pool {
    std::deque<Piece> pieces;  // whose elements stay where they are
    size_t stage = 0;
  };
  void add_job(const TrainOp& op, void* params);
  // Some items of a job, one worker's share. Those of a stage follow each other.
  struct Part {
    const Job* job;
    int64_t begin, items;
  };
  static void run_stage(const void* stage, int64_t begin, int64_t end, char* scratch) noexcept;

  std::vector<std::shared_ptr<void>> owned_;
  std::deque<std::vector<Job>> stages_;
  std::shared_ptr<Pool> pool_;
  std::vector<Memory> held_;
  size_t worker_bytes_ = 0;
};

inline float* floats(const Memory& memory) { return static_cast<float*>(memory.get()); }
inline double* doubles(const Memory& memory) { return static_cast<double*>(memory.get()); }

}  // namespace train
}  // namespace fastblocks
