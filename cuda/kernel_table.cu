// The ordered dispatch lists: the first entry that accepts wins.
#include "kernel_table.h"

#include "device.cuh"
#include "kernels.h"

namespace pyconv::cuda {

const KernelTable& kernel_table() {
  static const Kernel<ConvMaxPool2dForwardParams> forward[] = {
      conv_max_pool2d_forward_direct,
      conv_max_pool2d_forward_tensor_core,
      conv_max_pool2d_forward_float32,
      conv_max_pool2d_forward_generic,
  };
  static const Kernel<ConvMaxPool2dBackwardParams> backward[] = {
      conv_max_pool2d_backward_tensor_core,
      conv_max_pool2d_backward_float32,
      conv_max_pool2d_backward_generic,
  };
  static const KernelTable table = {
      {forward, sizeof(forward) / sizeof(forward[0])},
      {backward, sizeof(backward) / sizeof(backward[0])},
      bias_act_dropout_forward,
      bias_act_dropout_backward_workspace_bytes,
      bias_act_dropout_backward,
      dropout_state,
  };
  return table;
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pyconv::cuda
