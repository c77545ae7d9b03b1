// Parallel loops over the threads that a call may use, and steps of tasks whose workers come to the same memory again.
// Everything is in an anonymous namespace, as in simd.h.
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

// Tells the processor that this thread only waits.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// body(begin, end) over disjoint ranges of [0, count); serial where one thread is asked for.
template <class Body>
inline void parallel(const Threads& threads, int64_t count, const Body& body) {
  if (count <= 0) return;
  if (threads.num_threads <= 1 || count == 1) {
    body(int64_t(0), count);
    return;
  }
  threads.parallel_for(
      0, count, 1,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// Steps of parallel_steps: body(task, worker) for the tasks [0, count), each once; and a point that nobody passes before all
// tasks so far are done.
template <class Body>
struct Tasks {
  int64_t count;
  const Body& body;
};
template <class Body>
Tasks(int64_t, const Body&) -> Tasks<Body>;
struct Barrier {};

// What the workers of parallel_steps share. The tasks of a step are divided into segments, of which each worker takes
// its own before it helps the others: the same worker comes to the same images in every step, forward or backward, call
// after call, and finds in its cache what it left there. (A cache line that another core wrote last costs 100 to 250 ns;
// with tasks handed out as they come, two cores were slower than one on a small layer.) A segment's counters are alone
// on their cache line and the neighbour that is fetched with it.
class Progress {
 public:
  explicit Progress(int64_t workers) : workers_(workers), segments_(workers < kMaxSegments ? workers : kMaxSegments) {}

  // A worker's way through the steps.
  struct Position {
    int64_t worker;
    int step = 0;
    int64_t before = 0;  // tasks of the steps so far ...
    int64_t done = 0;    // ... and those of them this worker did and has not reported
  };

  template <class Body>
  void pass(const Tasks<Body>& tasks, Position& at) {
    const int64_t own = at.worker * segments_ / workers_;
    for (int64_t i = 0; i < segments_ && tasks.count > 0; ++i) {
      const int64_t segment = own + i < segments_ ? own + i : own + i - segments_;
      const int64_t begin = tasks.count * segment / segments_, end = tasks.count * (segment + 1) / segments_;
      int64_t& next = next_[segment].of_step[at.step];
      // Only read where nothing is left to take: a write would call the line away from its worker.
      while (begin + __atomic_load_n(&next, __ATOMIC_RELAXED) < end) {
        const int64_t task = begin + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (task >= end) break;
        tasks.body(task, at.worker);
        ++at.done;
      }
    }
    ++at.step;
    at.before += tasks.count;
  }

  void pass(Barrier, Position& at) {
    if (at.done > 0) __atomic_fetch_add(&done_, at.done, __ATOMIC_RELEASE);
    at.done = 0;
    while (__atomic_load_n(&done_, __ATOMIC_ACQUIRE) < at.before) pause();
  }

  static constexpr int kMaxSteps = 8;

 private:
  static constexpr int64_t kMaxSegments = 8;

  struct alignas(128) Counters {
    int64_t of_step[kMaxSteps] = {};
  };

  int64_t workers_, segments_;
  Counters next_[kMaxSegments];
  alignas(128) int64_t done_ = 0;
};

// Steps in one region of at most `workers` ranges: opening another region would cost as much as a small layer's weights.
// Nobody waits but for tasks that another thread is running, also where one thread runs all ranges.
template <class... Steps>
inline void parallel_steps(const Threads& threads, int64_t workers, const Steps&... steps) {
  static_assert(sizeof...(Steps) <= Progress::kMaxSteps);
  Progress progress(workers);
  parallel(threads, workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Progress::Position at{worker};
      (progress.pass(steps, at), ...);
    }
  });
}

// What all tasks of a call read and none change, such as packed weights. While small, each worker makes a copy before
// its first task: reading what another core wrote a moment ago, and getting the lines back for the next call, takes
// longer. Large ones are made by all workers together.
class Copies {
 public:
  Copies() = default;
  Copies(int64_t bytes, int64_t workers)
      : own_(bytes <= kOwnBytes && bytes <= kAllBytes / workers), count_(own_ ? workers : 1) {}

  bool own() const { return own_; }
  int64_t count() const { return count_; }
  int64_t of(int64_t worker) const { return own_ ? worker : 0; }

  // Marks which workers have made theirs: flag_bytes() of them, cleared before the first task.
  int64_t flag_bytes() const { return own_ ? count_ * kFlagStride : 0; }
  void clear(uint8_t* flags) const {
    for (int64_t worker = 0; worker < count_ && own_; ++worker) flags[worker * kFlagStride] = 0;
  }
  template <class Make>
  void make_once(uint8_t* flags, int64_t worker, const Make& make) const {
    if (!own_ || flags[worker * kFlagStride] != 0) return;
    make();
    flags[worker * kFlagStride] = 1;
  }

 private:
  static constexpr int64_t kOwnBytes = 512 * 1024;      // about half of a core's cache
  static constexpr int64_t kAllBytes = 8 * 1024 * 1024;  // of all copies: a quarter of what is kept for the next call
  static constexpr int64_t kFlagStride = 64;

  bool own_ = false;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace pyconv::cpu
