// conv_max_pool2d: schemas, autograd and the door to the kernels of the CPU and the GPU.
//
//   conv_max_pool2d            what users call. Its Autograd kernel chooses:
//     transform or forward-AD tangent  -> a composite of ATen operators, which is differentiable every way
//     nothing to differentiate         -> the inference kernel
//     otherwise                        -> ConvMaxPool2dFunction: the two operators below
//   _conv_max_pool2d_forward   output, argmax and what the activation's derivative needs
//   _conv_max_pool2d_backward  the gradients asked for
#include "conv_max_pool2d.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cstddef>
#include <limits>
#include <tuple>
#include <vector>

#include "activations.h"
#include "checks.h"
#include "cuda_device.h"
#include "door.h"
#include "params.h"
#include "transforms.h"

namespace pyconv {
namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;
using std::string_view;

#define PYCONV_CONV_PARAMETERS                                                                                     \
  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, IntArrayRef pool_size,            \
      IntArrayRef pool_stride, IntArrayRef pool_padding, IntArrayRef pool_dilation, bool ceil_mode,                \
      string_view activation
#define PYCONV_CONV_ARGUMENTS \
  stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode, activation

#define PYCONV_CONV_SCHEMA_ARGUMENTS                                                                        \
  "int[2] stride=1, int[4] padding=0, int[2] dilation=1, int groups=1, int[2] pool_size=2, "                \
  "int[2] pool_stride=[], int[2] pool_padding=0, int[2] pool_dilation=1, bool ceil_mode=False, "            \
  "str activation=\"none\""

// ---- Tensors in the kernels' terms -------------------------------------------------------------------------

bool is_channels_last(const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

// As conv2d chooses the layout of its output.
at::MemoryFormat output_format(const Tensor& input, const Tensor& weight) {
  return is_channels_last(input) || is_channels_last(weight) ? at::MemoryFormat::ChannelsLast
                                                             : at::MemoryFormat::Contiguous;
}

Strides4 strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

Tensor batched(const Tensor& t) { return t.dim() == 3 ? t.unsqueeze(0) : t; }
Tensor unbatched_like(const Tensor& t, const Tensor& model) { return model.dim() == 3 ? t.squeeze(0) : t; }

bool saves_output(Activation a) { return a == Activation::sigmoid || a == Activation::tanh; }

int64_t multiply_adds(const ConvMaxPool2dGeometry& g, int64_t positions) {
  return g.N * g.K * positions * (g.C / g.groups) * g.R * g.S;
}

// What torch's own convolutions ask on CUDA. The CPU's kernels have no use for it, but those of CUDA can be emulated
// behind its table.
bool allows_tf32(const Tensor& t) {
  return t.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
}

// ---- Kernels -----------------------------------------------------------------------------------------------

// What a forward writes. In training all three are defined, though pre_activation has no elements where the activation's
// derivative does not need it; at inference there is an output alone.
struct ForwardResults {
  Tensor output, argmax, pre_activation;
};

template <class Device>
ForwardResults empty_results(const ConvMaxPool2dGeometry& g, const Tensor& input, const Tensor& weight, bool training) {
  const int64_t sizes[] = {g.N, g.K, g.PH, g.PW}, none[] = {0};
  const auto options = input.options().memory_format(output_format(input, weight));
  ForwardResults results;
  results.output = Device::empty(sizes, options);
  if (training) {
    results.argmax = Device::empty(sizes, options.dtype(argmax_is_byte(g) ? at::kByte : at::kInt));
    results.pre_activation =
        saves_pre_activation(g.activation) ? Device::empty(sizes, options) : Device::empty(none, input.options());
  }
  return results;
}

// input is (N, C, H, W). All but the threads and the workspace, which are the device's to choose.
ConvMaxPool2dForwardParams forward_params(const ConvMaxPool2dGeometry& g, const Tensor& input, const Tensor& weight,
                                          const optional<Tensor>& bias, const ForwardResults& results) {
  ConvMaxPool2dForwardParams params{};
  params.geometry = g;
  params.dtype = kernel_dtype(input.scalar_type());
  params.input = input.const_data_ptr();
  params.input_strides = strides_of(input);
  params.weight = weight.const_data_ptr();
  params.weight_strides = strides_of(weight);
  if (bias.has_value()) {
    params.bias = bias->const_data_ptr();
    params.bias_stride = bias->stride(0);
  }
  params.output = results.output.mutable_data_ptr();
  params.output_strides = strides_of(results.output);
  if (results.argmax.defined()) {
    params.argmax = results.argmax.mutable_data_ptr();
    if (saves_pre_activation(g.activation)) params.pre_activation = results.pre_activation.mutable_data_ptr();
  }
  params.allow_tf32 = allows_tf32(input);
  return params;
}

// `t` with its channels side by side, where a kernel gathers it and one more pass over it is cheap beside that.
Tensor laid_out_for_vectors(const Tensor& t, int64_t groups, int64_t multiply_adds) {
  constexpr int64_t kMultiplyAddsPerElement = 64, kVectorBytes = 16;
  const bool vectors = t.size(1) / groups * t.element_size() % kVectorBytes == 0;
  return vectors && multiply_adds / kMultiplyAddsPerElement >= t.numel() ? t.contiguous(at::MemoryFormat::ChannelsLast)
                                                                         : t;
}

// From here on it is worth asking whether operands should lie otherwise.
constexpr int64_t kManyMultiplyAdds = int64_t(1) << 28;

int64_t forward_multiply_adds(const ConvMaxPool2dGeometry& g) { return multiply_adds(g, g.OH * g.OW); }

template <class Device>
ForwardResults run_forward(const Tensor& input_any_rank, const Tensor& weight, const optional<Tensor>& bias,
                           const ConvMaxPool2dArguments& arguments, bool training) {
  const ConvMaxPool2dGeometry g = checked_geometry(input_any_rank, weight, bias, arguments);
  const Tensor input = batched(input_any_rank);
  ForwardResults results = empty_results<Device>(g, input, weight, training);
  if (results.output.numel() > 0) {
    const Device device(input.device());
    const int64_t work = forward_multiply_adds(g);
    Tensor operand = input;
    ConvMaxPool2dForwardParams params = forward_params(g, operand, weight, bias, results);
    if (work >= kManyMultiplyAdds && device.gathers(params)) {
      operand = laid_out_for_vectors(input, g.groups, work);
      params = forward_params(g, operand, weight, bias, results);
    }
    params.threads = device.threads(work);
    device.run(params);
  }
  if (input_any_rank.dim() == 3) {
    for (Tensor* result : {&results.output, &results.argmax, &results.pre_activation}) {
      if (result->dim() == 4) *result = result->squeeze(0);
    }
  }
  return results;
}

template <class Device>
Tensor conv_max_pool2d_inference(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                 PYCONV_CONV_PARAMETERS) {
  return run_forward<Device>(input, weight, bias, {PYCONV_CONV_ARGUMENTS}, /*training=*/false).output;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> conv_max_pool2d_forward(const Tensor& input, const Tensor& weight,
                                                           const optional<Tensor>& bias, PYCONV_CONV_PARAMETERS) {
  auto [output, argmax, pre_activation] =
      run_forward<Device>(input, weight, bias, {PYCONV_CONV_ARGUMENTS}, /*training=*/true);
  return {std::move(output), std::move(argmax), std::move(pre_activation)};
}

struct Gradients {
  Tensor input, weight, bias;  // undefined where not wanted
};

template <class Device>
Gradients empty_gradients(const ConvMaxPool2dGeometry& g, const Tensor& input, const Tensor& weight,
                          const std::array<bool, 3>& wanted) {
  Gradients gradients;
  if (wanted[0]) {
    gradients.input = Device::empty(input.sizes(), input.options().memory_format(output_format(input, weight)));
  }
  if (wanted[1]) {
    // What empty_like would do, without its two more dispatches where it can.
    gradients.weight = weight.is_contiguous() ? Device::empty(weight.sizes(), weight.options()) : at::empty_like(weight);
  }
  if (wanted[2]) {
    const int64_t sizes[] = {g.K};
    gradients.bias = Device::empty(sizes, weight.options());
  }
  return gradients;
}

// input is (N, C, H, W); grad_output, argmax and saved, which may be undefined, share their layout. All but the threads
// and the workspace.
ConvMaxPool2dBackwardParams backward_params(const ConvMaxPool2dGeometry& g, const Tensor& grad_output,
                                            const Tensor& argmax, const Tensor& saved, const Tensor& input,
                                            const Tensor& weight, const Gradients& gradients) {
  ConvMaxPool2dBackwardParams params{};
  params.geometry = g;
  params.dtype = kernel_dtype(input.scalar_type());
  params.grad_output = grad_output.const_data_ptr();
  params.argmax = argmax.const_data_ptr();
  if (saved.defined()) params.saved = saved.const_data_ptr();
  params.output_strides = strides_of(argmax);
  params.input = input.const_data_ptr();
  params.input_strides = strides_of(input);
  params.weight = weight.const_data_ptr();
  params.weight_strides = strides_of(weight);
  if (gradients.input.defined()) {
    params.grad_input = gradients.input.mutable_data_ptr();
    params.grad_input_strides = strides_of(gradients.input);
  }
  if (gradients.weight.defined()) {
    params.grad_weight = gradients.weight.mutable_data_ptr();
    params.grad_weight_strides = strides_of(gradients.weight);
  }
  if (gradients.bias.defined()) params.grad_bias = gradients.bias.mutable_data_ptr();
  params.allow_tf32 = allows_tf32(input);
  return params;
}

// At most: windows that pass no gradient on are skipped.
int64_t backward_multiply_adds(const ConvMaxPool2dGeometry& g, const std::array<bool, 3>& wanted) {
  return multiply_adds(g, g.PH * g.PW) * (int64_t(wanted[0]) + int64_t(wanted[1]));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> conv_max_pool2d_backward(
    const Tensor& grad_output, const Tensor& input_any_rank, const Tensor& weight, const Tensor& argmax,
    const Tensor& saved, PYCONV_CONV_PARAMETERS, std::array<bool, 3> output_mask) {
  const ConvMaxPool2dArguments arguments{PYCONV_CONV_ARGUMENTS};
  const ConvMaxPool2dGeometry g = checked_geometry(input_any_rank, weight, std::nullopt, arguments);
  const Tensor input = batched(input_any_rank);
  const int64_t sizes[] = {g.N, g.K, g.PH, g.PW};
  const bool needs_saved = saves_output(g.activation) || saves_pre_activation(g.activation);
  const auto check_like_output = [&](const Tensor& t, const char* name, at::ScalarType type) {
    TORCH_CHECK(batched(t).sizes() == IntArrayRef(sizes) && t.scalar_type() == type && t.device() == input.device(),
                "conv_max_pool2d backward: expected ", name, " of size ", IntArrayRef(sizes), ", ", type, " on ",
                input.device(), ", but got ", t.sizes(), ", ", t.scalar_type(), " on ", t.device());
  };
  check_like_output(grad_output, "grad_output", input.scalar_type());
  check_like_output(argmax, "argmax", argmax_is_byte(g) ? at::kByte : at::kInt);
  if (needs_saved) check_like_output(saved, "saved", input.scalar_type());

  Gradients gradients = empty_gradients<Device>(g, input, weight, output_mask);

  // All three share the layout of the argmax.
  Tensor dense_argmax = batched(argmax).contiguous(output_format(batched(argmax), batched(argmax)));
  const auto argmax_format = output_format(dense_argmax, dense_argmax);
  Tensor dense_grad = batched(grad_output).contiguous(argmax_format);
  Tensor dense_saved = needs_saved ? batched(saved).contiguous(argmax_format) : Tensor();

  if (g.N == 0) {
    if (output_mask[1]) gradients.weight.zero_();
    if (output_mask[2]) gradients.bias.zero_();
  } else {
    const Device device(input.device());
    const int64_t work = backward_multiply_adds(g, output_mask);
    Tensor operand = input;
    const auto params_of_operands = [&] {
      return backward_params(g, dense_grad, dense_argmax, dense_saved, operand, weight, gradients);
    };
    ConvMaxPool2dBackwardParams params = params_of_operands();
    if (work >= kManyMultiplyAdds && device.gathers(params)) {
      if (output_mask[1]) operand = laid_out_for_vectors(input, g.groups, work);
      dense_grad = laid_out_for_vectors(dense_grad, g.groups, work);
      const auto format = output_format(dense_grad, dense_grad);
      dense_argmax = dense_argmax.contiguous(format);
      if (needs_saved) dense_saved = dense_saved.contiguous(format);
      params = params_of_operands();
    }
    params.threads = device.threads(work);
    device.run(params);
  }
  if (output_mask[0] && input_any_rank.dim() == 3) gradients.input = gradients.input.squeeze(0);
  return {std::move(gradients.input), std::move(gradients.weight), std::move(gradients.bias)};
}

// ---- Composites of ATen operators --------------------------------------------------------------------------

// Whether window p of a pooled axis holds a convolution output at all; pool_dilation can step over a short axis.
bool window_has_position(int64_t p, int64_t window, int64_t stride, int64_t padding, int64_t dilation, int64_t size) {
  for (int64_t i = 0; i < window; ++i) {
    const int64_t position = p * stride - padding + i * dilation;
    if (position >= 0 && position < size) return true;
  }
  return false;
}

// (PH, PW) mask of the windows that hold a position; undefined where all do. Made by ATen operators, not by writing to
// memory: under a functorch transform even a new tensor is a wrapper.
Tensor valid_windows(const ConvMaxPool2dGeometry& g, const Tensor& like) {
  bool all = true;
  for (int64_t p = 0; p < g.PH; ++p) {
    all = all && window_has_position(p, g.pool_h, g.pool_stride_h, g.pool_pad_h, g.pool_dilation_h, g.OH);
  }
  for (int64_t p = 0; p < g.PW; ++p) {
    all = all && window_has_position(p, g.pool_w, g.pool_stride_w, g.pool_pad_w, g.pool_dilation_w, g.OW);
  }
  if (all) return Tensor();
  const auto longs = like.options().dtype(at::kLong);
  const auto axis = [&](int64_t count, int64_t window, int64_t stride, int64_t padding, int64_t dilation, int64_t size) {
    const Tensor position =
        (at::arange(count, longs) * stride - padding).unsqueeze(1) + at::arange(window, longs) * dilation;
    return position.ge(0).logical_and(position.lt(size)).any(1);
  };
  const Tensor rows = axis(g.PH, g.pool_h, g.pool_stride_h, g.pool_pad_h, g.pool_dilation_h, g.OH);
  const Tensor columns = axis(g.PW, g.pool_w, g.pool_stride_w, g.pool_pad_w, g.pool_dilation_w, g.OW);
  return rows.unsqueeze(1).logical_and(columns.unsqueeze(0));
}

// activation(max_pool2d(conv2d(input, weight)) + bias). The bias is added apart: conv2d with a bias fails under vmap
// over the weight.
Tensor composite(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                 const ConvMaxPool2dArguments& a) {
  const ConvMaxPool2dGeometry g = checked_geometry(input, weight, bias, a);
  Tensor y = aten_conv2d(input, weight, a);
  const auto with_bias = [&](const Tensor& t) { return bias.has_value() ? t + bias->view({-1, 1, 1}) : t; };
  const Tensor valid = valid_windows(g, input);
  if (!valid.defined()) {
    y = at::max_pool2d(y, a.pool_size, a.pool_stride, a.pool_padding, a.pool_dilation, a.ceil_mode);
    return aten_activation(with_bias(y), g.activation);
  }
  // max_pool2d's backward writes out of bounds for a window without a position. Padding with -inf by hand gives every
  // window one; what it sends to the padding is dropped, and the bias gets nothing from such a window either.
  const auto far_side = [](int64_t count, int64_t stride, int64_t window, int64_t dilation, int64_t padding,
                           int64_t size) {
    return std::max<int64_t>(0, (count - 1) * stride + (window - 1) * dilation + 1 - padding - size);
  };
  const double infinity = std::numeric_limits<double>::infinity();
  const int64_t sides[] = {
      g.pool_pad_w, far_side(g.PW, g.pool_stride_w, g.pool_w, g.pool_dilation_w, g.pool_pad_w, g.OW),
      g.pool_pad_h, far_side(g.PH, g.pool_stride_h, g.pool_h, g.pool_dilation_h, g.pool_pad_h, g.OH)};
  const int64_t none[] = {0, 0};
  y = at::max_pool2d(at::constant_pad_nd(y, sides, -infinity), a.pool_size, a.pool_stride, none, a.pool_dilation);
  y = y.narrow(-2, 0, g.PH).narrow(-1, 0, g.PW);
  y = at::where(valid, with_bias(y), at::scalar_tensor(-infinity, y.options()));
  return aten_activation(y, g.activation);
}

// The same function with the winners given instead of searched: its derivatives, of any order, are those of what the
// kernel computed, also where another summation order would have chosen another of two nearly equal maxima.
Tensor composite_given_argmax(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& argmax_any_rank,
                              const ConvMaxPool2dGeometry& g, const ConvMaxPool2dArguments& a) {
  const Tensor conv = aten_conv2d(batched(input), weight, a);
  const Tensor argmax = batched(argmax_any_rank).to(at::kLong);
  const Tensor live = argmax.ne(argmax_is_byte(g) ? kNoGradientByte : kNoGradientInt32);
  const Tensor position = at::where(live, argmax, at::zeros_like(argmax));
  const auto longs = argmax.options();
  const Tensor row = position.floor_divide(g.pool_w) * g.pool_dilation_h +
                     (at::arange(g.PH, longs) * g.pool_stride_h - g.pool_pad_h).unsqueeze(1);
  const Tensor column =
      position.remainder(g.pool_w) * g.pool_dilation_w + (at::arange(g.PW, longs) * g.pool_stride_w - g.pool_pad_w);
  const Tensor index = at::where(live, row * g.OW + column, at::zeros_like(argmax));
  Tensor y = conv.flatten(2).gather(2, index.flatten(2)).view_as(index) + bias.view({-1, 1, 1});
  // Live windows of relu have a positive or NaN pre-activation: there relu is the identity.
  if (g.activation != Activation::relu) y = aten_activation(y, g.activation);
  return unbatched_like(at::where(live, y, at::zeros_like(y)), input);
}

// ---- Autograd ----------------------------------------------------------------------------------------------

using ForwardSchema = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const optional<Tensor>&,
                                                         PYCONV_CONV_PARAMETERS);
using BackwardSchema = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                          const Tensor&, PYCONV_CONV_PARAMETERS, std::array<bool, 3>);
using PublicSchema = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, PYCONV_CONV_PARAMETERS);

const auto& public_operator() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("pyconv::conv_max_pool2d", "")
                                 .typed<PublicSchema>();
  return handle;
}
const auto& forward_operator() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("pyconv::_conv_max_pool2d_forward", "")
                                 .typed<ForwardSchema>();
  return handle;
}
const auto& backward_operator() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("pyconv::_conv_max_pool2d_backward", "")
                                 .typed<BackwardSchema>();
  return handle;
}

