// What each loop-nest file provides, in a namespace of its own for every ISA it is compiled for: a symbol that
// two ISAs shared would be merged by the linker and could run AVX-512 code on a CPU without it.
#pragma once

#include "isa.h"

#if !defined(PYCONV_ISA) || !defined(PYCONV_ISA_NAMESPACE)
#error "PYCONV_ISA (scalar, avx2, ...) and PYCONV_ISA_NAMESPACE are set by CMakeLists.txt for each ISA library"
#endif

namespace pyconv::cpu::PYCONV_ISA_NAMESPACE {

KernelList<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_kernels();
KernelList<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_kernels();
// The parts of the forward list's entry "winograd", and the entry of the list that takes over from it where results are
// not finite.
bool winograd_accepts(const ConvMaxPool2dForwardParams& params);
int64_t winograd_workspace_bytes(const ConvMaxPool2dForwardParams& params);
void winograd_run(const ConvMaxPool2dForwardParams& params);
const Kernel<ConvMaxPool2dForwardParams>& winograd_fallback(const ConvMaxPool2dForwardParams& params);
void bias_act_dropout_forward(const BiasActDropoutForwardParams& params);
void bias_act_dropout_backward(const BiasActDropoutBackwardParams& params);
int64_t dense_forward_workspace_bytes(const DenseForwardParams& params);
void dense_forward(const DenseForwardParams& params);
int64_t dense_backward_workspace_bytes(const DenseBackwardParams& params);
void dense_backward(const DenseBackwardParams& params);
void sgd_update(const SgdUpdateParams& params);
int64_t softmax_cross_entropy_workspace_bytes(const SoftmaxCrossEntropyParams& params);
void softmax_cross_entropy(const SoftmaxCrossEntropyParams& params);
int64_t random_distortion_workspace_bytes(const RandomDistortionParams& params);
void random_distortion(const RandomDistortionParams& params);

}  // namespace pyconv::cpu::PYCONV_ISA_NAMESPACE
