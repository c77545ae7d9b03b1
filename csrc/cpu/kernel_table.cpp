// Compiled once per ISA: the one symbol that an ISA's object files export.
#include "isa.h"
#include "isa_kernels.h"

#define PYCONV_CONCAT_(a, b) a##b
#define PYCONV_CONCAT(a, b) PYCONV_CONCAT_(a, b)
#define PYCONV_STRING_(a) #a
#define PYCONV_STRING(a) PYCONV_STRING_(a)

namespace pyconv::cpu {

const KernelTable& PYCONV_CONCAT(kernel_table_, PYCONV_ISA)() {
  static const KernelTable table = {
      PYCONV_STRING(PYCONV_ISA),
      PYCONV_ISA_NAMESPACE::conv_max_pool2d_forward_kernels(),
      PYCONV_ISA_NAMESPACE::conv_max_pool2d_backward_kernels(),
      PYCONV_ISA_NAMESPACE::bias_act_dropout_forward,
      PYCONV_ISA_NAMESPACE::bias_act_dropout_backward,
      PYCONV_ISA_NAMESPACE::dense_forward_workspace_bytes,
      PYCONV_ISA_NAMESPACE::dense_forward,
      PYCONV_ISA_NAMESPACE::dense_backward_workspace_bytes,
      PYCONV_ISA_NAMESPACE::dense_backward,
      PYCONV_ISA_NAMESPACE::sgd_update,
      PYCONV_ISA_NAMESPACE::softmax_cross_entropy_workspace_bytes,
      PYCONV_ISA_NAMESPACE::softmax_cross_entropy,
      PYCONV_ISA_NAMESPACE::random_distortion_workspace_bytes,
      PYCONV_ISA_NAMESPACE::random_distortion,
  };
  return table;
}

}  // namespace pyconv::cpu
