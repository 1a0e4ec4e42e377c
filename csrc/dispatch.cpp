#include "dispatch.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastblocks {

namespace baseline {
KernelTable table();
}
#if defined(FASTBLOCKS_X86)
namespace x86_64_v3 {
KernelTable table();
}
namespace x86_64_v4 {
KernelTable table();
}
#endif

namespace {

const char* const kNames[kLevels] = {"baseline", "x86_64_v3", "x86_64_v4"};

bool cpu_has(int index) {
  if (index == 0) return true;
#if defined(FASTBLOCKS_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  if (index == 1) return v3;
#if defined(FASTBLOCKS_EMULATE_V4)
  return v3;
#else
  return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#else
  return false;
#endif
}

// Intel's cores have two pipes for AVX-512. Of AMD's, Zen 4 has such of 256 bits, and Zen 5 four of 512.
Pipes cpu_pipes() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return Pipes::kSeparate;
  if (ebx == signature_INTEL_ebx) return Pipes::kShared;
  if (ebx != signature_AMD_ebx || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Pipes::kSeparate;
  const unsigned family = (eax >> 8 & 15) + (eax >> 20 & 255);
  if (family == 0x19) return Pipes::kHalves;
#endif
  return Pipes::kSeparate;
}

std::atomic<Pipes> pipes{cpu_pipes()};

struct Levels {
  KernelTable tables[kLevels];
  bool present[kLevels];
  std::atomic<int> current{0};

  Levels() {
    for (int i = 0; i < kLevels; ++i) present[i] = cpu_has(i);
    tables[0] = baseline::table();
#if defined(FASTBLOCKS_X86)
    if (present[1]) tables[1] = x86_64_v3::table();
    if (present[2]) tables[2] = x86_64_v4::table();
#endif
    for (int i = 0; i < kLevels; ++i)
      if (present[i]) current = i;
  }
};

Levels& levels() {
  static Levels all;
  return all;
}

}  // namespace

const KernelTable* level(int index) { return levels().present[index] ? &levels().tables[index] : nullptr; }

const char* level_name(int index) { return kNames[index]; }

const KernelTable& kernels() { return levels().tables[levels().current.load(std::memory_order_relaxed)]; }

int current_level() { return levels().current; }

Pipes vector_pipes() { return pipes.load(std::memory_order_relaxed); }

void use_vector_pipes(Pipes other) { pipes = other; }

bool use_level(int index) {
  if (index < 0 || index >= kLevels || !levels().present[index]) return false;
  levels().current = index;
  return true;
}

}  // namespace fastblocks
