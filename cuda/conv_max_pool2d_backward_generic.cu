// conv_max_pool2d backward for every shape, dtype and layout.
//
//   grad_input (N,C,H,W)           a thread per element: over the filter positions that reach it, the windows that
//                                  cover that convolution position, and the output channels that chose it there
//   grad_weight (K,C/groups,R,S)   a block per element: over all windows of k, the input value under (r, s)
//   grad_bias (K,)                 a block per element: over all windows of k
//
// Blocks add their threads' sums as a fixed tree, so results are the same every time.
#include "conv_max_pool2d_backward.cuh"
#include "kernels.h"

namespace pyconv::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kReducingThreads = 128;

template <class A>
struct ReductionMemory {
  A sums[kReducingThreads];
};

// The sum of the block's `mine`, valid in thread 0.
template <class A>
__device__ __forceinline__ A block_sum(ReductionMemory<A>& memory, A mine) {
  const int thread = static_cast<int>(threadIdx.x);
  memory.sums[thread] = mine;
  __syncthreads();
  for (int half = kReducingThreads / 2; half > 0; half /= 2) {
    if (thread < half) memory.sums[thread] += memory.sums[thread + half];
    __syncthreads();
  }
  const A sum = memory.sums[0];
  __syncthreads();  // the memory is used again for the next element
  return sum;
}

// action(n, i, j) for the windows of this thread, out of all N * PH * PW.
template <class Action>
__device__ __forceinline__ void for_each_window(const ConvMaxPool2dGeometry& g, const Action& action) {
  const int64_t windows = g.N * g.PH * g.PW;
  for (int64_t window = threadIdx.x; window < windows; window += kReducingThreads) {
    action(window / (g.PH * g.PW), window / g.PW % g.PH, window % g.PW);
  }
}

}  // namespace

// kernels

