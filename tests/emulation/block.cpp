#include "block.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "launches.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#endif

namespace pyconv::emulation {

__thread Position position;

// ---- Messages -----------------------------------------------------------------------------------------------

namespace {

void print_where(const Launch& launch) {
  const char* symbol = kernel_symbol(launch.kernel);
  int status = 0;
  char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::fprintf(stderr, "  in %s\n  block (%u, %u, %u) of (%u, %u, %u), thread (%u, %u, %u) of (%u, %u, %u)\n",
               status == 0 ? readable : symbol, position.block.x, position.block.y, position.block.z,
               position.grid_size.x, position.grid_size.y, position.grid_size.z, position.thread.x, position.thread.y,
               position.thread.z, position.block_size.x, position.block_size.y, position.block_size.z);
  std::free(readable);
}

[[noreturn]] void fail_with(const Site* site, const char* format, va_list arguments) {
  std::fputs("pyconv emulation: ", stderr);
  if (site != nullptr) std::fprintf(stderr, "%s:%d: ", site->file, site->line);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  print_where(Device::current().launch());
  std::abort();
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fail_with(nullptr, format, arguments);
}

void fail_at(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fail_with(&site, format, arguments);
}

// ---- Shared memory ------------------------------------------------------------------------------------------

namespace {
constexpr size_t kPageBytes = 4096;
constexpr size_t kCapacity = (kMaxSharedBytes + kPageBytes - 1) / kPageBytes * kPageBytes;
constexpr size_t kSharedAlignment = 16;
}  // namespace

SharedMemory::SharedMemory() {
  void* memory =
      mmap(nullptr, kCapacity + 2 * kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fputs("pyconv emulation: no memory for the shared memory\n", stderr);
    std::abort();
  }
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, kPageBytes, PROT_NONE);
  mprotect(memory_ + kPageBytes + kCapacity, kPageBytes, PROT_NONE);
  resize(0);
}

SharedMemory::~SharedMemory() {
  ASAN_UNPOISON_MEMORY_REGION(memory_ + kPageBytes, kCapacity);
  munmap(memory_, kCapacity + 2 * kPageBytes);
}

// The end meets the inaccessible page, so that an overrun ends the process even without AddressSanitizer. A type that
// wants more alignment than 16 has a size that is a multiple of it, and so gets it.
void SharedMemory::resize(size_t bytes) {
  bytes_ = bytes;
  begin_ = memory_ + kPageBytes + kCapacity - (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  ASAN_POISON_MEMORY_REGION(memory_ + kPageBytes, kCapacity);
  ASAN_UNPOISON_MEMORY_REGION(begin_, bytes_);
}

// All bits set: NaN in each format.
void SharedMemory::fill_with_nan() { std::memset(begin_, 0xff, bytes_); }

bool SharedMemory::contains(const void* pointer, size_t count) const {
  const auto* p = static_cast<const char*>(pointer);
  return p >= begin_ && p + count <= begin_ + bytes_;
}

// ---- Launching ----------------------------------------------------------------------------------------------

Device& Device::current() {
  static thread_local Device device;
  return device;
}

uint32_t Device::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return static_cast<uint32_t>(random_state_ >> 32);
}

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9;
constexpr int kOrders = 64;
constexpr uint32_t kOtherWarpOnceIn = 8, kPauseOnceIn = 4;

bool is_valid(dim3 grid, dim3 block) {
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && block.x >= 1 && block.y >= 1 && block.z >= 1 &&
         grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && block.x <= 1024 && block.y <= 1024 &&
         block.z <= 64 && uint64_t(block.x) * block.y * block.z <= kMaxThreads;
}

uint64_t seed_of_environment() {
  const char* text = std::getenv("PYCONV_EMULATION_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

}  // namespace

int Device::run(const Launch& launch) {
  if (launch.shared_bytes > kMaxSharedBytes) return kInvalidValue;
  if (!is_valid(launch.grid, launch.block)) return kInvalidConfiguration;
  record_launch(launch);
  if (record_only()) return 0;

  launch_ = &launch;
  random_state_ = (seed_of_environment() + 1) * 0x9e3779b97f4a7c15u + ++launches_ * 0xbf58476d1ce4e5b9u;
  orders_.resize(kOrders);
  for (auto& order : orders_) {
    std::iota(order.begin(), order.end(), static_cast<unsigned char>(0));
    for (int i = kWarpSize - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  }

  const int count = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  if (count > static_cast<int>(threads_.size())) {
    threads_ = std::vector<Thread>(count);
    stacks_ = std::make_unique<Stacks>(count);
    for (int i = 0; i < count; ++i) stacks_->assign(threads_[i].fiber, i);
  }
  thread_count_ = count;
  warp_count_ = (count + kWarpSize - 1) / kWarpSize;
  shared_.resize(launch.shared_bytes);
  position.block_size = launch.block;
  position.grid_size = launch.grid;

  // Every block once, in an order that depends on the seed.
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  uint64_t block = random() % blocks, stride = random() % blocks;
  while (std::gcd(stride, blocks) != 1) ++stride;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t row = block / launch.grid.x;
    run_block({static_cast<unsigned>(block % launch.grid.x), static_cast<unsigned>(row % launch.grid.y),
               static_cast<unsigned>(row / launch.grid.y)});
    block = (block + stride) % blocks;
  }
  launch_ = nullptr;
  return kSuccess;
}

void Device::run_block(uint3 block) {
  position.block = block;
  shared_.fill_with_nan();
  races_begin_block();
  const dim3 size = launch_->block;
  for (int i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    const auto number = static_cast<unsigned>(i);
    thread.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
    thread.number = i;
    thread.warp = &warps_[i / kWarpSize];
    start(thread.fiber, thread_main);
  }
  for (int i = 0; i < warp_count_; ++i) {
    const int lanes = std::min(kWarpSize, thread_count_ - i * kWarpSize);
    const uint32_t all = lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1;
    warps_[i] = {&threads_[i * kWarpSize], all, all, 0, 0, orders_[random() % kOrders].data(), 0};
  }
  living_ = thread_count_;
  arrived_ = 0;
  warp_ = &warps_[random() % warp_count_];
  running_ = next_thread();
  position.thread = running_->index;
  switch_fiber(host_, running_->fiber);
  races_end_block();
}

// AddressSanitizer would leave marks on the stack of a function that never returns.
__attribute__((no_sanitize("address"))) void Device::thread_main() {
  Device& device = current();
  fiber_entered(device.host_);
  device.launch_->body(device.launch_->context);
  device.end_thread();
}

void Device::end_thread() {
  Thread& thread = *running_;
  Warp& warp = *thread.warp;
  if (!thread.copies.empty()) {
    fail("the thread ended with %zu asynchronous copies that it had not waited for", thread.copies.size());
  }
  thread.group_ends.clear();
  warp.living &= ~(1u << thread.number % kWarpSize);
  --living_;
  if (warp.waiting != 0) {
    // Those that waited for this lane do so no more.
    for (uint32_t left = warp.waiting; left != 0; left &= left - 1) {
      Thread& other = warp.threads[__builtin_ctz(left)];
      const uint32_t lanes = other.mask & warp.living;
      if ((warp.waiting & lanes) == lanes && (warp.waiting >> other.number % kWarpSize & 1u)) {
        settle(warp, lanes, other);
        warp.ready |= lanes;
      }
    }
  }
  if (arrived_ != 0 && arrived_ == living_) release_barrier();
  Thread* next = next_thread();
  if (next == nullptr) {
    if (living_ != 0) fail_deadlock();
    leave_fiber(thread.fiber, host_);
  }
  running_ = next;
  position.thread = next->index;
  leave_fiber(thread.fiber, next->fiber);
}

// ---- Turns --------------------------------------------------------------------------------------------------

// The lanes of a warp run in random order up to their next meeting; then mostly the same warp goes on, and sometimes
// another one. So a warp gets ahead of the others by as much as the barriers let it.
Thread* Device::next_thread() {
  for (;;) {
    while (warp_->turn < kWarpSize) {
      const int lane = warp_->order[warp_->turn++];
      if (warp_->ready >> lane & 1u) {
        warp_->ready &= ~(1u << lane);
        return &warp_->threads[lane];
      }
    }
    if (warp_->ready == 0 || random() % kOtherWarpOnceIn == 0) {
      int ready = 0;
      for (int i = 0; i < warp_count_; ++i) ready += warps_[i].ready != 0;
      if (ready == 0) return nullptr;
      int skip = static_cast<int>(random() % ready);
      Warp* warp = &warps_[0];
      while (warp->ready == 0 || skip-- > 0) ++warp;
      warp_ = warp;
    }
    warp_->order = orders_[random() % kOrders].data();
    warp_->turn = 0;
  }
}

void Device::yield() {
  Thread& thread = *running_;
  Thread* next = next_thread();
  if (next == nullptr) fail_deadlock();
  if (next == &thread) return;
  running_ = next;
  position.thread = next->index;
  switch_fiber(thread.fiber, next->fiber);
}

void Device::pause() {
  if (random() % kPauseOnceIn != 0) return;
  running_->warp->ready |= 1u << running_->number % kWarpSize;
  yield();
}

// ---- Barriers and meetings ----------------------------------------------------------------------------------

namespace {
bool is_same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }
}  // namespace

void Device::release_barrier() {
  for (int i = 0; i < warp_count_; ++i) {
    warps_[i].ready |= warps_[i].at_barrier;
    warps_[i].at_barrier = 0;
  }
  arrived_ = 0;
  races_block_barrier();
}

void Device::block_barrier(Site site) {
  Thread& thread = *running_;
  Warp& warp = *thread.warp;
  const uint32_t lane = 1u << thread.number % kWarpSize;
  if (arrived_ == 0) {
    barrier_site_ = site;
  } else if (!is_same(site, barrier_site_)) {
    fail_at(site, "divergent __syncthreads: other threads of the block wait at %s:%d", barrier_site_.file,
            barrier_site_.line);
  }
  for (uint32_t left = warp.waiting; left != 0; left &= left - 1) {
    const Thread& other = warp.threads[__builtin_ctz(left)];
    if (other.mask & lane) {
      fail_at(site, "__syncthreads, but thread %d waits for this one at %s:%d with mask 0x%08x", other.number,
              other.site.file, other.site.line, other.mask);
    }
  }
  if (++arrived_ == living_) {
    release_barrier();
    return;
  }
  thread.site = site;
  thread.complete = nullptr;
  warp.at_barrier |= lane;
  yield();
}

// Runs the operation of `lanes`, all of which have come; `last` is one of them.
void Device::settle(Warp& warp, uint32_t lanes, Thread& last) {
  Meeting meeting;
  meeting.lanes = lanes;
  meeting.site = last.site;
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const Thread& other = warp.threads[i];
    if (other.complete != last.complete || other.mask != last.mask || !is_same(other.site, last.site)) {
      fail_at(last.site, "mask 0x%08x, but thread %d, which it names, waits at %s:%d with mask 0x%08x", last.mask,
              other.number, other.site.file, other.site.line, other.mask);
    }
    meeting.slots[i] = other.slot;
  }
  warp.waiting &= ~lanes;
  last.complete(meeting);
}

