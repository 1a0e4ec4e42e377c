// The only PYBIND11_MODULE. The ops themselves are in ops.cpp, on Python's own C interface: a call of a small op would cost
// twice as much through a binding library.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "ops.h"
#include "packs.h"
#include "parallel.h"
#include "recall.h"
#include "site.h"
#include "tensors.h"

namespace py = pybind11;

namespace fastblocks {
namespace {

py::dict stats() {
  const MemoryStats s = memory_stats();
  py::dict d;
  d["active_bytes"] = s.active_bytes;
  d["peak_active_bytes"] = s.peak_active_bytes;
  d["cached_bytes"] = s.cached_bytes;
  d["limit_bytes"] = s.limit_bytes;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  return d;
}

// Runs multiply-adds and nothing else on the pool's threads; returns how many floating point operations that were.
double spin_multiply_adds(int64_t steps) {
  const int workers = worker_count();
  std::vector<float> results(workers);
  PeakParams params{steps, {0.999f, 0.001f}, results.data(), 0};
  Work work;
  kernels().peak.prepare(&params, workers, &work);
  return run(work.phases, work.count, work.worker_bytes, workers) ? params.flops : 0;
}

}  // namespace
}  // namespace fastblocks

PYBIND11_MODULE(_C, m) {
  using namespace fastblocks;
  if (PyModule_AddFunctions(m.ptr(), op_methods()) != 0) throw py::error_already_set();
  m.def("set_tensor_functions", [](py::handle exchange_api, py::handle from_dlpack, py::handle channels_last) {
    try {
      set_tensor_functions(exchange_api.ptr(), from_dlpack.ptr(), channels_last.ptr());
    } catch (const PythonError&) {
      throw py::error_already_set();
    }
  });
  m.def("make_site", [](py::handle description) {
    PyObject* site = make_site(description.ptr());
    if (!site) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(site);
  });
  m.def("make_chain", [](py::handle description) {
    PyObject* chain = make_chain(description.ptr());
    if (!chain) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(chain);
  });
  m.def("make_check", [](py::handle description) {
    PyObject* check = make_check(description.ptr());
    if (!check) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(check);
  });
  m.def("make_recall", [](py::handle description) {
    PyObject* functions = make_recall(description.ptr());
    if (!functions) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(functions);
  });
  m.def("forget_pack", [](py::handle weight) { forget_pack(weight.ptr()); });
  m.def("forget_packs", &forget_packs);
  m.def("pack_slots", &pack_slots);
  m.def("set_thread_pool", [](uintptr_t parallel_for, uintptr_t get_num_threads) {
    set_thread_pool(reinterpret_cast<ParallelFor>(parallel_for), reinterpret_cast<GetNumThreads>(get_num_threads));
  });
  m.def("has_thread_pool", &has_thread_pool);
  m.def("forget_thread_pool_after_fork", &forget_thread_pool_after_fork);
  m.def("worker_count", &worker_count);
  m.def("level_names", [] {
    py::list names;
    for (int i = 0; i < kLevels; ++i)
      if (level(i)) names.append(level_name(i));
    return names;
  });
  m.def("current_level", &current_level);
  m.def("use_level", [](const std::string& name) {
    for (int i = 0; i < kLevels; ++i)
      if (name == level_name(i)) return use_level(i);
    return false;
  });
  py::enum_<Pipes>(m, "Pipes")
      .value("SHARED", Pipes::kShared)
      .value("SEPARATE", Pipes::kSeparate)
      .value("HALVES", Pipes::kHalves);
  m.def("vector_pipes", &vector_pipes);
  m.def("use_vector_pipes", &use_vector_pipes);
  m.def("spin_multiply_adds", &spin_multiply_adds, py::call_guard<py::gil_scoped_release>());
  m.def("memory_stats", &stats);
  m.def("empty_cache", &empty_cache, py::call_guard<py::gil_scoped_release>());
}
