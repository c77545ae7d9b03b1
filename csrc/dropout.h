#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace pyconv {

// The public operators, for calls that need not pass through torch.ops.
at::Tensor dropout(const at::Tensor& input, double p, bool training, bool inverted,
                   std::optional<at::Generator> generator);
at::Tensor bias_act_dropout(const at::Tensor& input, const std::optional<at::Tensor>& bias,
                            std::string_view activation, double p, bool training, bool inverted,
                            std::optional<at::Generator> generator);

}  // namespace pyconv
