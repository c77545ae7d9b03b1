// The input gradient of conv_max_pool2d in float16 arithmetic.
#include "conv_max_pool2d_backward_grad_input.cuh"

namespace pyconv::cuda {

template struct GradInputGemm<FP16>;

}  // namespace pyconv::cuda
