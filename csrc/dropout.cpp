// dropout and bias_act_dropout: schemas, random state, autograd and the door to the kernels of the CPU and the GPU.
//
//   dropout, bias_act_dropout    what users call: composites that check, draw a state and go on to
//   _bias_act_dropout            the same with the state as an argument. Its Autograd kernel chooses:
//     transform or forward-AD tangent  -> a composite of ATen operators, which is differentiable every way
//     nothing to differentiate         -> the inference kernel
//     otherwise                        -> BiasActDropoutFunction: the two operators below
//   _bias_act_dropout_forward    output, and the pre-activation where its derivative needs one of its own
//   _bias_act_dropout_backward   the gradients asked for
//   _dropout_state               draws a state, for traced graphs
//   _dropout_mask                the mask as a tensor, for the composites
//
// The state is an int64 tensor (seed, offset): 16 bytes, all that dropout saves. It is a tensor so that a
// traced graph draws a new one in every run; on a GPU, where it lies in device memory, so that each replay of a
// captured graph draws a new one too.
#include "dropout.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <mutex>
#include <numeric>
#include <tuple>
#include <vector>

#include "activations.h"
#include "cuda_device.h"
#include "door.h"
#include "kept_memory.h"
#include "params.h"
#include "transforms.h"

namespace pyconv {
namespace {

using at::Generator;
using at::Tensor;
using std::optional;
using std::string_view;

template <class Schema>
c10::TypedOperatorHandle<Schema> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// ---- Arguments ------------------------------------------------------------------------------------------

struct Plan {
  bool drop;     // draw a mask; p == 0 and p == 1 need none
  double scale;  // factor of a kept element, or of all where there is no mask
};

Plan plan_of(double p, bool training, bool inverted) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability p has to be between 0 and 1, but got ", p);
  if (!training) return {false, inverted ? 1.0 : 1.0 - p};
  if (p == 1) return {false, 0.0};
  return {p > 0, inverted ? 1.0 / (1.0 - p) : 1.0};
}

void check_operands(const Tensor& input, const optional<Tensor>& bias) {
  kernel_dtype(input.scalar_type());
  if (!bias.has_value()) return;
  TORCH_CHECK(input.dim() > 0 && bias->dim() == 1 && bias->sym_size(0) == input.sym_size(-1),
              "bias_act_dropout: expected bias of size [",
              input.dim() > 0 ? input.sym_size(-1) : c10::SymInt(1), "] for an input of size ",
              input.sym_sizes(), ", which must have a last dimension, but got bias of size ",
              bias->sym_sizes());
  TORCH_CHECK(bias->scalar_type() == input.scalar_type() && bias->device() == input.device(),
              "bias_act_dropout: expected input and bias to have the same dtype and device, but got input ",
              input.scalar_type(), " on ", input.device(), " and bias ", bias->scalar_type(), " on ",
              bias->device());
}

bool saves_output(Activation a) {
  return a == Activation::relu || a == Activation::sigmoid || a == Activation::tanh;
}

// ---- Random state ---------------------------------------------------------------------------------------

const auto kStateOptions = at::TensorOptions().dtype(at::kLong).device(at::kCPU);

// What a random number for `device` is made on: a GPU has a generator of its own.
at::TensorOptions state_options(c10::Device device) {
  return device.is_cuda() ? kStateOptions.device(device) : kStateOptions;
}

// Whether a tensor written by hand would escape a tracer.
bool is_traced() {
  return c10::impl::dispatch_mode_enabled() ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::Tracer);
}

// (seed, offset) for one call on the CPU: a new seed, offset 0.
Tensor draw_state_cpu(const optional<Generator>& generator) {
  auto* cpu_generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  Tensor state = at::empty({2}, kStateOptions);
  auto* words = state.mutable_data_ptr<int64_t>();
  {
    const std::lock_guard<std::mutex> lock(cpu_generator->mutex_);
    words[0] = static_cast<int64_t>(cpu_generator->random64());
  }
  words[1] = 0;
  return state;
}

Tensor draw_state_on(c10::Device device, const optional<Generator>& generator) {
  return device.is_cuda() ? draw_dropout_state_cuda(device, generator) : draw_state_cpu(generator);
}

Tensor dropout_state(const Tensor& distinct, optional<Generator> generator) {
  return draw_state_on(distinct.device(), generator);
}

const auto& state_operator() {
  static const auto handle =
      find_operator<Tensor(const Tensor&, optional<Generator>)>("pyconv::_dropout_state");
  return handle;
}

