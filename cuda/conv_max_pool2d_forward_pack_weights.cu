// The weights of conv_max_pool2d as the matrix product reads them: w (K,Cg,R,S) -> (groups, padded_k, padded_q).
//
// One thread per packed element, neighbours along Q = (channel block, r, s, c): coalesced writes, and nearly coalesced
// reads where the weights are channels_last. K * Q elements are little beside the product's traffic.
#include "conv_max_pool2d.cuh"
#include "conv_max_pool2d_forward_gemm.cuh"

namespace pyconv::cuda {

namespace {

constexpr int kThreads = 256;

}  // namespace

// kernels

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_max_pool2d_forward_pack_weights_kernel(ConvMaxPool2dForwardParams p, int64_t padded_k, int64_t padded_q,
                                                int64_t channel_block) {
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4& st = p.weight_strides;
  const int64_t Cg = g.C / g.groups, Kg = g.K / g.groups;
  const int64_t count = g.groups * padded_k * padded_q, grid_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += grid_threads) {
    const int64_t q = i % padded_q, k = i / padded_q % padded_k, group = i / padded_q / padded_k;
    T value{};
    if (k < Kg && q < g.R * g.S * Cg) {
      const int64_t tap = q / channel_block, r = tap / g.S % g.R, s = tap % g.S;
      const int64_t c = tap / (g.R * g.S) * channel_block + q % channel_block;
      value = static_cast<const T*>(p.weight)[(group * Kg + k) * st.n + c * st.c + r * st.h + s * st.w];
    }
    static_cast<T*>(p.workspace)[i] = value;
  }
}

// launchers

int pack_forward_weights(const ConvMaxPool2dForwardParams& params, int64_t padded_k, int64_t padded_q,
                         int64_t channel_block, Stream stream) {
  const int64_t blocks = ceil_div(params.geometry.groups * padded_k * padded_q, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
  const auto launch_with = [&](auto storage) {
    return launch(conv_max_pool2d_forward_pack_weights_kernel<decltype(storage)>, grid, dim3(kThreads), 0, stream,
                  params, padded_k, padded_q, channel_block);
  };
  switch (params.dtype) {
    case DType::bfloat16:
      return launch_with(BFloat16());
    case DType::float16:
      return launch_with(Float16());
    default:
      return launch_with(float());
  }
}

}  // namespace pyconv::cuda
