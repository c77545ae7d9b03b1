// Activations as the doors see them: in ATen operators, and what their derivative needs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>

#include "params.h"

namespace pyconv {

inline at::Tensor aten_activation(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return at::relu(x);
    case Activation::sigmoid:
      return at::sigmoid(x);
    case Activation::tanh:
      return at::tanh(x);
    case Activation::gelu:
      return at::gelu(x);
    case Activation::silu:
      return at::silu(x);
  }
  return x;
}

// The derivative of these two is no function of their output.
inline bool saves_pre_activation(Activation a) { return a == Activation::gelu || a == Activation::silu; }

}  // namespace pyconv