void Device::meet(uint32_t mask, Site site, Complete complete, void* slot, bool all) {
  Thread& thread = *running_;
  Warp& warp = *thread.warp;
  const uint32_t lane = 1u << thread.number % kWarpSize;
  if (!(mask & lane)) fail_at(site, "mask 0x%08x does not name the calling lane %d", mask, thread.number % kWarpSize);
  if (all && warp.living != kAllLanes) {
    fail_at(site, "an operation of the whole warp, but only the lanes 0x%08x exist or have not ended", warp.living);
  }
  thread.site = site;
  thread.mask = mask;
  thread.complete = complete;
  thread.slot = slot;
  const uint32_t lanes = mask & warp.living;
  if (lanes & warp.at_barrier) {
    const Thread& other = warp.threads[__builtin_ctz(lanes & warp.at_barrier)];
    fail_at(site, "mask 0x%08x, but thread %d, which it names, waits at __syncthreads, %s:%d", mask, other.number,
            other.site.file, other.site.line);
  }
  warp.waiting |= lane;
  if ((warp.waiting & lanes) == lanes) {
    settle(warp, lanes, thread);
    warp.ready |= lanes & ~lane;
    return;
  }
  yield();
}

void Device::fail_deadlock() {
  for (int i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    const Warp& warp = *thread.warp;
    if (!(warp.waiting >> i % kWarpSize & 1u)) continue;
    uint32_t missing = thread.mask & warp.living & ~warp.waiting;
    if (missing == 0) missing = thread.mask & warp.waiting & ~(1u << i % kWarpSize);
    const Thread& other = warp.threads[__builtin_ctz(missing)];
    position.thread = thread.index;
    fail_at(thread.site, "mask 0x%08x, but thread %d, which it names, waits at %s:%d", thread.mask, other.number,
            other.site.file, other.site.line);
  }
  fail_at(barrier_site_, "__syncthreads was reached by %d of %d threads", arrived_, living_);
}

}  // namespace pyconv::emulation
