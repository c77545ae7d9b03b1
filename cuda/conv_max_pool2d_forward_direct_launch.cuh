// The instantiations of the direct kernel for one storage type.
#pragma once

#include "conv_max_pool2d_forward_direct.cuh"

namespace pyconv::cuda {

inline bool has_unit_steps(const ConvMaxPool2dGeometry& g) {
  return g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 && g.pool_dilation_h == 1 &&
         g.pool_dilation_w == 1 && g.pool_stride_h == g.pool_h && g.pool_stride_w == g.pool_w;
}

template <class T, int W, int S>
int launch_window(const DirectArguments& a, int kt, int64_t blocks, Stream stream) {
  const dim3 grid(static_cast<unsigned>(blocks));
  return kt == 4 ? launch(conv_max_pool2d_forward_direct_kernel<T, W, S, 4>, grid, dim3(kDirectThreads), sizeof(DirectShared),
                          stream, a)
                 : launch(conv_max_pool2d_forward_direct_kernel<T, W, S, 2>, grid, dim3(kDirectThreads), sizeof(DirectShared),
                          stream, a);
}

template <class T>
int launch_direct_tile(const DirectArguments& a, int kt, int64_t blocks, Stream stream) {
  const ConvMaxPool2dGeometry& g = a.params.geometry;
  switch (g.pool_h) {
    case 1:
      return launch_window<T, 1, 0>(a, kt, blocks, stream);
    case 2:
      if (has_unit_steps(g) && g.S == 3) return launch_window<T, 2, 3>(a, kt, blocks, stream);
      if (has_unit_steps(g) && g.S == 5) return launch_window<T, 2, 5>(a, kt, blocks, stream);
      return launch_window<T, 2, 0>(a, kt, blocks, stream);
    default:
      return launch_window<T, 3, 0>(a, kt, blocks, stream);
  }
}

}  // namespace pyconv::cuda