// The state of one call whose input is on `device`. On the CPU all three ways consume and give the same random
// number; on a GPU the first is another number than that of the other two.
Tensor draw_state(const optional<Generator>& generator, c10::Device device) {
  if (transform_is_active()) {
    // vmap batches, shares or refuses random numbers by its `randomness`, but only for operators it knows.
    // This one gives random64() + lowest on the CPU.
    constexpr int64_t lowest = std::numeric_limits<int64_t>::min();
    const auto options = state_options(device);
    const Tensor seed =
        at::randint(lowest, std::numeric_limits<int64_t>::max(), {1}, generator, options).bitwise_xor(lowest);
    return at::cat({seed, at::zeros({1}, options)});
  }
  if (is_traced()) {
    // The graph passes merge equal calls of an operator, random or not, unless it is one of ATen's; but they
    // take two uninitialised tensors for different, and so two draws.
    return state_operator().call(at::empty({0}, state_options(device)), generator);
  }
  return draw_state_on(device, generator);
}

// ---- Kernels --------------------------------------------------------------------------------------------

// A kernel takes tensors in logical order.
struct LogicalOutput {
  explicit LogicalOutput(Tensor wanted)
      : wanted(std::move(wanted)),
        logical(this->wanted.is_contiguous() ? this->wanted
                                             : at::empty(this->wanted.sizes(), this->wanted.options())) {}

  void finish() {
    if (!logical.is_same(wanted)) wanted.copy_(logical);
  }

  Tensor wanted, logical;
};

// The state for an input on a GPU lies there, or on the CPU if it was given as numbers.
void check_state(const Tensor& state, c10::Device device) {
  TORCH_CHECK((state.device().is_cpu() || state.device() == device) && state.scalar_type() == at::kLong &&
                  state.numel() == 2,
              "pyconv: expected a dropout state of 2 int64 on cpu or ", device, ", but got size ", state.sizes(), ", ",
              state.scalar_type(), " on ", state.device());
}

// The fields that both directions share; state: contiguous, or undefined for no mask.
template <class Params, class Device>
void set_common(Params& params, const Device& device, const Tensor& like, bool has_bias, const Tensor& state,
                Activation activation, double p, double scale) {
  params.columns = has_bias ? like.size(-1) : like.numel();
  params.rows = params.columns == 0 ? 0 : like.numel() / params.columns;
  params.dtype = kernel_dtype(like.scalar_type());
  params.activation = activation;
  params.p = p;
  params.scale = scale;
  params.drop = state.defined();
  if (params.drop) {
    check_state(state, like.device());
    TORCH_CHECK_VALUE(p > 0 && p < 1, "dropout probability p has to be between 0 and 1, exclusive, but got ",
                      p);
    const auto* words = state.const_data_ptr<int64_t>();
    if (state.device().is_cpu()) {
      params.seed = static_cast<uint64_t>(words[0]);
      params.offset = static_cast<uint64_t>(words[1]);
    } else {
      params.state = words;
    }
  }
  const bool smooth = activation != Activation::none && activation != Activation::relu;
  params.threads = device.threads(like.numel() * (smooth ? 30 : 12));
}

Tensor contiguous_or_undefined(const optional<Tensor>& t) { return t.has_value() ? t->contiguous() : Tensor(); }

template <class Device>
std::tuple<Tensor, Tensor> run_forward(const Tensor& input, const optional<Tensor>& bias,
                                       const optional<Tensor>& state, string_view activation_name, double p,
                                       double scale, bool training) {
  check_operands(input, bias);
  const Activation activation = parse_activation(activation_name);
  LogicalOutput output(empty_result_like(input));
  // Without a bias the pre-activation is the input.
  const bool writes_pre_activation = training && bias.has_value() && saves_pre_activation(activation);
  const Tensor pre_activation =
      writes_pre_activation ? at::empty(input.sizes(), input.options()) : at::empty({0}, input.options());
  if (input.numel() > 0) {
    const Device device(input.device());
    const Tensor logical_input = input.contiguous();
    const Tensor logical_bias = contiguous_or_undefined(bias);
    const Tensor logical_state = contiguous_or_undefined(state);
    BiasActDropoutForwardParams params{};
    set_common(params, device, input, bias.has_value(), logical_state, activation, p, scale);
    params.input = logical_input.const_data_ptr();
    if (bias.has_value()) params.bias = logical_bias.const_data_ptr();
    params.output = output.logical.mutable_data_ptr();
    if (writes_pre_activation) params.pre_activation = pre_activation.mutable_data_ptr();
    device.run(params);
    output.finish();
  }
  return {output.wanted, pre_activation};
}

