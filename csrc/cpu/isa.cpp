#include "isa.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace pyconv::cpu {

const KernelTable& kernel_table_scalar();
#if defined(__x86_64__)
const KernelTable& kernel_table_avx2();
const KernelTable& kernel_table_avx512();
const KernelTable& kernel_table_avx512_bf16();
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
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Slowest first: the default is the last one that the CPU supports.
const IsaEntry kIsas[] = {
    {"scalar", kernel_table_scalar, always},
#if defined(__x86_64__)
    {"avx2", kernel_table_avx2, has_avx2},
    {"avx512", kernel_table_avx512, has_avx512},
    {"avx512_bf16", kernel_table_avx512_bf16, has_avx512_bf16},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

const KernelTable& best_supported() {
  int best = 0;
  for (int i = 1; i < kIsaCount; ++i) {
    if (kIsas[i].supported()) best = i;
  }
  return kIsas[best].table();
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{&best_supported()};
  return table;
}

std::atomic<bool> only_exact_kernels{false};

// Tables of load_kernel_table(), which are never unloaded.
struct LoadedTables {
  std::mutex mutex;
  std::vector<const KernelTable*> tables;

  const KernelTable* find(const char* name) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const KernelTable* table : tables) {
      if (std::strcmp(table->isa, name) == 0) return table;
    }
    return nullptr;
  }
};

LoadedTables& loaded() {
  static LoadedTables instance;
  return instance;
}

}  // namespace

const KernelTable& kernel_table() { return *current().load(std::memory_order_relaxed); }
const char* isa() { return kernel_table().isa; }
int compiled_isa_count() { return kIsaCount; }
const char* compiled_isa(int index) { return kIsas[index].name; }
bool cpu_supports(int index) { return kIsas[index].supported(); }

SetIsaResult set_isa(const char* name) {
  for (const IsaEntry& entry : kIsas) {
    if (std::strcmp(entry.name, name) == 0) {
      if (!entry.supported()) return SetIsaResult::unsupported;
      current().store(&entry.table(), std::memory_order_relaxed);
      return SetIsaResult::ok;
    }
  }
  if (const KernelTable* table = loaded().find(name)) {
    current().store(table, std::memory_order_relaxed);
    return SetIsaResult::ok;
  }
  return SetIsaResult::unknown;
}

bool exact() { return only_exact_kernels.load(std::memory_order_relaxed); }
void set_exact(bool only_exact) { only_exact_kernels.store(only_exact, std::memory_order_relaxed); }

const char* load_kernel_table(const std::string& path) {
  // Local, so that the symbols of several libraries do not meet.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error("cannot load the kernel table of '" + path + "': " + dlerror());
  }
  const auto function = reinterpret_cast<KernelTableFunction>(dlsym(library, kKernelTableSymbol));
  if (function == nullptr) {
    throw std::runtime_error("cannot load the kernel table of '" + path + "': it exports no symbol '" +
                             kKernelTableSymbol + "'");
  }
  const KernelTable* table = function();
  for (const IsaEntry& entry : kIsas) {
    if (std::strcmp(entry.name, table->isa) == 0) {
      throw std::runtime_error("cannot load the kernel table of '" + path + "': its instruction set '" +
                               table->isa + "' is compiled in");
    }
  }
  const std::lock_guard<std::mutex> lock(loaded().mutex);
  for (const KernelTable*& other : loaded().tables) {
    if (std::strcmp(other->isa, table->isa) == 0) {
      other = table;
      return table->isa;
    }
  }
  loaded().tables.push_back(table);
  return table->isa;
}

}  // namespace pyconv::cpu
