// The weight gradient of conv_max_pool2d in bfloat16 arithmetic.
#include "conv_max_pool2d_backward_grad_weight.cuh"

namespace pyconv::cuda {

template struct GradWeightGemm<BF16>;

}  // namespace pyconv::cuda
