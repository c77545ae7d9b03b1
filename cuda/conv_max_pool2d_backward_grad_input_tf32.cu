// The input gradient of conv_max_pool2d in TF32 arithmetic.
#include "conv_max_pool2d_backward_grad_input.cuh"

namespace pyconv::cuda {

template struct GradInputGemm<TF32>;

}  // namespace pyconv::cuda
