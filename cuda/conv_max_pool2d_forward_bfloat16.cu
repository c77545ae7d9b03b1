// The implicit matrix product of conv_max_pool2d forward in bfloat16 arithmetic.
#include "conv_max_pool2d_forward_gemm_launch.cuh"

namespace pyconv::cuda {

template struct ForwardGemm<BF16>;

}  // namespace pyconv::cuda
