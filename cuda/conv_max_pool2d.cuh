// What the kernels of conv_max_pool2d share: the rule of the maximum, what becomes of it, the order of outputs.
#pragma once

#include "activations.cuh"

namespace pyconv::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kMaxGridX = 2147483647;

// Division of 0 <= x < 2^31 by a number known to the host, as a multiplication. With 2^shift the power of two at or
// above the divisor, `multiplier` is the fraction of 2^32 / divisor * 2^shift beyond 2^32, rounded up.
struct Divisor {
  int divisor;
  uint32_t multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t value) : divisor(static_cast<int>(value)), shift(0) {
    while ((int64_t(1) << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - value)) / value + 1);
  }
  __device__ __forceinline__ int quotient(int x) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(static_cast<uint32_t>(x)) * multiplier) >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(x)) >> shift);
  }
};

// Running maximum of a window in row-major order, by torch's rule: a larger value or a NaN replaces, so the first
// maximum wins, but the last NaN. Without any position: -inf and position -1.
template <class A>
struct WindowMax {
  A value = -static_cast<A>(INFINITY);
  int position = -1;

  __device__ __forceinline__ void take(A candidate, int at) {
    if (position < 0 || candidate > value || candidate != candidate) {
      value = candidate;
      position = at;
    }
  }
};

// Writes output, pre-activation and argmax of one window; `offset` in elements of the output.
template <class T>
__device__ __forceinline__ void write_window(const ConvMaxPool2dForwardParams& p, int64_t offset,
                                             const WindowMax<Accumulator<T>>& best, Accumulator<T> bias) {
  using A = Accumulator<T>;
  const Activation activation = p.geometry.activation;
  A y = best.value + bias;
  int position = best.position;
  if (activation == Activation::relu) {
    y = widen(narrow<T>(y));  // dead or live is decided on what the caller will see
    if (y <= A(0)) position = -1;
  } else if (p.pre_activation != nullptr) {
    static_cast<T*>(p.pre_activation)[offset] = narrow<T>(y);
  }
  static_cast<T*>(p.output)[offset] = narrow<T>(activate(activation, y));
  if (p.argmax == nullptr) return;
  static_assert(static_cast<uint8_t>(-1) == kNoGradientByte && kNoGradientInt32 == -1, "-1 stands for both");
  if (p.geometry.pool_h * p.geometry.pool_w <= kMaxByteWindow) {
    static_cast<uint8_t*>(p.argmax)[offset] = static_cast<uint8_t>(position);
  } else {
    static_cast<int32_t*>(p.argmax)[offset] = position;
  }
}

template <class T>
__device__ __forceinline__ Accumulator<T> bias_of(const ConvMaxPool2dForwardParams& p, int64_t k) {
  return p.bias == nullptr ? Accumulator<T>(0) : widen(static_cast<const T*>(p.bias)[k * p.bias_stride]);
}

}  // namespace pyconv::cuda
