// The implicit matrix product of conv_max_pool2d forward in float16 arithmetic, for inputs read element by element.
#include "conv_max_pool2d_forward_gemm_launch.cuh"

namespace pyconv::cuda {

template <>
int launch_gather<FP16>(const ConvMaxPool2dForwardParams& params, Stream stream) {
  return launch_loader<FP16, false>(params, stream);
}

}  // namespace pyconv::cuda
