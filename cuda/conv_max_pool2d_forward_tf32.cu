// The implicit matrix product of conv_max_pool2d forward in tf32 arithmetic.
#include "conv_max_pool2d_forward_gemm_launch.cuh"

namespace pyconv::cuda {

template struct ForwardGemm<TF32>;

}  // namespace pyconv::cuda
