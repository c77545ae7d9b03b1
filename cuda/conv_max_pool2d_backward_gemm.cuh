// conv_max_pool2d backward as two implicit matrix products: what the entries of the dispatch list call.
//
//   grad_output * activation'(saved) (none, relu: grad_output itself), argmax -> grad_input
//                                                                             -> grad_weight and grad_bias
#pragma once

#include "conv_max_pool2d_backward.cuh"
#include "warp_gemm.cuh"

namespace pyconv::cuda {

// Math: one of warp_gemm.cuh; the params' dtype is Math::kDType. Each is instantiated once per Math, in
// conv_max_pool2d_backward_grad_input_{float32,tf32,bfloat16,float16}.cu and ..._grad_weight_....cu.
template <class Math>
struct GradInputGemm {
  static bool accepts(const ConvMaxPool2dBackwardParams& params);
  static int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params);
  static int launch(const ConvMaxPool2dBackwardParams& params, Stream stream);
};

// grad_weight, and on the way grad_bias.
template <class Math>
struct GradWeightGemm {
  static bool accepts(const ConvMaxPool2dBackwardParams& params);
  static int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params);
  static int launch(const ConvMaxPool2dBackwardParams& params, Stream stream);
};

// Whatever of the three gradients is wanted.
template <class Math>
struct BackwardGemm {
  static bool accepts(const ConvMaxPool2dBackwardParams& params) {
    return (params.grad_input == nullptr || GradInputGemm<Math>::accepts(params)) &&
           (params.grad_weight == nullptr || GradWeightGemm<Math>::accepts(params));
  }

  static int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
    return product_bytes(params) + (scales(params) ? gradient_bytes(params) : 0);
  }

  static int launch(const ConvMaxPool2dBackwardParams& params, Stream stream) {
    ConvMaxPool2dBackwardParams p = params;
    if (scales(params)) {
      void* const scaled = static_cast<char*>(params.workspace) + product_bytes(params);
      const int error = scale_grad_output(params, scaled, stream);
      if (error != cudaSuccess) return error;
      p.grad_output = scaled;
      p.saved = nullptr;
    }
    if (params.grad_input != nullptr) {
      const int error = GradInputGemm<Math>::launch(p, stream);
      if (error != cudaSuccess) return error;
    }
    if (params.grad_weight != nullptr) return GradWeightGemm<Math>::launch(p, stream);
    return params.grad_bias != nullptr ? launch_grad_bias(p, stream) : cudaSuccess;
  }

 private:
  // Whether the products read gradients that an activation's derivative was multiplied into before.
  static bool scales(const ConvMaxPool2dBackwardParams& params) {
    return params.saved != nullptr && (params.grad_input != nullptr || params.grad_weight != nullptr);
  }
  static int64_t gradient_bytes(const ConvMaxPool2dBackwardParams& params) {
    const ConvMaxPool2dGeometry& g = params.geometry;
    return g.N * g.K * g.PH * g.PW * static_cast<int64_t>(sizeof(typename Math::Storage));
  }
  // The two products run one after the other, and so share their part of the workspace.
  static int64_t product_bytes(const ConvMaxPool2dBackwardParams& params) {
    constexpr int64_t kAlignment = 64;
    const int64_t input = params.grad_input == nullptr ? 0 : GradInputGemm<Math>::workspace_bytes(params);
    const int64_t weight = params.grad_weight == nullptr ? 0 : GradWeightGemm<Math>::workspace_bytes(params);
    return round_up(input > weight ? input : weight, kAlignment);
  }
};

}  // namespace pyconv::cuda
