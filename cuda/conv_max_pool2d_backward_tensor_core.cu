// The entry of the implicit matrix products of conv_max_pool2d backward on tensor cores: bfloat16, float16, and float32
// where TF32 is allowed.
#include "conv_max_pool2d_backward_gemm.cuh"
#include "kernels.h"

namespace pyconv::cuda {

namespace {

// action(BackwardGemm<Math>()) with the arithmetic that serves params; `otherwise` where none does.
template <class Result, class Action>
Result with_math(const ConvMaxPool2dBackwardParams& params, Result otherwise, const Action& action) {
  switch (params.dtype) {
    case DType::bfloat16:
      return action(BackwardGemm<BF16>());
    case DType::float16:
      return action(BackwardGemm<FP16>());
    case DType::float32:
      return params.allow_tf32 ? action(BackwardGemm<TF32>()) : otherwise;
    case DType::float64:
      break;
  }
  return otherwise;
}

bool accepts(const ConvMaxPool2dBackwardParams& params) {
  return with_math(params, false, [&](auto gemm) { return gemm.accepts(params); });
}

int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
  return with_math(params, int64_t(0), [&](auto gemm) { return gemm.workspace_bytes(params); });
}

int launch_tensor_core(const ConvMaxPool2dBackwardParams& params, Stream stream) {
  return with_math(params, static_cast<int>(cudaErrorInvalidValue),
                   [&](auto gemm) { return gemm.launch(params, stream); });
}

}  // namespace

extern const Kernel<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_tensor_core = {
    "tensor_core",
    "bfloat16, float16, or float32 with TF32; windows of at most 255 positions, not dilated; a filter within a tile of "
    "256 positions",
    true,
    accepts,
    workspace_bytes,
    launch_tensor_core,
    [](const ConvMaxPool2dBackwardParams&) { return true; },
};

}  // namespace pyconv::cuda