template <class Device>
Tensor bias_act_dropout_inference(const Tensor& input, const optional<Tensor>& bias, const optional<Tensor>& state,
                                  string_view activation, double p, double scale) {
  return std::get<0>(run_forward<Device>(input, bias, state, activation, p, scale, /*training=*/false));
}

template <class Device>
std::tuple<Tensor, Tensor> bias_act_dropout_forward(const Tensor& input, const optional<Tensor>& bias,
                                                    const optional<Tensor>& state, string_view activation,
                                                    double p, double scale) {
  return run_forward<Device>(input, bias, state, activation, p, scale, /*training=*/true);
}

// A gradient that is not wanted is an empty tensor.
template <class Device>
std::tuple<Tensor, Tensor> bias_act_dropout_backward(const Tensor& grad_output, const optional<Tensor>& saved,
                                                     const optional<Tensor>& state, string_view activation_name,
                                                     double p, double scale, std::array<bool, 2> output_mask) {
  const Activation activation = parse_activation(activation_name);
  const bool wants_bias = output_mask[1];
  const bool needs_saved = activation != Activation::none;
  TORCH_CHECK(!wants_bias || grad_output.dim() > 0,
              "bias_act_dropout backward: expected grad_output with at least one dimension");
  TORCH_CHECK(!needs_saved || (saved.has_value() && saved->sizes() == grad_output.sizes() &&
                               saved->scalar_type() == grad_output.scalar_type() &&
                               saved->device() == grad_output.device()),
              "bias_act_dropout backward: expected saved of size ", grad_output.sizes(), ", ",
              grad_output.scalar_type(), " on ", grad_output.device(), " for activation '", activation_name, "'");
  const Device device(grad_output.device());
  LogicalOutput grad_input(empty_result_like(grad_output));
  const Tensor grad_bias = at::empty({wants_bias ? grad_output.size(-1) : 0}, grad_output.options());
  const Tensor logical_grad_output = grad_output.contiguous();
  const Tensor logical_saved = needs_saved ? saved->contiguous() : Tensor();
  const Tensor logical_state = contiguous_or_undefined(state);
  BiasActDropoutBackwardParams params{};
  set_common(params, device, grad_output, wants_bias, logical_state, activation, p, scale);
  params.grad_output = logical_grad_output.const_data_ptr();
  if (needs_saved) params.saved = logical_saved.const_data_ptr();
  params.grad_input = grad_input.logical.mutable_data_ptr();
  if (wants_bias) params.grad_bias = grad_bias.mutable_data_ptr();
  device.run(params);
  grad_input.finish();
  return {output_mask[0] ? grad_input.wanted : at::empty({0}, grad_output.options()), grad_bias};
}

// state (..., 2) -> mask (..., *size), true where an element is kept: one mask for each state of a batch.
template <class Device>
Tensor dropout_mask(const Tensor& state, at::IntArrayRef size, double p) {
  TORCH_CHECK(state.dim() > 0 && state.size(-1) == 2,
              "_dropout_mask: expected state of size [..., 2], but got ", state.sizes());
  const Tensor ones = at::ones(size, at::TensorOptions().dtype(at::kFloat).device(state.device()));
  const Tensor states = state.reshape({-1, 2});
  std::vector<int64_t> mask_size(state.sizes().begin(), state.sizes().end() - 1);
  mask_size.insert(mask_size.end(), size.begin(), size.end());
  Tensor kept = at::empty({states.size(0), ones.numel()}, ones.options().dtype(at::kBool));
  for (int64_t i = 0; i < states.size(0); ++i) {
    kept[i].copy_(bias_act_dropout_inference<Device>(ones, std::nullopt, states[i], "none", p, 1.0).view({-1}));
  }
  return kept.view(mask_size);
}

// ---- Operators by typed handle --------------------------------------------------------------------------

using InnerSchema = Tensor(const Tensor&, const optional<Tensor>&, const optional<Tensor>&, string_view,
                           double, double);
using ForwardSchema = std::tuple<Tensor, Tensor>(const Tensor&, const optional<Tensor>&,
                                                 const optional<Tensor>&, string_view, double, double);
