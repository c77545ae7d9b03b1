// The implicit matrix product of conv_max_pool2d forward in exact float32 arithmetic, and its entry.
#include "conv_max_pool2d_forward_gemm_launch.cuh"
#include "kernels.h"

namespace pyconv::cuda {

template struct ForwardGemm<Float32>;

extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_float32 = {
    "float32",
    "float32; at least 8 output channels in a group; a pooling window within a tile of 256 positions",
    true,
    ForwardGemm<Float32>::accepts,
    ForwardGemm<Float32>::workspace_bytes,
    ForwardGemm<Float32>::launch,
};

}  // namespace pyconv::cuda
