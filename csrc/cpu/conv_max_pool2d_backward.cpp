// Backward of conv_max_pool2d: the dispatch list. Compiled once per ISA.
#include "conv_max_pool2d_backward_sparse.h"
#include "isa_kernels.h"

namespace pyconv::cpu {
namespace {

int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
  return params.dtype == DType::float64 ? Layout<double>(params, nullptr, 1).bytes
                                         : Layout<float>(params, nullptr, 1).bytes;
}

void run(const ConvMaxPool2dBackwardParams& params) {
  switch (params.dtype) {
    case DType::float32:
      return SparseBackward<WidenedOperands<float>>(params).run();
    case DType::float64:
      return SparseBackward<WidenedOperands<double>>(params).run();
    case DType::bfloat16:
      return SparseBackward<WidenedOperands<BFloat16>>(params).run();
    case DType::float16:
      return SparseBackward<WidenedOperands<Float16>>(params).run();
  }
}

const Kernel<ConvMaxPool2dBackwardParams> kKernels[] = {
    {"sparse", "every shape", true, [](const ConvMaxPool2dBackwardParams&) { return true; }, workspace_bytes, run},
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

KernelList<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_kernels() {
  return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])};
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
