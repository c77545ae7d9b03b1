// What each loop-nest file provides, in a namespace of its own for every ISA it is compiled for: a symbol that
// two ISAs shared would be merged by the linker and could run AVX-512 code on a CPU without it.
#pragma once

#include "isa.h"

#if !defined(PYCONV_ISA) || !defined(PYCONV_ISA_NAMESPACE)
#error "PYCONV_ISA (scalar, avx2, avx512) and PYCONV_ISA_NAMESPACE are set by CMakeLists.txt for each ISA library"
#endif

namespace pyconv::cpu::PYCONV_ISA_NAMESPACE {

KernelList<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_kernels();
KernelList<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_kernels();
void bias_act_dropout_forward(const BiasActDropoutForwardParams& params);
void bias_act_dropout_backward(const BiasActDropoutBackwardParams& params);

}  // namespace pyconv::cpu::PYCONV_ISA_NAMESPACE
