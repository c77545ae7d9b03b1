// The one place where conv_max_pool2d's tensors and arguments are checked and turned into a geometry.
//
// The checks here only decide. Where one fails, the torch operator that states the same rule is called and raises in
// its own words; a message of ours is the fallback.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d.h>

#include <limits>
#include <optional>

#include "door.h"

namespace pyconv {

// The non-tensor arguments of conv_max_pool2d, as the schema passes them.
struct ConvMaxPool2dArguments {
  at::IntArrayRef stride;
  at::IntArrayRef padding;  // top, bottom, left, right
  at::IntArrayRef dilation;
  int64_t groups;
  at::IntArrayRef pool_size;
  at::IntArrayRef pool_stride;  // empty: pool_size
  at::IntArrayRef pool_padding;
  at::IntArrayRef pool_dilation;
  bool ceil_mode;
  std::string_view activation;

  at::IntArrayRef effective_pool_stride() const { return pool_stride.empty() ? pool_size : pool_stride; }
};

inline void check_lengths(const ConvMaxPool2dArguments& a) {
  const auto expect = [](at::IntArrayRef values, const char* name, size_t length) {
    TORCH_CHECK(values.size() == length, "conv_max_pool2d: expected ", name, " of ", length, " integers, but got ",
                values);
  };
  expect(a.stride, "stride", 2);
  expect(a.padding, "padding", 4);
  expect(a.dilation, "dilation", 2);
  expect(a.pool_size, "pool_size", 2);
  if (!a.pool_stride.empty()) expect(a.pool_stride, "pool_stride", 2);
  expect(a.pool_padding, "pool_padding", 2);
  expect(a.pool_dilation, "pool_dilation", 2);
}

// conv2d with top, bottom, left, right padding; no bias.
inline at::Tensor aten_conv2d(const at::Tensor& input, const at::Tensor& weight, const ConvMaxPool2dArguments& a) {
  const auto& p = a.padding;
  if (p[0] == p[1] && p[2] == p[3]) {
    const int64_t padding[] = {p[0], p[2]};
    return at::conv2d(input, weight, {}, a.stride, padding, a.dilation, a.groups);
  }
  const int64_t sides[] = {p[2], p[3], p[0], p[1]};
  const int64_t none[] = {0, 0};
  return at::conv2d(at::constant_pad_nd(input, sides), weight, {}, a.stride, none, a.dilation, a.groups);
}

// Extents and their products follow from here in 64 bits, which must not overflow: no memory holds the input that these
// arguments describe, and torch's own arithmetic overflows as well.
inline void check_magnitudes(const at::Tensor& input, const at::Tensor& weight, const ConvMaxPool2dArguments& a) {
  constexpr double kMost = 0x1p44;
  double padded = static_cast<double>(input.size(-3));
  bool good = true;
  for (int d = 0; d < 2; ++d) {
    padded *= static_cast<double>(input.size(d - 2)) + static_cast<double>(a.padding[2 * d]) +
              static_cast<double>(a.padding[2 * d + 1]);
    good = good && static_cast<double>(weight.size(d - 2) - 1) * static_cast<double>(a.dilation[d]) <= kMost;
    // An empty axis hides neither the padding nor the other axis.
    for (int side = 0; side < 2; ++side) good = good && static_cast<double>(a.padding[2 * d + side]) <= kMost;
  }
  TORCH_CHECK(good && padded <= kMost, "conv_max_pool2d: expected a padded input and a dilated filter of less than 2**44 "
              "elements, but got input of size ", input.sizes(), ", weight of size ", weight.sizes(),
              ", padding (top, bottom, left, right) ", a.padding, " and dilation ", a.dilation);
}

inline void check_conv(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const ConvMaxPool2dArguments& a) {
  const auto positive = [](at::IntArrayRef v) { return v[0] > 0 && v[1] > 0; };
  bool good = (input.dim() == 3 || input.dim() == 4) && weight.dim() == 4 && positive(a.stride) &&
              positive(a.dilation) && a.groups > 0;
  for (int64_t side : a.padding) good = good && side >= 0;
  if (good) {
    check_magnitudes(input, weight, a);
    const int64_t C = input.size(-3), K = weight.size(0), R = weight.size(2), S = weight.size(3);
    good = K > 0 && R > 0 && S > 0 && C > 0 && K % a.groups == 0 && C == weight.size(1) * a.groups &&
           input.size(-2) + a.padding[0] + a.padding[1] >= (R - 1) * a.dilation[0] + 1 &&
           input.size(-1) + a.padding[2] + a.padding[3] >= (S - 1) * a.dilation[1] + 1;
    if (bias.has_value()) good = good && bias->dim() == 1 && bias->size(0) == K;
  }
  const auto same_type = [&](const at::Tensor& t) {
    return t.scalar_type() == input.scalar_type() && t.device() == input.device() && t.layout() == at::kStrided;
  };
  good = good && same_type(input) && same_type(weight) && (!bias.has_value() || same_type(*bias));
  if (good) return;

  at::NoGradGuard no_grad;
  const bool symmetric = a.padding[0] == a.padding[1] && a.padding[2] == a.padding[3];
  if (symmetric || (input.dim() != 3 && input.dim() != 4)) {
    const int64_t padding[] = {a.padding[0], a.padding[2]};
    at::conv2d(input, weight, bias, a.stride, padding, a.dilation, a.groups);
  } else {
    aten_conv2d(input, weight, a);
    const int64_t none[] = {0, 0};
    const int64_t sides[] = {a.padding[2], a.padding[3], a.padding[0], a.padding[1]};
    at::conv2d(at::constant_pad_nd(input, sides), weight, bias, a.stride, none, a.dilation, a.groups);
  }
  TORCH_CHECK(input.size(-3) > 0 && weight.size(0) > 0,
              "conv_max_pool2d: expected at least one input and one output channel, but got input of size ",
              input.sizes(), " and weight of size ", weight.sizes());
  TORCH_CHECK(false, "conv_max_pool2d: unsupported arguments: input of size ", input.sizes(), " (", input.scalar_type(),
              ", ", input.device(), "), weight of size ", weight.sizes(), " (", weight.scalar_type(), ", ",
              weight.device(), "), stride ", a.stride, ", padding (top, bottom, left, right) ", a.padding,
              ", dilation ", a.dilation, ", groups ", a.groups);
}

// torch's rule: with ceil_mode the last window must start inside the input or the leading padding.
inline int64_t pooled_size(int64_t size, int64_t window, int64_t stride, int64_t padding, int64_t dilation,
                           bool ceil_mode) {
  const int64_t span = size + 2 * padding - dilation * (window - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  if (span < 0) return 0;
  int64_t count = span / stride + 1;
  if (ceil_mode && (count - 1) * stride >= size + padding) --count;
  return count;
}

inline ConvMaxPool2dGeometry checked_geometry(const at::Tensor& input, const at::Tensor& weight,
                                              const std::optional<at::Tensor>& bias,
                                              const ConvMaxPool2dArguments& a) {
  check_lengths(a);
  ConvMaxPool2dGeometry g{};
  g.activation = parse_activation(a.activation);
  check_conv(input, weight, bias, a);
  g.N = input.dim() == 3 ? 1 : input.size(0);
  g.C = input.size(-3);
  g.H = input.size(-2);
  g.W = input.size(-1);
  g.K = weight.size(0);
  g.R = weight.size(2);
  g.S = weight.size(3);
  g.groups = a.groups;
  g.stride_h = a.stride[0];
  g.stride_w = a.stride[1];
  g.pad_top = a.padding[0];
  g.pad_left = a.padding[2];
  g.dilation_h = a.dilation[0];
  g.dilation_w = a.dilation[1];
  g.OH = (g.H + a.padding[0] + a.padding[1] - g.dilation_h * (g.R - 1) - 1) / g.stride_h + 1;
  g.OW = (g.W + a.padding[2] + a.padding[3] - g.dilation_w * (g.S - 1) - 1) / g.stride_w + 1;

  const auto pool_stride = a.effective_pool_stride();
  bool good = true;
  for (int d = 0; d < 2; ++d) {
    for (int64_t value : {a.pool_size[d], pool_stride[d], a.pool_padding[d], a.pool_dilation[d]}) {
      good = good && value <= std::numeric_limits<int32_t>::max();
    }
    good = good && a.pool_size[d] > 0 && pool_stride[d] > 0 && a.pool_dilation[d] > 0 && a.pool_padding[d] >= 0 &&
           a.pool_padding[d] <= a.pool_size[d] / 2;
  }
  if (good) {
    g.pool_h = a.pool_size[0];
    g.pool_w = a.pool_size[1];
    g.pool_stride_h = pool_stride[0];
    g.pool_stride_w = pool_stride[1];
    g.pool_pad_h = a.pool_padding[0];
    g.pool_pad_w = a.pool_padding[1];
    g.pool_dilation_h = a.pool_dilation[0];
    g.pool_dilation_w = a.pool_dilation[1];
    g.PH = pooled_size(g.OH, g.pool_h, g.pool_stride_h, g.pool_pad_h, g.pool_dilation_h, a.ceil_mode);
    g.PW = pooled_size(g.OW, g.pool_w, g.pool_stride_w, g.pool_pad_w, g.pool_dilation_w, a.ceil_mode);
    good = g.PH > 0 && g.PW > 0;
  }
  if (!good) {
    at::max_pool2d(at::empty({1, g.K, g.OH, g.OW}, at::TensorOptions().dtype(at::kFloat)), a.pool_size, a.pool_stride,
                   a.pool_padding, a.pool_dilation, a.ceil_mode);
    TORCH_CHECK(false, "conv_max_pool2d: unsupported pooling of a convolution output of size ", g.OH, " x ", g.OW,
                ": pool_size ", a.pool_size, ", pool_stride ", pool_stride, ", pool_padding ", a.pool_padding,
                ", pool_dilation ", a.pool_dilation);
  }
  TORCH_CHECK(g.pool_h * g.pool_w <= std::numeric_limits<int32_t>::max(), "conv_max_pool2d: expected a pool_size of at ",
              "most 2147483647 positions, but got ", a.pool_size);
  // The stride of an axis with one output is never taken; scratch memory must not follow it.
  if (g.OH == 1) g.stride_h = 1;
  if (g.OW == 1) g.stride_w = 1;
  if (g.PH == 1) g.pool_stride_h = 1;
  if (g.PW == 1) g.pool_stride_w = 1;
  return g;
}

}  // namespace pyconv
