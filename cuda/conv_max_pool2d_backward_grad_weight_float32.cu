// The weight gradient of conv_max_pool2d in exact float32 arithmetic.
#include "conv_max_pool2d_backward_grad_weight.cuh"

namespace pyconv::cuda {

template struct GradWeightGemm<Float32>;

}  // namespace pyconv::cuda
