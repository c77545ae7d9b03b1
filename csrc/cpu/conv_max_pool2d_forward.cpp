// Forward of conv_max_pool2d: the dispatch list. Compiled once per ISA.
#include "conv_max_pool2d_forward_direct.h"
#include "isa_kernels.h"

namespace pyconv::cpu {
namespace {

template <bool IN_REGISTERS>
int64_t workspace_bytes(const ConvMaxPool2dForwardParams& params) {
  return with_storage_type(params.dtype, [&](auto storage) {
    return Plan<Accumulator<decltype(storage)>>(params, IN_REGISTERS, 1).workspace_bytes();
  });
}

template <bool IN_REGISTERS>
void run(const ConvMaxPool2dForwardParams& params) {
  with_storage_type(params.dtype, [&](auto storage) {
    DirectForward<WidenedDirectOperands<decltype(storage)>>(params, IN_REGISTERS).run();
    return 0;
  });
}

const Kernel<ConvMaxPool2dForwardParams> kKernels[] = {
    {"winograd", "vectors, dilation 1, at most 9 taps a stride each way, a direct sum of 1.25 times the operations or more", false,
     PYCONV_ISA_NAMESPACE::winograd_accepts, PYCONV_ISA_NAMESPACE::winograd_workspace_bytes,
     PYCONV_ISA_NAMESPACE::winograd_run},
    {"direct_pool2x2", "2x2 pooling with stride 2, no pool padding, dilation or partial windows", true,
     [](const ConvMaxPool2dForwardParams& p) { return is_plain_2x2(p.geometry); }, workspace_bytes<true>, run<true>},
    {"generic", "every shape", true, [](const ConvMaxPool2dForwardParams&) { return true; }, workspace_bytes<false>,
     run<false>},
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

const Kernel<ConvMaxPool2dForwardParams>& winograd_fallback(const ConvMaxPool2dForwardParams& params) {
  return kKernels[is_plain_2x2(params.geometry) ? 1 : 2];
}

KernelList<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_kernels() {
  return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])};
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
