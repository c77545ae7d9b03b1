// What a compiled training step needs beside the layers: the loss with its gradient, and steps of parameters whose
// gradient is in memory.
#include "isa_kernels.h"
#include "parallel.h"
#include "sgd_step.h"
#include "simd_math.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kChunk = 4096;       // parameters of a task
constexpr int64_t kMaxPartials = 512;  // sums of squares on the stack; more parameters make longer tasks

template <class T>
void update(const SgdUpdateParams& p) {
  using A = Accumulator<T>;
  const SgdVectors<T> step(p.step);
  auto* parameter = static_cast<T*>(p.parameter);
  const auto* gradient = static_cast<const T*>(p.gradient);
  auto* buffer = static_cast<T*>(p.momentum_buffer);
  const int64_t chunk = max_of(kChunk, round_up(ceil_div(p.count, kMaxPartials), kWidth<A>));
  const int64_t chunks = ceil_div(p.count, chunk);
  double squares[kMaxPartials];
  parallel(p.threads, chunks, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      SquareSum<A> sum;
      const int64_t end = min_of((task + 1) * chunk, p.count);
      for (int64_t i = task * chunk; i < end; i += kWidth<A>) {
        const int64_t count = min_of(kWidth<A>, end - i);
        const Vec<A> old = SgdVectors<T>::load_lanes(parameter + i, count);
        const Vec<A> g = SgdVectors<T>::load_lanes(gradient + i, count);
        sum.add_squares(step.update(old, g, parameter + i, buffer == nullptr ? nullptr : buffer + i, count));
        sum.flush_if_long(1);
      }
      sum.flush();
      squares[task] = sum.total();
    }
  });
  if (p.squares == nullptr) return;
  *p.squares = 0;
  for (int64_t task = 0; task < chunks; ++task) *p.squares += squares[task];
}

// exp(logits - most) of one row, in `exponentials`, and their sum.
template <class T>
Accumulator<T> exponentials_of(const T* logits, int64_t classes, Accumulator<T> most, Accumulator<T>* exponentials) {
  using A = Accumulator<T>;
  A sum = 0;
  for (int64_t c = 0; c < classes; c += kWidth<A>) {
    const int64_t count = min_of(kWidth<A>, classes - c);
    const Vec<A> shifted = sub(SgdVectors<T>::load_lanes(logits + c, count), broadcast(most));
    SgdVectors<A>::store_lanes(exponentials + c, exp_of_not_positive(shifted), count);
  }
  for (int64_t c = 0; c < classes; ++c) sum += exponentials[c];
  return sum;
}

template <class T>
void cross_entropy(const SoftmaxCrossEntropyParams& p) {
  using A = Accumulator<T>;
  const A share = A(1) / static_cast<A>(p.N);
  auto* exponentials = static_cast<A*>(p.workspace);
  double loss = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.classes;
    T* gradient = static_cast<T*>(p.grad_logits) + n * p.classes;
    A most = widen(logits[0]);
    for (int64_t c = 1; c < p.classes; ++c) most = widen(logits[c]) > most ? widen(logits[c]) : most;
    const A sum = exponentials_of(logits, p.classes, most, exponentials);
    loss += std::log(static_cast<double>(sum)) - static_cast<double>(widen(logits[p.labels[n]]) - most);
    const A factor = share / sum;
    for (int64_t c = 0; c < p.classes; ++c) gradient[c] = narrow<T>(exponentials[c] * factor);
    const int64_t label = p.labels[n];
    gradient[label] = narrow<T>(exponentials[label] * factor - share);
  }
  *p.loss = loss / static_cast<double>(p.N);
}

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

void sgd_update(const SgdUpdateParams& params) {
  with_storage_type(params.dtype, [&](auto storage) { update<decltype(storage)>(params); });
}

int64_t softmax_cross_entropy_workspace_bytes(const SoftmaxCrossEntropyParams& params) {
  return params.classes * int64_t(sizeof(double));
}

void softmax_cross_entropy(const SoftmaxCrossEntropyParams& params) {
  with_storage_type(params.dtype, [&](auto storage) { cross_entropy<decltype(storage)>(params); });
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
