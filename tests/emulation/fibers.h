// Threads of execution that are switched by hand: one stack each, all on one thread of the operating system.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace pyconv::emulation {

struct Fiber {
  void* stack = nullptr;  // lowest address; null for the fiber that the operating system's thread came with
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif
};

// The next switch to the fiber calls `entry`, which must switch away at its end and never return.
void start(Fiber& fiber, void (*entry)());

// Suspends `from`, the fiber that runs, and goes on in `to`.
void switch_fiber(Fiber& from, Fiber& to);

// The same at the end of `from`.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);

// What a fiber's entry calls first. `host` is the fiber that the operating system's thread came with; it must be the
// one that switches to the first fiber of all.
void fiber_entered(Fiber& host);

// Stacks with an inaccessible page below each: an overflow ends the process instead of writing into another stack.
class Stacks {
 public:
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  void assign(Fiber& fiber, int index) const;

 private:
  char* memory_;
  int count_;
};

}  // namespace pyconv::emulation