using BackwardSchema = std::tuple<Tensor, Tensor>(const Tensor&, const optional<Tensor>&,
                                                  const optional<Tensor>&, string_view, double, double,
                                                  std::array<bool, 2>);
using MaskSchema = Tensor(const Tensor&, c10::SymIntArrayRef, double);

const auto& inner_operator() {
  static const auto handle = find_operator<InnerSchema>("pyconv::_bias_act_dropout");
  return handle;
}
const auto& forward_operator() {
  static const auto handle = find_operator<ForwardSchema>("pyconv::_bias_act_dropout_forward");
  return handle;
}
const auto& backward_operator() {
  static const auto handle = find_operator<BackwardSchema>("pyconv::_bias_act_dropout_backward");
  return handle;
}
const auto& mask_operator() {
  static const auto handle = find_operator<MaskSchema>("pyconv::_dropout_mask");
  return handle;
}

// ---- Composites of ATen operators -----------------------------------------------------------------------

at::ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The mask in the shape and on the device of `like`; undefined without a state.
Tensor mask_like(const Tensor& like, const optional<Tensor>& state, double p) {
  if (!state.has_value()) return Tensor();
  return mask_operator().call(*state, like.sym_sizes(), p).to(like.device());
}

Tensor scaled(const Tensor& x, const Tensor& mask, double scale) {
  return mask.defined() ? x * (mask.to(x.scalar_type()) * scale) : x * scale;
}

Tensor composite(const Tensor& input, const optional<Tensor>& bias, const optional<Tensor>& state,
                 string_view activation, double p, double scale) {
  const auto type = accumulator_type(input);
  Tensor x = input.to(type);
  if (bias.has_value()) x = x + bias->to(type);
  const Tensor y = aten_activation(x, parse_activation(activation));
  return scaled(y, mask_like(input, state, p), scale).to(input.scalar_type());
}

// (*, columns) -> (columns)
Tensor sum_of_rows(const Tensor& t) {
  std::vector<int64_t> dimensions(t.dim() - 1);
  std::iota(dimensions.begin(), dimensions.end(), int64_t(0));
  // A sum over no dimension would be one over all.
  return dimensions.empty() ? t : t.sum(dimensions);
}

// The gradients for input and bias, differentiable with respect to grad_output and saved; see backward in
// cpu/bias_act_dropout.cpp for the meaning of a saved output.
std::tuple<Tensor, Tensor> composite_backward(const Tensor& grad_output, const Tensor& saved,
                                              const optional<Tensor>& state, Activation activation, double p,
                                              double scale, bool wants_bias) {
  const auto type = accumulator_type(grad_output);
  const Tensor mask = mask_like(grad_output, state, p);
  Tensor gradient = scaled(grad_output.to(type), mask, scale);
  if (activation == Activation::relu) {
    const Tensor not_positive = saved.le(0);
    if (mask.defined()) {
      gradient = gradient.masked_fill(not_positive.logical_and(mask), 0);
    } else if (scale != 0) {
      gradient = gradient.masked_fill(not_positive, 0);
    }
  } else if (activation == Activation::sigmoid || activation == Activation::tanh) {
    const Tensor y = saved.to(type) * (scale == 0 ? 0.0 : 1.0 / scale);
    gradient = gradient * (activation == Activation::sigmoid ? y * (1 - y) : 1 - y * y);
  } else if (activation == Activation::gelu) {  // ATen's backward is not differentiable often enough
    const Tensor x = saved.to(type);
    const Tensor density = (x * x * -0.5).exp() * 0.39894228040143267794;
    gradient = gradient * ((x * 0.70710678118654752440).erf() * 0.5 + 0.5 + x * density);
  } else if (activation == Activation::silu) {
    const Tensor x = saved.to(type), sigmoid = x.sigmoid();
    gradient = gradient * (sigmoid * (x * (1 - sigmoid) + 1));
  }
  const Tensor grad_bias = wants_bias ? sum_of_rows(gradient).to(grad_output.scalar_type()) : Tensor();
  return {gradient.to(grad_output.scalar_type()), grad_bias};
}

// ---- Autograd -------------------------------------------------------------------------------------------

