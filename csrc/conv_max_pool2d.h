#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace pyconv {

// The public operator through the dispatcher. padding: top, bottom, left, right; pool_stride may be empty
// (= pool_size).
at::Tensor conv_max_pool2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                           at::IntArrayRef pool_size, at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
                           at::IntArrayRef pool_dilation, bool ceil_mode, std::string_view activation);

}  // namespace pyconv