// REPAIR: only the elements that are not finite, and none where *flag is 0.
template <class T, bool REPAIR>
__global__ void __launch_bounds__(kThreads, 1)
    conv_max_pool2d_backward_generic_grad_input_kernel(ConvMaxPool2dBackwardParams p, const int* flag) {
  using A = Accumulator<T>;
  if (REPAIR && *flag == 0) return;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const int64_t count = g.N * g.C * g.H * g.W, grid_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t Kg = g.K / g.groups, Cg = g.C / g.groups;
  const int pool_dilation_h = static_cast<int>(g.pool_dilation_h);
  const int pool_dilation_w = static_cast<int>(g.pool_dilation_w);
  for (int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; element < count;
       element += grid_threads) {
    int64_t n, c, h, w;
    if (p.grad_input_strides.c == 1) {
      c = element % g.C;
      w = element / g.C % g.W;
      h = element / (g.C * g.W) % g.H;
      n = element / (g.C * g.W * g.H);
    } else {
      w = element % g.W;
      h = element / g.W % g.H;
      c = element / (g.W * g.H) % g.C;
      n = element / (g.W * g.H * g.C);
    }
    const Strides4& to = p.grad_input_strides;
    T& gradient = static_cast<T*>(p.grad_input)[n * to.n + c * to.c + h * to.h + w * to.w];
    if (REPAIR && isfinite(widen(gradient))) continue;
    const int64_t first_k = c / Cg * Kg;
    const T* filters = static_cast<const T*>(p.weight) + first_k * p.weight_strides.n + c % Cg * p.weight_strides.c;
    A sum = 0;
    for (int64_t r = 0; r < g.R; ++r) {
      const int64_t row = h + g.pad_top - r * g.dilation_h, conv_row = row / g.stride_h;
      if (row < 0 || row % g.stride_h != 0 || conv_row >= g.OH) continue;
      const int64_t pool_row = conv_row + g.pool_pad_h;
      const CoveringWindows rows(pool_row, g.pool_h, g.pool_dilation_h, g.pool_stride_h, g.PH);
      for (int64_t s = 0; s < g.S; ++s) {
        const int64_t column = w + g.pad_left - s * g.dilation_w, conv_column = column / g.stride_w;
        if (column < 0 || column % g.stride_w != 0 || conv_column >= g.OW) continue;
        const int64_t pool_column = conv_column + g.pool_pad_w;
        const CoveringWindows columns(pool_column, g.pool_w, g.pool_dilation_w, g.pool_stride_w, g.PW);
        for (int64_t i = rows.first; i <= rows.last; ++i) {
          const int y = static_cast<int>(pool_row - i * g.pool_stride_h);
          if (y % pool_dilation_h != 0) continue;
          for (int64_t j = columns.first; j <= columns.last; ++j) {
            const int x = static_cast<int>(pool_column - j * g.pool_stride_w);
            if (x % pool_dilation_w != 0) continue;
            const int position = y / pool_dilation_h * static_cast<int>(g.pool_w) + x / pool_dilation_w;
            const Strides4& st = p.output_strides;
            int64_t offset = n * st.n + first_k * st.c + i * st.h + j * st.w;
            const T* filter = filters + r * p.weight_strides.h + s * p.weight_strides.w;
            for (int64_t k = 0; k < Kg; ++k) {
              if (chosen_position(p, offset) == position) sum += window_gradient<T>(p, offset) * widen(*filter);
              offset += st.c;
              filter += p.weight_strides.n;
            }
          }
        }
      }
    }
    gradient = narrow<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kReducingThreads, 1)
    conv_max_pool2d_backward_generic_grad_weight_kernel(ConvMaxPool2dBackwardParams p) {
  using A = Accumulator<T>;
  auto& memory = shared_memory<ReductionMemory<A>>();
  const ConvMaxPool2dGeometry& g = p.geometry;
  const int64_t Kg = g.K / g.groups, Cg = g.C / g.groups;
  for (int64_t element = blockIdx.x; element < g.K * Cg * g.R * g.S; element += gridDim.x) {
    const int64_t s = element % g.S, r = element / g.S % g.R, c = element / (g.S * g.R) % Cg;
    const int64_t k = element / (g.S * g.R * Cg);
    const T* plane = static_cast<const T*>(p.input) + (k / Kg * Cg + c) * p.input_strides.c;
    A sum = 0;
    for_each_window(g, [&](int64_t n, int64_t i, int64_t j) {
      const Strides4& st = p.output_strides;
      const int64_t offset = n * st.n + k * st.c + i * st.h + j * st.w;
      const int position = chosen_position(p, offset);
      if (position < 0) return;
      const int64_t conv_row = i * g.pool_stride_h - g.pool_pad_h + position / g.pool_w * g.pool_dilation_h;
      const int64_t conv_column = j * g.pool_stride_w - g.pool_pad_w + position % g.pool_w * g.pool_dilation_w;
      const int64_t h = conv_row * g.stride_h - g.pad_top + r * g.dilation_h;
      const int64_t w = conv_column * g.stride_w - g.pad_left + s * g.dilation_w;
      if (h < 0 || h >= g.H || w < 0 || w >= g.W) return;
      sum += window_gradient<T>(p, offset) *
             widen(plane[n * p.input_strides.n + h * p.input_strides.h + w * p.input_strides.w]);
    });
    sum = block_sum(memory, sum);
    const Strides4& st = p.grad_weight_strides;
    if (threadIdx.x == 0) {
      static_cast<T*>(p.grad_weight)[k * st.n + c * st.c + r * st.h + s * st.w] = narrow<T>(sum);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kReducingThreads, 1)
    conv_max_pool2d_backward_grad_bias_kernel(ConvMaxPool2dBackwardParams p) {
  using A = Accumulator<T>;
  auto& memory = shared_memory<ReductionMemory<A>>();
  const ConvMaxPool2dGeometry& g = p.geometry;
  for (int64_t k = blockIdx.x; k < g.K; k += gridDim.x) {
    A sum = 0;
    for_each_window(g, [&](int64_t n, int64_t i, int64_t j) {
      const Strides4& st = p.output_strides;
      const int64_t offset = n * st.n + k * st.c + i * st.h + j * st.w;
      if (chosen_position(p, offset) >= 0) sum += window_gradient<T>(p, offset);
    });
    sum = block_sum(memory, sum);
    if (threadIdx.x == 0) static_cast<T*>(p.grad_bias)[k] = narrow<T>(sum);
  }
}

// launchers

namespace {

dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX)); }

template <class T>
int launch_generic(const ConvMaxPool2dBackwardParams& params, Stream stream) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  const int64_t inputs = g.N * g.C * g.H * g.W;
  if (params.grad_input != nullptr && inputs > 0) {
    const int* const no_flag = nullptr;
    const int error = launch(conv_max_pool2d_backward_generic_grad_input_kernel<T, false>,
                             grid_of(ceil_div(inputs, kThreads)), dim3(kThreads), 0, stream, params, no_flag);
    if (error != cudaSuccess) return error;
  }
  if (params.grad_weight != nullptr) {
    const int error = launch(conv_max_pool2d_backward_generic_grad_weight_kernel<T>,
                             grid_of(g.K * (g.C / g.groups) * g.R * g.S), dim3(kReducingThreads),
                             sizeof(ReductionMemory<Accumulator<T>>), stream, params);
    if (error != cudaSuccess) return error;
  }
  return params.grad_bias != nullptr ? launch_grad_bias(params, stream) : cudaSuccess;
}

}  // namespace

int launch_grad_bias(const ConvMaxPool2dBackwardParams& params, Stream stream) {
  return with_storage_type(params.dtype, [&](auto storage) {
    using T = decltype(storage);
    return launch(conv_max_pool2d_backward_grad_bias_kernel<T>, grid_of(params.geometry.K), dim3(kReducingThreads),
                  sizeof(ReductionMemory<Accumulator<T>>), stream, params);
  });
}

int repair_grad_input(const ConvMaxPool2dBackwardParams& params, const int* flag, Stream stream) {
  constexpr int64_t kBlocks = 1024;  // there is seldom anything to do
  const ConvMaxPool2dGeometry& g = params.geometry;
  const int64_t blocks = ceil_div(g.N * g.C * g.H * g.W, kThreads);
  return with_product_type(params.dtype, [&](auto storage) {
    return launch(conv_max_pool2d_backward_generic_grad_input_kernel<decltype(storage), true>,
                  grid_of(blocks < kBlocks ? blocks : kBlocks), dim3(kThreads), 0, stream, params, flag);
  });
}

extern const Kernel<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_generic = {
    "generic",
    "every shape, dtype and layout",
    true,
    [](const ConvMaxPool2dBackwardParams&) { return true; },
    [](const ConvMaxPool2dBackwardParams&) -> int64_t { return 0; },
    [](const ConvMaxPool2dBackwardParams& params, Stream stream) {
      return with_storage_type(params.dtype,
                               [&](auto storage) { return launch_generic<decltype(storage)>(params, stream); });
    },
};

}  // namespace pyconv::cuda
