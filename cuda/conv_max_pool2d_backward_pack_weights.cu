// w (K,C/groups,R,S) -> (groups, slabs, shifts, padded_n, kSlabBytes of K), as ..._grad_input.cuh says.
//
// One thread per packed element: coalesced writes; the weights are small beside the product's traffic.
#include "conv_max_pool2d_backward.cuh"
#include "conv_max_pool2d_backward_pack_weights.cuh"

namespace pyconv::cuda {

namespace {

constexpr int kThreads = 256;

}  // namespace

// kernels

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_max_pool2d_backward_pack_weights_kernel(ConvMaxPool2dBackwardParams p, PackedWeights packed, int* flag) {
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T));
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4& st = p.weight_strides;
  const int64_t Cg = g.C / g.groups, Kg = g.K / g.groups;
  const int64_t count = packed.row(packed.groups, 0, 0, 0) * kSlab;
  const int64_t grid_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  if (flag != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *flag = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += grid_threads) {
    const int64_t row = i / kSlab;
    const int n = static_cast<int>(row % packed.padded_n);
    const int shift = static_cast<int>(row / packed.padded_n % packed.shifts);
    const int64_t slab = row / packed.padded_n / packed.shifts, group = slab / packed.slabs;
    const int64_t k = slab % packed.slabs * kSlab + i % kSlab;
    const int stride_w = static_cast<int>(g.stride_w), residue = n / static_cast<int>(Cg);
    const int r = packed.rows.tap(shift / packed.columns.count, residue / stride_w);
    const int s = packed.columns.tap(shift % packed.columns.count, residue % stride_w);
    T value{};
    if (k < Kg && n < packed.n && r >= 0 && s >= 0) {
      const int64_t c = n % Cg;
      value = static_cast<const T*>(p.weight)[(group * Kg + k) * st.n + c * st.c + r * st.h + s * st.w];
    }
    static_cast<T*>(p.workspace)[i] = value;
  }
}

// launchers

int pack_backward_weights(const ConvMaxPool2dBackwardParams& params, const PackedWeights& packed, int* flag,
                          Stream stream) {
  return with_product_type(params.dtype, [&](auto storage) {
    using T = decltype(storage);
    const int64_t blocks = ceil_div(packed.bytes() / static_cast<int64_t>(sizeof(T)), kThreads);
    const dim3 grid(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
    return launch(conv_max_pool2d_backward_pack_weights_kernel<T>, grid, dim3(kThreads), 0, stream, params, packed,
                  flag);
  });
}

}  // namespace pyconv::cuda
