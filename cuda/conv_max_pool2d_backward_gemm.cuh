// conv_max_pool2d backward as two implicit matrix products: what the entries of the dispatch list call.
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

  // The two products run one after the other, and so share the workspace.
  static int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
    const int64_t input = params.grad_input == nullptr ? 0 : GradInputGemm<Math>::workspace_bytes(params);
    const int64_t weight = params.grad_weight == nullptr ? 0 : GradWeightGemm<Math>::workspace_bytes(params);
    return input > weight ? input : weight;
  }

  static int launch(const ConvMaxPool2dBackwardParams& params, Stream stream) {
    if (params.grad_input != nullptr) {
      const int error = GradInputGemm<Math>::launch(params, stream);
      if (error != cudaSuccess) return error;
    }
    if (params.grad_weight != nullptr) return GradWeightGemm<Math>::launch(params, stream);
    return params.grad_bias != nullptr ? launch_grad_bias(params, stream) : cudaSuccess;
  }
};

}  // namespace pyconv::cuda
