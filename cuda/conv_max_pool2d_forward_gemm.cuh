// conv_max_pool2d forward as an implicit matrix product: what the entries of the dispatch list call.
#pragma once

#include "kernel_table.h"
#include "warp_gemm.cuh"

namespace pyconv::cuda {

// Math: one of warp_gemm.cuh; the params' dtype is Math::kDType. Instantiated once per Math, in
// conv_max_pool2d_forward_{float32,tf32,bfloat16,float16}.cu.
template <class Math>
struct ForwardGemm {
  static bool accepts(const ConvMaxPool2dForwardParams& params);
  static int64_t workspace_bytes(const ConvMaxPool2dForwardParams& params);
  static int launch(const ConvMaxPool2dForwardParams& params, Stream stream);
};

// The part of launch() for inputs that the gather loader reads. In files of their own,
// conv_max_pool2d_forward_*_gather.cu, to be compiled at the same time.
template <class Math>
int launch_gather(const ConvMaxPool2dForwardParams& params, Stream stream);
template <>
int launch_gather<Float32>(const ConvMaxPool2dForwardParams& params, Stream stream);
template <>
int launch_gather<TF32>(const ConvMaxPool2dForwardParams& params, Stream stream);
template <>
int launch_gather<BF16>(const ConvMaxPool2dForwardParams& params, Stream stream);
template <>
int launch_gather<FP16>(const ConvMaxPool2dForwardParams& params, Stream stream);

// The product in TF32 for inputs of few channels, from a patch of the input in shared memory:
// conv_max_pool2d_forward_patch.cu.
struct ForwardPatch {
  static bool accepts(const ConvMaxPool2dForwardParams& params);
  static int64_t workspace_bytes(const ConvMaxPool2dForwardParams& params);
  static int launch(const ConvMaxPool2dForwardParams& params, Stream stream);
};

// Weights (K, C/groups, R, S) -> workspace (groups, padded_k, padded_q), Q = (channel block, r, s, c), with zeros
// beyond K and Q. channel_block divides C/groups.
int pack_forward_weights(const ConvMaxPool2dForwardParams& params, int64_t padded_k, int64_t padded_q,
                         int64_t channel_block, Stream stream);

}  // namespace pyconv::cuda