// The non-tensor arguments as one list of integers, which a node of the graph can keep.
constexpr size_t kPackedHasBias = 19;
std::vector<int64_t> packed(const ConvMaxPool2dArguments& a, bool has_bias) {
  std::vector<int64_t> values;
  values.reserve(kPackedHasBias + 1);
  for (IntArrayRef list :
       {a.stride, a.padding, a.dilation, a.pool_size, a.effective_pool_stride(), a.pool_padding, a.pool_dilation}) {
    values.insert(values.end(), list.begin(), list.end());
  }
  values.push_back(a.groups);
  values.push_back(a.ceil_mode);
  values.push_back(static_cast<int64_t>(parse_activation(a.activation)));
  values.push_back(has_bias);
  return values;
}

// Views into `values`, which must outlive the result.
ConvMaxPool2dArguments unpacked(const std::vector<int64_t>& values) {
  const auto list = [&](size_t begin, size_t length) { return IntArrayRef(values.data() + begin, length); };
  return {list(0, 2),
          list(2, 4),
          list(6, 2),
          values[16],
          list(8, 2),
          list(10, 2),
          list(12, 2),
          list(14, 2),
          values[17] != 0,
          kActivationNames[values[18]]};
}

class ConvMaxPool2dFunction : public torch::autograd::Function<ConvMaxPool2dFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const optional<Tensor>& bias, const ConvMaxPool2dArguments& a) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, argmax, saved] = forward_operator().call(input, weight, bias, a.stride, a.padding, a.dilation,
                                                           a.groups, a.pool_size, a.pool_stride, a.pool_padding,
                                                           a.pool_dilation, a.ceil_mode, a.activation);
    const Activation activation = parse_activation(a.activation);
    const bool smooth = saves_output(activation) || saves_pre_activation(activation);
    // A double backward of a smooth activation recomputes the pre-activation, so it needs the bias too.
    ctx->save_for_backward({input, weight, argmax, saves_output(activation) ? output : smooth ? saved : Tensor(),
                            smooth && bias.has_value() ? *bias : Tensor()});
    ctx->saved_data["arguments"] = packed(a, bias.has_value());
    ctx->set_materialize_grads(false);
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const Tensor& grad_output = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &argmax = saved[2], &extra = saved[3], &bias = saved[4];
    const std::vector<int64_t> values = ctx->saved_data["arguments"].toIntVector();
    const ConvMaxPool2dArguments a = unpacked(values);
    // Without a bias the node has no third edge to ask about.
    const bool has_bias = values[kPackedHasBias] != 0;
    const std::array<bool, 3> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                        has_bias && ctx->needs_input_grad(2)};
    Tensor grad_input, grad_weight, grad_bias;
    if (!grad_output.defined()) {
      // Nothing flows in.
    } else if (at::GradMode::is_enabled() || transform_is_active() || has_tangent(grad_output)) {
      std::tie(grad_input, grad_weight, grad_bias) =
          differentiable_backward(grad_output, input, weight, bias, argmax, a, wanted);
    } else {
      // Below autograd: its fallback for this operator is boxed, which costs microseconds, and has nothing to do here.
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      // none and relu have nothing saved beside the argmax, and the operator reads nothing else.
      std::tie(grad_input, grad_weight, grad_bias) = backward_operator().call(
          grad_output, input, weight, argmax, extra.defined() ? extra : argmax, a.stride, a.padding, a.dilation,
          a.groups, a.pool_size, a.pool_stride, a.pool_padding, a.pool_dilation, a.ceil_mode, a.activation, wanted);
    }
    return {grad_input, grad_weight, grad_bias, Tensor()};
  }

 private:
  // Under create_graph, forward AD or a transform (is_grads_batched) the gradients must themselves be differentiable or
  // batched, which the raw kernel's are not.
  static std::tuple<Tensor, Tensor, Tensor> differentiable_backward(const Tensor& grad_output, const Tensor& input,
                                                                    const Tensor& weight, const Tensor& saved_bias,
                                                                    const Tensor& argmax,
                                                                    const ConvMaxPool2dArguments& a,
                                                                    const std::array<bool, 3>& wanted) {
    const ConvMaxPool2dGeometry g = checked_geometry(input, weight, std::nullopt, a);
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode with_graph(true);
    // none and relu do not save the bias: their gradients do not depend on its value.
    Tensor bias = saved_bias.defined() ? saved_bias : at::zeros({g.K}, weight.options());
    if (wanted[2] && !bias.requires_grad()) bias.requires_grad_();
    // Differentiated at aliases: where one operand was computed from another (tied weights), the gradient must not also
    // walk from one to the other through their history, which is the outer engine's to do.
    const Tensor candidates[] = {input.view_as(input), weight.view_as(weight), bias.view_as(bias)};
    const Tensor output = composite_given_argmax(candidates[0], candidates[1], candidates[2], argmax, g, a);
    torch::autograd::variable_list inputs;
    for (int i = 0; i < 3; ++i) {
      if (wanted[i]) inputs.push_back(candidates[i]);
    }
    const auto found = torch::autograd::grad({output}, inputs, {grad_output}, /*retain_graph=*/std::nullopt,
                                             create_graph);
    Tensor gradients[3];
    for (int i = 0, next = 0; i < 3; ++i) {
      if (wanted[i]) gradients[i] = found[next++];
    }
    return {gradients[0], gradients[1], gradients[2]};
  }
};

