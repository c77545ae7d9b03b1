// The entry of the implicit matrix products of conv_max_pool2d backward in exact float32 arithmetic.
#include "conv_max_pool2d_backward_gemm.cuh"
#include "kernels.h"

namespace pyconv::cuda {

extern const Kernel<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_float32 = {
    "float32",
    "float32; windows of at most 255 positions, not dilated; a filter within a tile of 256 positions",
    true,
    [](const ConvMaxPool2dBackwardParams& params) {
      return params.dtype == DType::float32 && BackwardGemm<Float32>::accepts(params);
    },
    BackwardGemm<Float32>::workspace_bytes,
    BackwardGemm<Float32>::launch,
};

}  // namespace pyconv::cuda
