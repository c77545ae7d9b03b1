// A block of emulated threads and the operations that its warps meet for.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "fibers.h"
#include "runtime.h"

namespace pyconv::emulation {

constexpr uint32_t kAllLanes = 0xffffffffu;

// What the lanes of a warp bring to an operation, by lane; `lanes` are those that take part.
struct Meeting {
  std::array<void*, kWarpSize> slots;
  uint32_t lanes;
  Site site;
};
using Complete = void (*)(const Meeting&);

struct AsynchronousCopy {
  void* to;
  int bytes;
  unsigned char data[16];
};

struct Warp;

struct Thread {
  Fiber fiber;
  uint3 index;
  int number;  // in the block; its lane is number % kWarpSize
  Warp* warp;

  // The operation that the thread waits in: the block's barrier has complete == null.
  Site site;
  uint32_t mask;
  Complete complete;
  void* slot;

  std::vector<AsynchronousCopy> copies;
  std::vector<size_t> group_ends;  // number of copies at each commit
};

// Each bit is a lane. A living lane runs, is ready, waits for lanes of its warp or waits at the block's barrier.
struct Warp {
  Thread* threads;
  uint32_t living, ready, waiting, at_barrier;
  const unsigned char* order;  // in which the lanes run that are ready
  int turn;
};

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void resize(size_t bytes);
  void fill_with_nan();
  char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* pointer, size_t count) const;

 private:
  char* memory_;  // an inaccessible page, kCapacity bytes, an inaccessible page
  char* begin_;
  size_t bytes_ = 0;
};

// One thread of the operating system runs one block at a time.
class Device {
 public:
  static Device& current();

  int run(const Launch& launch);
  const Launch& launch() const { return *launch_; }
  SharedMemory& shared() { return shared_; }
  Thread& thread() { return *running_; }

  // Sometimes lets other threads run first.
  void pause();
  void block_barrier(Site site);
  // Returns when every living lane of `mask` has called it with the same mask, `complete` and site. The last one to
  // come runs `complete`. `all` demands the whole warp.
  void meet(uint32_t mask, Site site, Complete complete, void* slot, bool all);

 private:
  static void thread_main();
  void run_block(uint3 block);
  void end_thread();
  void yield();
  Thread* next_thread();
  void settle(Warp& warp, uint32_t lanes, Thread& last);
  void release_barrier();
  [[noreturn]] void fail_deadlock();
  uint32_t random();

  const Launch* launch_ = nullptr;
  Fiber host_;
  std::unique_ptr<Stacks> stacks_;
  std::vector<Thread> threads_;
  int thread_count_ = 0, warp_count_ = 0, living_ = 0, arrived_ = 0;
  std::array<Warp, kMaxThreads / kWarpSize> warps_;
  Warp* warp_ = nullptr;  // the one whose lanes have their turn
  Thread* running_ = nullptr;
  Site barrier_site_{};
  SharedMemory shared_;
  uint64_t random_state_ = 0, launches_ = 0;
  std::vector<std::array<unsigned char, kWarpSize>> orders_;
};

// Ends the process with the message, the kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_at(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace pyconv::emulation
