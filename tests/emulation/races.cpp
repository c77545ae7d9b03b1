// Two accesses to a byte of shared memory race if different threads make them, one of them writes, and no barrier
// orders them: neither __syncthreads between the two nor, in one warp, a chain of __syncwarp. (Shuffles, votes, ldmatrix
// and mma order nothing in memory.) What is kept of a byte: its last write, and two reads since, of two warps where
// there are. So a race is missed only where three lanes of a warp read a byte and a __syncwarp orders some of them
// before a write.
#include "races.h"

#if defined(PYCONV_EMULATION_RACES)

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "block.h"

namespace pyconv::emulation {
namespace {

// Where an access was made: a line, or an address in the kernel's code where file is null.
struct Place {
  const char* file;
  int line;
  const void* code;
};

struct Access {
  uint32_t epoch;  // number of the interval between two barriers of a block; 0 is none
  uint32_t clock;  // of the thread
  int thread;
  Place place;
};

struct Byte {
  Access write;
  Access reads[2];
  bool arriving;  // an asynchronous copy has begun that is not waited for
};

using Clocks = std::array<uint32_t, kWarpSize>;

struct Checker {
  std::vector<Byte> bytes = std::vector<Byte>(kMaxSharedBytes);
  // By thread: the time of each lane of its warp up to which the lane's accesses come before the thread's.
  std::vector<Clocks> clocks = std::vector<Clocks>(kMaxThreads);
  uint32_t epoch = 0, first_epoch = 0;  // first of the block

  bool is_ordered(const Access& earlier, int thread) const {
    if (earlier.epoch != epoch || earlier.thread == thread) return true;
    return earlier.thread / kWarpSize == thread / kWarpSize &&
           clocks[thread][earlier.thread % kWarpSize] >= earlier.clock;
  }
};

Checker& checker() {
  static thread_local Checker instance;
  return instance;
}

// The shared memory of the block that runs; empty between blocks.
__thread uintptr_t shared_begin;
__thread size_t shared_bytes;

// ---- Messages -----------------------------------------------------------------------------------------------

std::string text_of(const Place& place) {
  if (place.file != nullptr) return std::string(place.file) + ":" + std::to_string(place.line);
  // The call of the checker comes after the access it reports, hence the byte before the return address.
  const char* code = static_cast<const char*>(place.code) - 1;
  Dl_info info;
  if (dladdr(code, &info) == 0) return "unknown code";
  char command[4096], line[4096] = "";
  std::snprintf(command, sizeof(command), "addr2line -e '%s' %tx 2>/dev/null", info.dli_fname,
                code - static_cast<const char*>(info.dli_fbase));
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof(line), pipe) == nullptr) line[0] = '\0';
    pclose(pipe);
  }
  const std::string text(line, std::string(line).find_first_of(" \n"));
  if (!text.empty() && text[0] != '?') return text;
  return info.dli_sname != nullptr ? info.dli_sname : "unknown code";
}

[[noreturn]] void fail_race(size_t offset, const Access& earlier, const char* earlier_kind, const Place& place,
                            const char* kind) {
  fail("race in shared memory at byte %zu: %s by thread %d at %s, then %s by thread %d at %s, and no barrier between",
       offset, earlier_kind, earlier.thread, text_of(earlier.place).c_str(), kind, Device::current().thread().number,
       text_of(place).c_str());
}

// ---- Accesses -----------------------------------------------------------------------------------------------

void check_arriving(const Byte& byte, size_t offset, const Place& place, const char* kind) {
  if (!byte.arriving) return;
  fail("race in shared memory at byte %zu: an asynchronous copy by thread %d at %s, then %s by thread %d at %s, and "
       "no wait between",
       offset, byte.write.thread, text_of(byte.write.place).c_str(), kind, Device::current().thread().number,
       text_of(place).c_str());
}

void read(Checker& c, size_t offset, const Access& access) {
  Byte& byte = c.bytes[offset];
  check_arriving(byte, offset, access.place, "a read");
  if (byte.write.epoch < c.first_epoch) {
    fail("read of uninitialised shared memory at byte %zu, at %s", offset, text_of(access.place).c_str());
  }
  if (!c.is_ordered(byte.write, access.thread)) fail_race(offset, byte.write, "a write", access.place, "a read");
  // The place of a reader of the same warp, unless that leaves out another lane while the second place is free.
  Access& first = byte.reads[0];
  Access& second = byte.reads[1];
  if (first.epoch != access.epoch || first.thread == access.thread) {
    first = access;
  } else if (second.epoch != access.epoch || second.thread == access.thread) {
    second = access;
  } else if (first.thread / kWarpSize == access.thread / kWarpSize ||
             first.thread / kWarpSize == second.thread / kWarpSize) {
    first = access;
  } else {
    second = access;
  }
}

void check_write(const Checker& c, size_t offset, const Access& access, const char* kind) {
  const Byte& byte = c.bytes[offset];
  check_arriving(byte, offset, access.place, kind);
  if (!c.is_ordered(byte.write, access.thread)) fail_race(offset, byte.write, "a write", access.place, kind);
  for (const Access& earlier : byte.reads) {
    if (!c.is_ordered(earlier, access.thread)) fail_race(offset, earlier, "a read", access.place, kind);
  }
}

