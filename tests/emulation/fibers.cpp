#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// pyconv_emulation_switch(void** from, void* to): saves the registers that a call preserves and its stack pointer to
// *from, and goes on where `to` was saved. An indirect jump, since a return to another place than the caller's is
// always mispredicted.
asm(R"(
.text
.hidden pyconv_emulation_switch
.globl pyconv_emulation_switch
.type pyconv_emulation_switch, @function
pyconv_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size pyconv_emulation_switch, .-pyconv_emulation_switch
)");
extern "C" void pyconv_emulation_switch(void** from, void* to);
#endif

namespace pyconv::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPageBytes = 4096;
// Frames of neighbours at the same distance from a power of two would share a few sets of the cache.
constexpr size_t kStaggerBytes = 1088, kStaggers = 31;  // a multiple of 16, as the ABI aligns stacks

void switch_context(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
  pyconv_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

}  // namespace

void start(Fiber& fiber, void (*entry)()) {
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(fiber.stack) + fiber.stack_bytes);
  *--top = 0;  // where a caller's return address would be: the entry finds the stack aligned as after a call
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  switch_context(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  switch_context(from, to);
#endif
}

void leave_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
#endif
  switch_context(from, to);
  std::fputs("pyconv emulation: a fiber that had ended was resumed\n", stderr);
  std::abort();
}

void fiber_entered([[maybe_unused]] Fiber& host) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &stack_bytes);
  if (host.stack == nullptr) {
    host.stack = const_cast<void*>(stack);
    host.stack_bytes = stack_bytes;
  }
#endif
}

Stacks::Stacks(int count) : count_(count) {
  const size_t bytes = count * (kStackBytes + kPageBytes);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "pyconv emulation: no memory for %d stacks of %zu bytes\n", count, kStackBytes);
    std::abort();
  }
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(memory_ + i * (kStackBytes + kPageBytes), kPageBytes, PROT_NONE);
}

Stacks::~Stacks() { munmap(memory_, count_ * (kStackBytes + kPageBytes)); }

void Stacks::assign(Fiber& fiber, int index) const {
  fiber.stack = memory_ + index * (kStackBytes + kPageBytes) + kPageBytes;
  fiber.stack_bytes = kStackBytes - kStaggerBytes * (index % kStaggers);
}

}  // namespace pyconv::emulation
