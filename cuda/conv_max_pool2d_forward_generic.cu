// conv_max_pool2d forward for every shape, dtype and layout: one thread per output element.
//
//   x (N,C,H,W), w (K,C/groups,R,S) -> one window's convolution outputs, one at a time, in a register -> window max
//   -> + bias -> activation -> y (N,K,PH,PW), argmax (N,K,PH,PW)
//
// Neighbouring threads write neighbouring outputs. Nothing is shared between threads: this is the kernel that cannot
// refuse, not the one that is fast.
#include "conv_max_pool2d.cuh"
#include "kernels.h"

namespace pyconv::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;

template <class T>
__device__ __forceinline__ Accumulator<T> convolution_at(const ConvMaxPool2dForwardParams& p, const T* image,
                                                         const T* filter, int64_t row, int64_t column) {
  const ConvMaxPool2dGeometry& g = p.geometry;
  const int64_t top = row * g.stride_h - g.pad_top, left = column * g.stride_w - g.pad_left;
  Accumulator<T> sum = 0;
#pragma unroll 1
  for (int64_t c = 0; c < g.C / g.groups; ++c) {
#pragma unroll 1
    for (int64_t r = 0; r < g.R; ++r) {
      const int64_t h = top + r * g.dilation_h;
      if (h < 0 || h >= g.H) continue;
      for (int64_t s = 0; s < g.S; ++s) {
        const int64_t w = left + s * g.dilation_w;
        if (w < 0 || w >= g.W) continue;
        sum += widen(image[c * p.input_strides.c + h * p.input_strides.h + w * p.input_strides.w]) *
               widen(filter[c * p.weight_strides.c + r * p.weight_strides.h + s * p.weight_strides.w]);
      }
    }
  }
  return sum;
}

}  // namespace

// kernels

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    conv_max_pool2d_forward_generic_kernel(ConvMaxPool2dForwardParams p) {
  const ConvMaxPool2dGeometry& g = p.geometry;
  const int64_t count = g.N * g.K * g.PH * g.PW;
  const int64_t grid_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += grid_threads) {
    int64_t n, k, row, column;
    if (p.output_strides.c == 1) {
      k = i % g.K;
      column = i / g.K % g.PW;
      row = i / (g.K * g.PW) % g.PH;
      n = i / (g.K * g.PW * g.PH);
    } else {
      column = i % g.PW;
      row = i / g.PW % g.PH;
      k = i / (g.PW * g.PH) % g.K;
      n = i / (g.PW * g.PH * g.K);
    }
    const int64_t group = k / (g.K / g.groups);
    const T* image =
        static_cast<const T*>(p.input) + n * p.input_strides.n + group * (g.C / g.groups) * p.input_strides.c;
    const T* filter = static_cast<const T*>(p.weight) + k * p.weight_strides.n;
    WindowMax<Accumulator<T>> best;
#pragma unroll 1
    for (int64_t y = 0; y < g.pool_h; ++y) {
      const int64_t conv_row = row * g.pool_stride_h - g.pool_pad_h + y * g.pool_dilation_h;
      if (conv_row < 0 || conv_row >= g.OH) continue;
#pragma unroll 1
      for (int64_t x = 0; x < g.pool_w; ++x) {
        const int64_t conv_column = column * g.pool_stride_w - g.pool_pad_w + x * g.pool_dilation_w;
        if (conv_column < 0 || conv_column >= g.OW) continue;
        best.take(convolution_at(p, image, filter, conv_row, conv_column), static_cast<int>(y * g.pool_w + x));
      }
    }
    const Strides4& st = p.output_strides;
    write_window<T>(p, n * st.n + k * st.c + row * st.h + column * st.w, best, bias_of<T>(p, k));
  }
}

// launchers

namespace {

int launch_generic(const ConvMaxPool2dForwardParams& params, Stream stream) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  const int64_t blocks = ceil_div(g.N * g.K * g.PH * g.PW, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
  return with_storage_type(params.dtype, [&](auto storage) {
    return launch(conv_max_pool2d_forward_generic_kernel<decltype(storage)>, grid, dim3(kThreads), 0, stream, params);
  });
}

}  // namespace

extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_generic = {
    "generic",
    "every shape, dtype and layout",
    true,
    [](const ConvMaxPool2dForwardParams&) { return true; },
    [](const ConvMaxPool2dForwardParams&) -> int64_t { return 0; },
    launch_generic,
};

}  // namespace pyconv::cuda
