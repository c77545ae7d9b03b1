#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "params.h"

namespace pyconv {

// The public operator through the dispatcher. padding: top, bottom, left, right; pool_stride may be empty
// (= pool_size).
at::Tensor conv_max_pool2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                           at::IntArrayRef pool_size, at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                           at::IntArrayRef pool_dilation, bool ceil_mode, std::string_view activation);

// What the CPU's kernels would be told of tensors of these sizes, for select_kernel(): nothing is allocated or run. Their
// pointers are null exactly where a real call's are, and point at nothing of use otherwise.
struct ConvMaxPool2dPlan {
  ConvMaxPool2dGeometry geometry;
  ConvMaxPool2dForwardParams inference, training;
  ConvMaxPool2dBackwardParams backward;
  ConvMaxPool2dBackwardParams backward_of_parameters;  // of a first layer, whose input needs no gradient
};

// input_size is (N, C, H, W) or (C, H, W); format is that of input and weight. Raises what a call would raise.
ConvMaxPool2dPlan plan_conv_max_pool2d(at::IntArrayRef input_size, at::IntArrayRef weight_size, at::ScalarType dtype,
                                       at::MemoryFormat format, at::IntArrayRef stride, at::IntArrayRef padding,
                                       at::IntArrayRef dilation, int64_t groups, at::IntArrayRef pool_size,
                                       at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                       at::IntArrayRef pool_dilation, bool ceil_mode, std::string_view activation);

}  // namespace pyconv
