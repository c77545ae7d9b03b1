#include "launches.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

namespace pyconv::emulation {
namespace {

std::mutex mutex;
std::map<const void*, PyconvEmulationLaunches>& records() {
  static std::map<const void*, PyconvEmulationLaunches> map;
  return map;
}

bool only_record = false;

}  // namespace

bool record_only() { return only_record; }

const char* kernel_symbol(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_saddr != kernel) {
    std::fputs("pyconv emulation: a kernel without an exported symbol was launched; give it external linkage\n",
               stderr);
    std::abort();
  }
  return info.dli_sname;
}

void record_launch(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex);
  PyconvEmulationLaunches& record = records()[launch.kernel];
  if (record.kernel == nullptr) record.kernel = kernel_symbol(launch.kernel);
  ++record.count;
  record.max_threads = std::max<int64_t>(record.max_threads, launch.block.x * launch.block.y * launch.block.z);
  record.max_shared_bytes = std::max(record.max_shared_bytes, static_cast<int64_t>(launch.shared_bytes));
}

}  // namespace pyconv::emulation

int64_t pyconv_emulation_launches(PyconvEmulationLaunches* to, int64_t capacity) {
  using namespace pyconv::emulation;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t i = 0;
  for (const auto& [kernel, record] : records()) {
    if (i < capacity) to[i] = record;
    ++i;
  }
  return i;
}

void pyconv_emulation_reset_launches() {
  using namespace pyconv::emulation;
  const std::lock_guard<std::mutex> lock(mutex);
  records().clear();
}

void pyconv_emulation_record_only(bool on) { pyconv::emulation::only_record = on; }
