// What each .cu file provides to the table.
#pragma once

#include "kernel_table.h"

namespace pyconv::cuda {

// conv_max_pool2d_forward_*.cu, conv_max_pool2d_backward_*.cu: one entry each, or one per kernel in the file.
extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_tensor_core;
extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_direct;
extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_float32;
extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_generic;
extern const Kernel<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_tensor_core;
extern const Kernel<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_float32;
extern const Kernel<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_generic;

// bias_act_dropout.cu
int bias_act_dropout_forward(const BiasActDropoutForwardParams& params, Stream stream);
int64_t bias_act_dropout_backward_workspace_bytes(const BiasActDropoutBackwardParams& params);
int bias_act_dropout_backward(const BiasActDropoutBackwardParams& params, Stream stream);
int dropout_state(const PhiloxState& philox, int64_t* state, Stream stream);

}  // namespace pyconv::cuda
