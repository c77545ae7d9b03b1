// Storage and accumulator types, and the activations with their derivatives, for every CUDA kernel.
#pragma once

#include <cmath>

#include "device.cuh"

namespace pyconv::cuda {

// T: storage type. Accumulator<T>: what sums are held in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class T>
__device__ __forceinline__ float widen(T x) {
  return to_float(x);
}
__device__ __forceinline__ double widen(double x) { return x; }

// To nearest even.
template <class T>
__device__ __forceinline__ T narrow(float x) {
  return from_float<T>(x);
}
template <class T>
__device__ __forceinline__ T narrow(double x) {
  return x;
}

// action(T()) with the storage type of `dtype`.
template <class Action>
auto with_storage_type(DType dtype, const Action& action) {
  switch (dtype) {
    case DType::float64:
      return action(double());
    case DType::bfloat16:
      return action(BFloat16());
    case DType::float16:
      return action(Float16());
    case DType::float32:
      break;
  }
  return action(float());
}

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float erfc_of(float x) { return erfcf(x); }
__device__ __forceinline__ double erfc_of(double x) { return erfc(x); }

template <class A>
__device__ __forceinline__ A sigmoid_of(A x) {
  return A(1) / (A(1) + exp_of(-x));
}

// By erfc, which keeps its digits in the negative tail, where 1 + erf cancels.
template <class A>
__device__ __forceinline__ A normal_cdf(A x) {
  return A(0.5) * erfc_of(x * A(-0.70710678118654752440));
}

// relu keeps NaN, as torch does.
template <class A>
__device__ __forceinline__ A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < A(0) ? A(0) : x;
    case Activation::sigmoid:
      return sigmoid_of(x);
    case Activation::tanh:
      return tanh_of(x);
    case Activation::gelu:
      return x * normal_cdf(x);
    case Activation::silu: {
      const A e = exp_of(x < A(0) ? x : -x);  // of the negative side: exp(-x) would overflow and lose the tail
      return x < A(0) ? x * (e / (A(1) + e)) : x / (A(1) + e);
    }
  }
  return x;
}

// d activation / d pre-activation from what is saved: the output for relu, sigmoid and tanh, the pre-activation for
// gelu and silu; 1 for none.
template <class A>
__device__ __forceinline__ A activation_derivative(Activation activation, A saved) {
  switch (activation) {
    case Activation::relu:
      return saved <= A(0) ? A(0) : A(1);
    case Activation::sigmoid:
      return saved * (A(1) - saved);
    case Activation::tanh:
      return A(1) - saved * saved;
    case Activation::gelu: {
      const A density = A(0.39894228040143267794) * exp_of(A(-0.5) * saved * saved);
      return normal_cdf(saved) + saved * density;
    }
    case Activation::silu: {
      const A s = sigmoid_of(saved);
      return s * (A(1) + saved * (A(1) - s));
    }
    case Activation::none:
      break;
  }
  return A(1);
}

}  // namespace pyconv::cuda
