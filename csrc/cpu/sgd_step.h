// A step of stochastic gradient descent on vectors of parameters, for the kernels that have their gradient in registers
// or in memory. SgdStep of params.h says what it computes.
#pragma once

#include "simd.h"
#include "storage_simd.h"

namespace pyconv::cpu {
namespace {

template <class T>
class SgdVectors {
  using A = Accumulator<T>;

 public:
  explicit SgdVectors(const SgdStep& step)
      : momentum_(broadcast(static_cast<A>(step.momentum))),
        fresh_(broadcast(static_cast<A>(step.first ? 1.0 : 1.0 - step.dampening))),
        decay_(broadcast(static_cast<A>(step.decay))),
        minus_rate_(broadcast(static_cast<A>(-step.rate))),
        nesterov_(step.nesterov),
        first_(step.first) {}

  // Of `count` <= kWidth neighbours; the new parameter, whose lanes beyond are 0.
  Vec<A> update(Vec<A> parameter, Vec<A> gradient, T* parameter_at, T* buffer_at, int64_t count) const {
    Vec<A> direction = fma(decay_, parameter, gradient);
    if (buffer_at != nullptr) {
      Vec<A> buffer = mul(fresh_, direction);
      if (!first_) buffer = fma(momentum_, load_lanes(buffer_at, count), buffer);
      store_lanes(buffer_at, buffer, count);
      direction = nesterov_ ? fma(momentum_, buffer, direction) : buffer;
    }
    parameter = fma(minus_rate_, direction, parameter);
    store_lanes(parameter_at, parameter, count);
    return parameter;
  }

  static Vec<A> load_lanes(const T* p, int64_t count) {
    return count == kWidth<A> ? load_widened(p) : load_widened(p, count);
  }
  static void store_lanes(T* p, Vec<A> x, int64_t count) {
    if (count == kWidth<A>) {
      store_narrowed(p, x);
    } else {
      store_narrowed(p, x, count);
    }
  }

 private:
  Vec<A> momentum_, fresh_, decay_, minus_rate_;
  bool nesterov_, first_;
};

// A sum of squares in double, so that its digits last over millions of parameters.
template <class A>
class SquareSum {
 public:
  void add_squares(Vec<A> x) { sums_ = fma(x, x, sums_); }
  // Until then the lanes are sums in A, which few hundred vectors should be added to.
  void flush_if_long(int64_t vectors_added) {
    unflushed_ += vectors_added;
    if (unflushed_ >= 256) flush();
  }
  void flush() {
    unflushed_ = 0;
    A lanes[kWidth<A>];
    store(lanes, sums_);
    for (int i = 0; i < kWidth<A>; ++i) total_ += static_cast<double>(lanes[i]);
    sums_ = zero<A>();
  }
  double total() const { return total_; }

 private:
  Vec<A> sums_ = zero<A>();
  double total_ = 0;
  int64_t unflushed_ = 0;
};

}  // namespace
}  // namespace pyconv::cpu
