// grad_output (N,K,PH,PW) * activation'(saved) -> the gradient of the windows before the activation, in grad_output's
// layout.
//
// For the activations whose derivative is more than dead or live. A pass of its own, because the products read every
// window several times, and would compute its derivative as often; what it writes is an output's size, a fraction of
// the convolution's. Rounded to the storage type, as a chain of separate operators would.
#include "conv_max_pool2d_backward.cuh"

namespace pyconv::cuda {

namespace {

constexpr int kThreads = 256;

}  // namespace

// kernels

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_max_pool2d_backward_scale_kernel(ConvMaxPool2dBackwardParams p, T* to, int64_t count) {
  const int64_t grid_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += grid_threads) {
    to[i] = narrow<T>(window_gradient<T>(p, i));
  }
}

// launchers

int scale_grad_output(const ConvMaxPool2dBackwardParams& params, void* to, Stream stream) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  const int64_t count = g.N * g.K * g.PH * g.PW, blocks = ceil_div(count, kThreads);
  if (count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
  return with_product_type(params.dtype, [&](auto storage) {
    using T = decltype(storage);
    return launch(conv_max_pool2d_backward_scale_kernel<T>, grid, dim3(kThreads), 0, stream, params,
                  static_cast<T*>(to), count);
  });
}

}  // namespace pyconv::cuda
