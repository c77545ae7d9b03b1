// The weight gradient of conv_max_pool2d in TF32 arithmetic.
#include "conv_max_pool2d_backward_grad_weight.cuh"

namespace pyconv::cuda {

template struct GradWeightGemm<TF32>;

}  // namespace pyconv::cuda
