// The instantiations of the direct kernel for one storage type.
#pragma once

#include "conv_max_pool2d_forward_direct.cuh"

namespace pyconv::cuda {

template <class T, int W, int S, int KT>
int launch_direct_kernel(const DirectArguments& arguments, int64_t blocks, Stream stream) {
  return launch(conv_max_pool2d_forward_direct_kernel<T, W, S, KT>, dim3(static_cast<unsigned>(blocks)),
                dim3(kDirectThreads), sizeof(DirectShared), stream, arguments);
}

template <class T>
int launch_direct_tile(const DirectArguments& arguments, int kt, int64_t blocks, Stream stream) {
  const ConvMaxPool2dGeometry& g = arguments.params.geometry;
  const bool four = kt == 4;
  if (g.pool_h == 1) return launch_direct_kernel<T, 1, 0, 2>(arguments, blocks, stream);
  if (g.pool_h == 3) {
    return four ? launch_direct_kernel<T, 3, 0, 4>(arguments, blocks, stream)
                : launch_direct_kernel<T, 3, 0, 2>(arguments, blocks, stream);
  }
  switch (direct_unrolled_columns(g)) {
    case 3:
      return four ? launch_direct_kernel<T, 2, 3, 4>(arguments, blocks, stream)
                  : launch_direct_kernel<T, 2, 3, 2>(arguments, blocks, stream);
    case 5:
      return four ? launch_direct_kernel<T, 2, 5, 4>(arguments, blocks, stream)
                  : launch_direct_kernel<T, 2, 5, 2>(arguments, blocks, stream);
    default:
      return launch_direct_kernel<T, 2, 0, 2>(arguments, blocks, stream);
  }
}

}  // namespace pyconv::cuda
