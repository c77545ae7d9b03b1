// The direct kernel of conv_max_pool2d forward for bfloat16.
#include "conv_max_pool2d_forward_direct_launch.cuh"

namespace pyconv::cuda {

template int launch_direct_tile<BFloat16>(const DirectArguments&, int, int64_t, Stream);

}  // namespace pyconv::cuda
