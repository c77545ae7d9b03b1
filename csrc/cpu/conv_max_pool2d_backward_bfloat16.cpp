// Backward of conv_max_pool2d in bfloat16 where the CPU multiplies it: the sparse products with elements of two input
// channels. Compiled for AVX512_BF16 alone.
#include "conv_max_pool2d_backward_sparse.h"
#include "isa_kernels.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kMinChannels = 16;  // fewer leave most of a vector of pairs empty

int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
  return Layout<float>(params, nullptr, BFloat16Pairs::kChannels).bytes;
}

void run(const ConvMaxPool2dBackwardParams& params) { SparseBackward<BFloat16Pairs>(params).run(); }

// The gradient before the activation must be grad_output itself: with another activation bfloat16 does not hold it. Nor
// always where windows share a winner, whose gradient then is several entries: that pays while they are few and vectors
// are full.
bool accepts(const ConvMaxPool2dBackwardParams& params) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  if (params.dtype != DType::bfloat16 || params.saved != nullptr || g.C / g.groups < kMinChannels) return false;
  // Taps or channels innermost: pairs are loaded and stored by vectors.
  const auto by_vectors = [&](const void* tensor, const Strides4& st) {
    return tensor == nullptr || st.c == 1 || (st.w == 1 && st.h == g.S && st.c == g.R * g.S);
  };
  if (!by_vectors(params.grad_input == nullptr ? nullptr : params.weight, params.weight_strides) ||
      !by_vectors(params.grad_weight, params.grad_weight_strides)) {
    return false;
  }
  const Layout<float> layout(params, nullptr, BFloat16Pairs::kChannels);
  const bool few_share = (g.pool_h - 1) * g.pool_dilation_h < 2 * g.pool_stride_h &&
                         (g.pool_w - 1) * g.pool_dilation_w < 2 * g.pool_stride_w;
  return !layout.scatters && (!layout.merges || (few_share && layout.half_planes == 0));
}

const Kernel<ConvMaxPool2dBackwardParams> kKernels[] = {
    {"bfloat16_sparse",
     "bfloat16; activation none or relu, at least 16 channels a group, over 6 vectors a filter, few shared maxima", true,
     accepts, workspace_bytes, run},
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

KernelList<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_kernels() {
  return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])};
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
