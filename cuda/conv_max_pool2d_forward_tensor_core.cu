// The entry of the implicit matrix product on tensor cores: bfloat16, float16, and float32 where TF32 is allowed.
#include "conv_max_pool2d_forward_gemm.cuh"
#include "kernels.h"

namespace pyconv::cuda {

namespace {

// action(ForwardGemm<Math>() or ForwardPatch()), whichever serves params best; `otherwise` where none does.
template <class Result, class Action>
Result with_math(const ConvMaxPool2dForwardParams& params, Result otherwise, const Action& action) {
  switch (params.dtype) {
    case DType::bfloat16:
      return action(ForwardGemm<BF16>());
    case DType::float16:
      return action(ForwardGemm<FP16>());
    case DType::float32:
      if (!params.allow_tf32) return otherwise;
      return ForwardPatch::accepts(params) ? action(ForwardPatch()) : action(ForwardGemm<TF32>());
    case DType::float64:
      break;
  }
  return otherwise;
}

bool accepts(const ConvMaxPool2dForwardParams& params) {
  return with_math(params, false, [&](auto gemm) { return gemm.accepts(params); });
}

int64_t workspace_bytes(const ConvMaxPool2dForwardParams& params) {
  return with_math(params, int64_t(0), [&](auto gemm) { return gemm.workspace_bytes(params); });
}

int launch_tensor_core(const ConvMaxPool2dForwardParams& params, Stream stream) {
  return with_math(params, static_cast<int>(cudaErrorInvalidValue),
                   [&](auto gemm) { return gemm.launch(params, stream); });
}

}  // namespace

extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_tensor_core = {
    "tensor_core",
    "bfloat16, float16, or float32 with TF32; at least 8 output channels in a group; a pooling window within a tile of "
    "256 positions",
    true,
    accepts,
    workspace_bytes,
    launch_tensor_core,
    [](const ConvMaxPool2dForwardParams& params) {
      return params.dtype != DType::float32 || !ForwardPatch::accepts(params);
    },
};

}  // namespace pyconv::cuda