Access access_of(const Checker& c, const Place& place) {
  const int thread = Device::current().thread().number;
  return {c.epoch, c.clocks[thread][thread % kWarpSize], thread, place};
}

template <class Each>
void for_shared_bytes(const void* pointer, size_t bytes, Each each) {
  const size_t offset = reinterpret_cast<uintptr_t>(pointer) - shared_begin;
  for (size_t i = 0; i < bytes; ++i) {
    if (offset + i < shared_bytes) each(offset + i);
  }
}

void read(const void* from, size_t bytes, const Place& place) {
  if (reinterpret_cast<uintptr_t>(from) - shared_begin >= shared_bytes) return;
  Checker& c = checker();
  const Access access = access_of(c, place);
  for_shared_bytes(from, bytes, [&](size_t offset) { read(c, offset, access); });
}

void write(const void* to, size_t bytes, const Place& place) {
  if (reinterpret_cast<uintptr_t>(to) - shared_begin >= shared_bytes) return;
  Checker& c = checker();
  const Access access = access_of(c, place);
  for_shared_bytes(to, bytes, [&](size_t offset) {
    check_write(c, offset, access, "a write");
    c.bytes[offset].write = access;
  });
}

}  // namespace

// ---- Blocks, barriers and copies ----------------------------------------------------------------------------

void races_begin_block() {
  Checker& c = checker();
  const SharedMemory& shared = Device::current().shared();
  shared_begin = reinterpret_cast<uintptr_t>(shared.begin());
  shared_bytes = shared.bytes();
  c.first_epoch = ++c.epoch;
  for (size_t thread = 0; thread < c.clocks.size(); ++thread) {
    c.clocks[thread].fill(0);
    c.clocks[thread][thread % kWarpSize] = 1;
  }
}

void races_end_block() { shared_bytes = 0; }

void races_block_barrier() { ++checker().epoch; }

void races_warp_barrier(uint32_t lanes) {
  Checker& c = checker();
  const int first = Device::current().thread().number / kWarpSize * kWarpSize;
  Clocks latest{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1u)) continue;
    for (int i = 0; i < kWarpSize; ++i) latest[i] = std::max(latest[i], c.clocks[first + lane][i]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1u)) continue;
    c.clocks[first + lane] = latest;
    ++c.clocks[first + lane][lane];
  }
}

void record_read(const void* from, size_t bytes, Site site) { read(from, bytes, {site.file, site.line, nullptr}); }

// The bytes may change at any time from here on ...
void record_copy_begin(const void* to, size_t bytes, Site site) {
  Checker& c = checker();
  const Access access = access_of(c, {site.file, site.line, nullptr});
  for_shared_bytes(to, bytes, [&](size_t offset) {
    check_write(c, offset, access, "an asynchronous copy");
    c.bytes[offset].write = access;
    c.bytes[offset].arriving = true;
  });
}

// ... to here.
void record_copy_end(const void* to, size_t bytes, Site site) {
  Checker& c = checker();
  const Access access = access_of(c, {site.file, site.line, nullptr});
  for_shared_bytes(to, bytes, [&](size_t offset) {
    c.bytes[offset].write = access;
    c.bytes[offset].arriving = false;
  });
}

}  // namespace pyconv::emulation

// ---- What the compiler calls --------------------------------------------------------------------------------

#define PYCONV_PLACE \
  { nullptr, 0, __builtin_return_address(0) }
#define PYCONV_ACCESS(bytes)                                                                                          \
  void __tsan_read##bytes(void* from) { pyconv::emulation::read(from, bytes, PYCONV_PLACE); }                         \
  void __tsan_write##bytes(void* to) { pyconv::emulation::write(to, bytes, PYCONV_PLACE); }                           \
  void __tsan_unaligned_read##bytes(void* from) { pyconv::emulation::read(from, bytes, PYCONV_PLACE); }               \
  void __tsan_unaligned_write##bytes(void* to) { pyconv::emulation::write(to, bytes, PYCONV_PLACE); }

extern "C" {
PYCONV_ACCESS(1)
PYCONV_ACCESS(2)
PYCONV_ACCESS(4)
PYCONV_ACCESS(8)
PYCONV_ACCESS(16)
void __tsan_read_range(void* from, size_t bytes) { pyconv::emulation::read(from, bytes, PYCONV_PLACE); }
void __tsan_write_range(void* to, size_t bytes) { pyconv::emulation::write(to, bytes, PYCONV_PLACE); }
void __tsan_init() {}
void __tsan_func_entry(void* /*caller*/) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void** /*object*/, void* /*table*/) {}
void __tsan_vptr_read(void** /*object*/) {}
// Of the guard of a static variable in a function.
char __tsan_atomic8_load(const volatile char* from, int /*order*/) { return __atomic_load_n(from, __ATOMIC_SEQ_CST); }
}

#endif  // PYCONV_EMULATION_RACES
