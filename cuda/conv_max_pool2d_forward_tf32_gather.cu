// The implicit matrix product of conv_max_pool2d forward in tf32 arithmetic, for inputs read element by element.
#include "conv_max_pool2d_forward_gemm_launch.cuh"

namespace pyconv::cuda {

template <>
int launch_gather<TF32>(const ConvMaxPool2dForwardParams& params, Stream stream) {
  return launch_loader<TF32, false>(params, stream);
}

}  // namespace pyconv::cuda