Tensor conv_max_pool2d_autograd(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                PYCONV_CONV_PARAMETERS) {
  const ConvMaxPool2dArguments a{PYCONV_CONV_ARGUMENTS};
  if (transform_is_active() || has_tangent(input) || has_tangent(weight) || (bias.has_value() && has_tangent(*bias))) {
    return composite(input, weight, bias, a);
  }
  const bool differentiable =
      at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (bias.has_value() && bias->requires_grad()));
  if (!differentiable) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return public_operator().call(input, weight, bias, PYCONV_CONV_ARGUMENTS);
  }
  return ConvMaxPool2dFunction::apply(input, weight, bias, a);
}

Tensor conv_max_pool2d_batched(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                               PYCONV_CONV_PARAMETERS) {
  return composite(input, weight, bias, {PYCONV_CONV_ARGUMENTS});
}

// As conv2d: everything in the lower precision.
template <c10::DispatchKey key, c10::DeviceType device>
Tensor conv_max_pool2d_autocast(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                                PYCONV_CONV_PARAMETERS) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  return public_operator().call(at::autocast::cached_cast(type, input, device),
                                at::autocast::cached_cast(type, weight, device),
                                at::autocast::cached_cast(type, bias, device), PYCONV_CONV_ARGUMENTS);
}

}  // namespace