class BiasActDropoutFunction : public torch::autograd::Function<BiasActDropoutFunction> {
 public:
  // Returns the output and, where it is saved, the pre-activation: as an output of this node it stays
  // connected to input and bias, which a double backward needs.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& input,
                                                const optional<Tensor>& bias, const optional<Tensor>& state,
                                                string_view activation_name, double p, double scale) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, pre_activation] =
        forward_operator().call(input, bias, state, activation_name, p, scale);
    const Activation activation = parse_activation(activation_name);
    const bool returns_pre_activation = saves_pre_activation(activation) && bias.has_value();
    const Tensor saved = saves_output(activation)         ? output
                         : returns_pre_activation         ? pre_activation
                         : activation == Activation::none ? Tensor()
                                                          : input;
    ctx->save_for_backward({saved, state.value_or(Tensor())});
    ctx->saved_data["arguments"] =
        std::vector<double>{static_cast<double>(activation), p, scale, static_cast<double>(bias.has_value())};
    ctx->set_materialize_grads(false);
    if (returns_pre_activation) return {output, pre_activation};
    return {output};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto variables = ctx->get_saved_variables();
    const Tensor& saved = variables[0];
    const auto state = variables[1].defined() ? optional<Tensor>(variables[1]) : std::nullopt;
    const std::vector<double> arguments = ctx->saved_data["arguments"].toDoubleVector();
    const auto activation = static_cast<Activation>(static_cast<int>(arguments[0]));
    const double p = arguments[1], scale = arguments[2];
    const bool wants_bias = arguments[3] != 0 && ctx->needs_input_grad(1);
    Tensor grad_input, grad_bias;
    const Tensor& grad_output = grads[0];
    if (grad_output.defined()) {
      if (at::GradMode::is_enabled() || transform_is_active() || has_tangent(grad_output)) {
        std::tie(grad_input, grad_bias) =
            composite_backward(grad_output, saved, state, activation, p, scale, wants_bias);
      } else {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        std::tie(grad_input, grad_bias) = backward_operator().call(
            grad_output, saved.defined() ? optional<Tensor>(saved) : std::nullopt, state,
            kActivationNames[static_cast<int>(activation)], p, scale, {ctx->needs_input_grad(0), wants_bias});
      }
    }
    // Only a double backward sends a gradient to the pre-activation.
    if (grads.size() > 1 && grads[1].defined()) {
      const Tensor& grad_pre = grads[1];
      grad_input = grad_input.defined() ? grad_input + grad_pre : grad_pre;
      if (wants_bias) {
        grad_bias = grad_bias.defined() ? grad_bias + sum_of_rows(grad_pre) : sum_of_rows(grad_pre);
      }
    }
    return {ctx->needs_input_grad(0) ? grad_input : Tensor(),
            wants_bias ? grad_bias : Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor bias_act_dropout_autograd(const Tensor& input, const optional<Tensor>& bias,
                                 const optional<Tensor>& state, string_view activation, double p,
                                 double scale) {
  if (transform_is_active() || has_tangent(input) || (bias.has_value() && has_tangent(*bias))) {
    return composite(input, bias, state, activation, p, scale);
  }
  const bool differentiable =
      at::GradMode::is_enabled() && (input.requires_grad() || (bias.has_value() && bias->requires_grad()));
  if (!differentiable) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return inner_operator().call(input, bias, state, activation, p, scale);
  }
  return BiasActDropoutFunction::apply(input, bias, state, activation, p, scale)[0];
}

}  // namespace

// ---- Public operators -----------------------------------------------------------------------------------

Tensor dropout(const Tensor& input, double p, bool training, bool inverted, optional<Generator> generator) {
  const Plan plan = plan_of(p, training, inverted);
  check_operands(input, std::nullopt);
  if (!plan.drop) return plan.scale == 1 ? input.clone() : input.mul(plan.scale);
  return inner_operator().call(input, std::nullopt, draw_state(generator, input.device()), "none", p, plan.scale);
}

Tensor bias_act_dropout(const Tensor& input, const optional<Tensor>& any_bias, string_view activation,
                        double p, bool training, bool inverted, optional<Generator> generator) {
  const Plan plan = plan_of(p, training, inverted);
  parse_activation(activation);
  optional<Tensor> bias = any_bias;
  const auto device = input.device().type();
  if (bias.has_value() && at::autocast::is_autocast_available(device) &&
      at::autocast::is_autocast_enabled(device)) {
    // A linear layer under autocast casts its bias, too, to the type it computes in.
    bias = bias->to(input.scalar_type());
  }
  check_operands(input, bias);
  const auto state = plan.drop ? optional<Tensor>(draw_state(generator, input.device())) : std::nullopt;
  return inner_operator().call(input, bias, state, activation, p, plan.scale);
}

