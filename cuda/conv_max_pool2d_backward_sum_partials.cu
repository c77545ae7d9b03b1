// Partial sums (splits, K, columns) -> grad_weight (K,C/groups,R,S); (splits, K) -> grad_bias (K,).
//
// 32 neighbouring elements a block, a warp for every kWarps-th split: reads are coalesced and enough of them under way
// even where elements are few and splits many.
#include "conv_max_pool2d_backward.cuh"
#include "conv_max_pool2d_backward_sum_partials.cuh"

namespace pyconv::cuda {

namespace {

constexpr int kWarps = 8;

struct PartialSumsMemory {
  float sums[kWarps][32];
};

}  // namespace

// kernels

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    conv_max_pool2d_backward_sum_partials_kernel(ConvMaxPool2dBackwardParams p, PartialSums partials) {
  auto& memory = shared_memory<PartialSumsMemory>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t K = p.geometry.K, weights = K * partials.columns.count();
  const int64_t count = weights + (p.grad_bias != nullptr ? K : 0);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < count;
       first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t i = first + lane;
    float sum = 0.f;
    if (i < count) {
      const float* const from = i < weights ? partials.weights + i : partials.bias + (i - weights);
      const int64_t pitch = i < weights ? weights : K;
#pragma unroll 4
      for (int split = warp; split < partials.splits; split += kWarps) sum += from[split * pitch];
    }
    memory.sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < count) {
      for (int w = 1; w < kWarps; ++w) sum += memory.sums[w][lane];
      if (i >= weights) {
        static_cast<T*>(p.grad_bias)[i - weights] = narrow<T>(sum);
      } else {
        const Strides4& st = p.grad_weight_strides;
        const int n = static_cast<int>(i % partials.columns.count());
        const int64_t k = i / partials.columns.count();
        static_cast<T*>(p.grad_weight)[k * st.n + partials.columns.c(n) * st.c + partials.columns.r(n) * st.h +
                                       partials.columns.s(n) * st.w] = narrow<T>(sum);
      }
    }
    __syncthreads();  // the memory is used again for the next elements
  }
}

// launchers

int sum_partials(const ConvMaxPool2dBackwardParams& params, const PartialSums& partials, Stream stream) {
  const int64_t count = params.geometry.K * (partials.columns.count() + (params.grad_bias != nullptr ? 1 : 0));
  const int64_t blocks = ceil_div(count, 32);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
  return with_product_type(params.dtype, [&](auto storage) {
    return launch(conv_max_pool2d_backward_sum_partials_kernel<decltype(storage)>, grid, dim3(32 * kWarps),
                  sizeof(PartialSumsMemory), stream, params, partials);
  });
}

}  // namespace pyconv::cuda