Tensor conv_max_pool2d(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, PYCONV_CONV_PARAMETERS) {
  return public_operator().call(input, weight, bias, PYCONV_CONV_ARGUMENTS);
}

// ---- A call in words ---------------------------------------------------------------------------------------

namespace {

// Tensors that have strides and no memory.
struct MetaDevice {
  static Tensor empty(IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }
};

}  // namespace

ConvMaxPool2dPlan plan_conv_max_pool2d(IntArrayRef input_size, IntArrayRef weight_size, at::ScalarType dtype,
                                       at::MemoryFormat format, PYCONV_CONV_PARAMETERS) {
  const ConvMaxPool2dArguments arguments{PYCONV_CONV_ARGUMENTS};
  const auto options = at::TensorOptions(at::kMeta).dtype(dtype);
  const auto laid_out = [&](IntArrayRef size) {
    return at::empty(size, size.size() == 4 ? options.memory_format(format) : options);
  };
  const Tensor input_any_rank = laid_out(input_size), weight = laid_out(weight_size);
  // The shape functions of meta tensors refuse less than the CPU's operators, which see a single element here.
  const Tensor element = at::empty({1}, at::TensorOptions(at::kCPU).dtype(dtype));
  ConvMaxPool2dPlan plan{};
  plan.geometry = checked_geometry(element.expand(input_size), element.expand(weight_size), std::nullopt, arguments);
  const ConvMaxPool2dGeometry& g = plan.geometry;
  const Tensor input = batched(input_any_rank);
  const Tensor bias = laid_out({g.K});

  static std::byte somewhere alignas(64)[64];  // as aligned as torch's memory
  const auto forward = [&](bool training) {
    const ForwardResults results = empty_results<MetaDevice>(g, input, weight, training);
    ConvMaxPool2dForwardParams params = forward_params(g, input, weight, bias, results);
    params.input = params.weight = params.bias = params.output = somewhere;
    if (training) params.argmax = somewhere;
    if (training && saves_pre_activation(g.activation)) params.pre_activation = somewhere;
    params.threads = threads_for(forward_multiply_adds(g));
    return params;
  };
  plan.inference = forward(false);
  plan.training = forward(true);

  const ForwardResults results = empty_results<MetaDevice>(g, input, weight, /*training=*/true);
  const auto backward = [&](const std::array<bool, 3>& wanted) {
    const Gradients gradients = empty_gradients<MetaDevice>(g, input, weight, wanted);
    ConvMaxPool2dBackwardParams params =
        backward_params(g, results.output, results.argmax, Tensor(), input, weight, gradients);
    params.grad_output = params.argmax = params.input = params.weight = somewhere;
    if (saves_output(g.activation) || saves_pre_activation(g.activation)) params.saved = somewhere;
    if (wanted[0]) params.grad_input = somewhere;
    if (wanted[1]) params.grad_weight = somewhere;
    if (wanted[2]) params.grad_bias = somewhere;
    params.threads = threads_for(backward_multiply_adds(g, wanted));
    return params;
  };
  plan.backward = backward({true, true, true});
  plan.backward_of_parameters = backward({false, true, true});
  return plan;
}