namespace {

Tensor dropout_with_state(const Tensor& input, double p, bool inverted, int64_t seed, int64_t offset) {
  const Plan plan = plan_of(p, /*training=*/true, inverted);
  check_operands(input, std::nullopt);
  if (!plan.drop) return plan.scale == 1 ? input.clone() : input.mul(plan.scale);
  const Tensor state = at::cat({at::full({1}, seed, kStateOptions), at::full({1}, offset, kStateOptions)});
  return inner_operator().call(input, std::nullopt, state, "none", p, plan.scale);
}

template <class Device>
void register_kernels(torch::Library& m) {
  m.impl("_bias_act_dropout", &bias_act_dropout_inference<Device>);
  m.impl("_bias_act_dropout_forward", &bias_act_dropout_forward<Device>);
  m.impl("_bias_act_dropout_backward", &bias_act_dropout_backward<Device>);
  m.impl("_dropout_state", &dropout_state);
  m.impl("_dropout_mask", &dropout_mask<Device>);
}

}  // namespace
}  // namespace pyconv

TORCH_LIBRARY_FRAGMENT(pyconv, m) {
  const std::vector<at::Tag> draws = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  const std::vector<at::Tag> function = {at::Tag::pt2_compliant_tag};
  m.def(
      "dropout(Tensor input, float p=0.5, bool training=True, bool inverted=True, Generator? generator=None) "
      "-> Tensor",
      draws);
  m.def(
      "bias_act_dropout(Tensor input, Tensor? bias=None, str activation=\"none\", float p=0.0, bool "
      "training=True, "
      "bool inverted=True, Generator? generator=None) -> Tensor",
      draws);
  m.def("dropout_with_state(Tensor input, float p, bool inverted, int seed, int offset) -> Tensor", function);
  m.def(
      "_bias_act_dropout(Tensor input, Tensor? bias, Tensor? state, str activation, float p, float scale) -> "
      "Tensor",
      function);
  m.def(
      "_bias_act_dropout_forward(Tensor input, Tensor? bias, Tensor? state, str activation, float p, float "
      "scale) "
      "-> (Tensor output, Tensor pre_activation)",
      function);
  m.def(
      "_bias_act_dropout_backward(Tensor grad_output, Tensor? saved, Tensor? state, str activation, float p, "
      "float scale, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_bias)",
      function);
  m.def("_dropout_state(Tensor distinct, Generator? generator) -> Tensor", draws);
  m.def("_dropout_mask(Tensor state, SymInt[] size, float p) -> Tensor", function);
}

TORCH_LIBRARY_IMPL(pyconv, CompositeImplicitAutograd, m) {
  m.impl("dropout", &pyconv::dropout);
  m.impl("bias_act_dropout", &pyconv::bias_act_dropout);
  m.impl("dropout_with_state", &pyconv::dropout_with_state);
}

TORCH_LIBRARY_IMPL(pyconv, CPU, m) { pyconv::register_kernels<pyconv::CpuDevice>(m); }

#ifdef PYCONV_WITH_CUDA
TORCH_LIBRARY_IMPL(pyconv, CUDA, m) { pyconv::register_kernels<pyconv::CudaDevice>(m); }
#else
TORCH_LIBRARY_IMPL(pyconv, CUDA, m) {
  for (const char* name : {"_bias_act_dropout", "_bias_act_dropout_forward", "_bias_act_dropout_backward",
                           "_dropout_state", "_dropout_mask"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&pyconv::built_without_cuda>());
  }
}
#endif

TORCH_LIBRARY_IMPL(pyconv, Autograd, m) {
  m.impl("_bias_act_dropout", &pyconv::bias_act_dropout_autograd);
  m.impl("_bias_act_dropout_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_bias_act_dropout_backward", torch::autograd::autogradNotImplementedFallback());
}

// vmap would call the composites once for each slice, or where nothing is batched once outside of it, and what they draw
// would not obey its `randomness`.
TORCH_LIBRARY_IMPL(pyconv, FuncTorchVmapMode, m) {
  m.impl("dropout", &pyconv::dropout);
  m.impl("bias_act_dropout", &pyconv::bias_act_dropout);
}

TORCH_LIBRARY_IMPL(pyconv, FuncTorchBatched, m) {
  m.impl("dropout", &pyconv::dropout);
  m.impl("bias_act_dropout", &pyconv::bias_act_dropout);
  m.impl("dropout_with_state", &pyconv::dropout_with_state);
  m.impl("_bias_act_dropout", &pyconv::composite);
}
