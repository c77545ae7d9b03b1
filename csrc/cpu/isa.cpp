#include "isa.h"

#include <atomic>
#include <cstring>

namespace pyconv::cpu {

const KernelTable& kernel_table_scalar();
#if defined(__x86_64__)
const KernelTable& kernel_table_avx2();
const KernelTable& kernel_table_avx512();
#endif

namespace {

struct IsaEntry {
  const char* name;
  const KernelTable& (*table)();
  bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
// The builtins also ask the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// Slowest first: the default is the last one that the CPU supports.
const IsaEntry kIsas[] = {
    {"scalar", kernel_table_scalar, always},
#if defined(__x86_64__)
    {"avx2", kernel_table_avx2, has_avx2},
    {"avx512", kernel_table_avx512, has_avx512},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

int best_supported() {
  int best = 0;
  for (int i = 1; i < kIsaCount; ++i) {
    if (kIsas[i].supported()) best = i;
  }
  return best;
}

std::atomic<int>& current() {
  static std::atomic<int> index{best_supported()};
  return index;
}

}  // namespace

const KernelTable& kernel_table() { return kIsas[current().load(std::memory_order_relaxed)].table(); }
const char* isa() { return kIsas[current().load(std::memory_order_relaxed)].name; }
int compiled_isa_count() { return kIsaCount; }
const char* compiled_isa(int index) { return kIsas[index].name; }
bool cpu_supports(int index) { return kIsas[index].supported(); }

SetIsaResult set_isa(const char* name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(kIsas[i].name, name) == 0) {
      if (!kIsas[i].supported()) return SetIsaResult::unsupported;
      current().store(i, std::memory_order_relaxed);
      return SetIsaResult::ok;
    }
  }
  return SetIsaResult::unknown;
}

}  // namespace pyconv::cpu
