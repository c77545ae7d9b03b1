// Threads that stay together for many parallel loops.
//
// Opening a region of torch's pool takes 2 to 8 us, and a training step of a small network has a dozen loops. So one
// region is opened for many steps: the caller runs them, and the others, spinning, wait for its loops. A loop then
// starts within a fraction of a microsecond.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "../params.h"

namespace pyconv::network {

class Team {
 public:
  // Runs main(team) on the calling thread, at most num_threads - 1 others of `pool` helping with the loops of
  // team.threads(). Nothing waits for a helper that does not come.
  template <class Main>
  static void run(const Threads& pool, const Main& main) {
    Team team(pool.num_threads);
    if (team.size_ == 1) return main(team);
    struct Context {
      Team& team;
      const Main& main;
    } context{team, main};
    pool.parallel_for(
        0, team.size_, 1,
        [](int64_t begin, int64_t end, void* pointer) {
          auto& c = *static_cast<Context*>(pointer);
          for (int64_t member = begin; member < end; ++member) {
            if (member > 0) {
              c.team.help(member);
              continue;
            }
            const Leader leader(c.team);
            c.main(c.team);
          }
        },
        &context);
  }

  // For the kernels called by main.
  Threads threads(int64_t operations) const {
    return {operations < kSerialOperations ? int64_t(1) : size_, parallel_for};
  }

 private:
  // While it lives its thread leads the team; the helpers are dismissed after it, by an exception too.
  class Leader {
   public:
    explicit Leader(Team& team) : team_(team), outer_(current_) { current_ = &team; }
    ~Leader() {
      current_ = outer_;
      team_.number_.store(kDismissed, std::memory_order_release);
    }

   private:
    Team& team_;
    Team* const outer_;
  };

  // Below it a loop costs more than it gains: two cache lines travel to each helper and back.
  static constexpr int64_t kSerialOperations = 50000;
  static constexpr int64_t kSpins = 2000;  // before the processor is offered to others

  struct alignas(128) Member {
    std::atomic<uint64_t> claimed{0};  // the last loop whose piece of this number somebody took
  };

  explicit Team(int64_t size) : size_(size), members_(static_cast<size_t>(size)) {}

  static void parallel_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
    current_->loop(begin, end, body, context);
  }

  void loop(int64_t begin, int64_t end, ParallelBody body, void* context) {
    const int64_t count = end - begin;
    begin_ = begin;
    count_ = count;
    pieces_ = count < size_ ? count : size_;
    body_ = body;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = number_.load(std::memory_order_relaxed) + 1;
    for (int64_t member = pieces_; member < size_; ++member) {
      members_[static_cast<size_t>(member)].claimed.store(number, std::memory_order_relaxed);
    }
    number_.store(number, std::memory_order_release);
    for (int64_t piece = 0; piece < pieces_; ++piece) take(piece, number);
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < pieces_;) wait(spins);
  }

  // Runs a piece of the loop `number` unless somebody took it. When a loop has ended, everyone's piece is claimed for it,
  // also those it did not have: who comes late claims nothing. And while a claimed piece runs, the loop and its fields stay.
  void take(int64_t piece, uint64_t number) {
    std::atomic<uint64_t>& claimed = members_[static_cast<size_t>(piece)].claimed;
    uint64_t last = claimed.load(std::memory_order_relaxed);
    if (last >= number || !claimed.compare_exchange_strong(last, number, std::memory_order_acq_rel)) return;
    body_(begin_ + count_ * piece / pieces_, begin_ + count_ * (piece + 1) / pieces_, context_);
    done_.fetch_add(1, std::memory_order_release);
  }

  void help(int64_t member) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t number = seen;
      for (int64_t spins = 0; (number = number_.load(std::memory_order_acquire)) == seen;) wait(spins);
      if (number == kDismissed) return;
      seen = number;
      take(member, number);
    }
  }

  static void wait(int64_t& spins) {
    if (++spins % kSpins == 0) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr uint64_t kDismissed = ~uint64_t(0);
  inline static thread_local Team* current_ = nullptr;

  int64_t size_;
  std::vector<Member> members_;
  alignas(128) std::atomic<uint64_t> number_{0};
  // Of the loop.
  int64_t begin_ = 0, count_ = 0, pieces_ = 0;
  ParallelBody body_ = nullptr;
  void* context_ = nullptr;
  alignas(128) std::atomic<int64_t> done_{0};
};

}  // namespace pyconv::network