namespace {

template <class Device>
void register_kernels(torch::Library& m) {
  m.impl("conv_max_pool2d", &conv_max_pool2d_inference<Device>);
  m.impl("_conv_max_pool2d_forward", &conv_max_pool2d_forward<Device>);
  m.impl("_conv_max_pool2d_backward", &conv_max_pool2d_backward<Device>);
}

}  // namespace
}  // namespace pyconv

TORCH_LIBRARY(pyconv, m) {
  m.def("conv_max_pool2d(Tensor input, Tensor weight, Tensor? bias=None, " PYCONV_CONV_SCHEMA_ARGUMENTS ") -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("_conv_max_pool2d_forward(Tensor input, Tensor weight, Tensor? bias=None, " PYCONV_CONV_SCHEMA_ARGUMENTS
        ") -> (Tensor output, Tensor argmax, Tensor saved)",
        {at::Tag::pt2_compliant_tag});
  m.def("_conv_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor argmax, Tensor saved, "
        "int[2] stride, int[4] padding, int[2] dilation, int groups, int[2] pool_size, int[2] pool_stride, "
        "int[2] pool_padding, int[2] pool_dilation, bool ceil_mode, str activation, bool[3] output_mask) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pyconv, CPU, m) { pyconv::register_kernels<pyconv::CpuDevice>(m); }

#ifdef PYCONV_WITH_CUDA
TORCH_LIBRARY_IMPL(pyconv, CUDA, m) { pyconv::register_kernels<pyconv::CudaDevice>(m); }
#else
TORCH_LIBRARY_IMPL(pyconv, CUDA, m) {
  for (const char* name : {"conv_max_pool2d", "_conv_max_pool2d_forward", "_conv_max_pool2d_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&pyconv::built_without_cuda>());
  }
}
#endif

TORCH_LIBRARY_IMPL(pyconv, Autograd, m) {
  m.impl("conv_max_pool2d", &pyconv::conv_max_pool2d_autograd);
  m.impl("_conv_max_pool2d_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_conv_max_pool2d_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(pyconv, FuncTorchBatched, m) { m.impl("conv_max_pool2d", &pyconv::conv_max_pool2d_batched); }

TORCH_LIBRARY_IMPL(pyconv, AutocastCPU, m) {
  m.impl("conv_max_pool2d", &pyconv::conv_max_pool2d_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}

TORCH_LIBRARY_IMPL(pyconv, AutocastCUDA, m) {
  m.impl("conv_max_pool2d", &pyconv::conv_max_pool2d_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}
