// What the backward kernels of conv_max_pool2d share: which windows a convolution position belongs to, and the gradient
// that a window sends to the position it chose.
#pragma once

#include "conv_max_pool2d.cuh"
#include "kernel_table.h"

namespace pyconv::cuda {

// action(T()) with the storage type of the matrix products: any but float64, which they do not take.
template <class Action>
int with_product_type(DType dtype, const Action& action) {
  switch (dtype) {
    case DType::bfloat16:
      return action(BFloat16());
    case DType::float16:
      return action(Float16());
    default:
      return action(float());
  }
}

// The gradient of one window before the activation; `offset` in elements of the output.
template <class T>
__device__ __forceinline__ Accumulator<T> window_gradient(const ConvMaxPool2dBackwardParams& p, int64_t offset) {
  const Accumulator<T> gradient = widen(static_cast<const T*>(p.grad_output)[offset]);
  if (p.saved == nullptr) return gradient;
  return gradient * activation_derivative(p.geometry.activation, widen(static_cast<const T*>(p.saved)[offset]));
}

// The window-relative position that a window chose, or -1 where it has no gradient.
__device__ __forceinline__ int chosen_position(const ConvMaxPool2dBackwardParams& p, int64_t offset) {
  if (p.geometry.pool_h * p.geometry.pool_w > kMaxByteWindow) return static_cast<const int32_t*>(p.argmax)[offset];
  const int position = static_cast<const uint8_t*>(p.argmax)[offset];
  return position == kNoGradientByte ? -1 : position;
}

// The windows first ... last of one axis whose span reaches over `position`, which counts from the start of the pool's
// padding. Where the pool is dilated, some of them have a hole there.
template <class Int>
struct CoveringWindows {
  Int first, last;

  __device__ __forceinline__ CoveringWindows(Int position, Int size, Int dilation, Int stride, Int windows) {
    const Int before = position - (size - 1) * dilation;
    first = before <= 0 ? 0 : (before + stride - 1) / stride;
    last = position / stride;
    if (last >= windows) last = windows - 1;
  }
};

// grad_bias alone: one block per output channel. The entries whose grad_weight kernel sums it on the way use this where
// grad_weight is not wanted.
int launch_grad_bias(const ConvMaxPool2dBackwardParams& params, Stream stream);

// Where *flag is not 0: computes the elements of grad_input anew that are not finite, each from its own weights alone.
int repair_grad_input(const ConvMaxPool2dBackwardParams& params, const int* flag, Stream stream);

// Writes the gradients of all windows before the activation, in the layout of grad_output.
int scale_grad_output(const ConvMaxPool2dBackwardParams& params, void* to, Stream stream);

}  // namespace pyconv::cuda
