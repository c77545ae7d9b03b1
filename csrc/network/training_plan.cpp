#include "training_plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>

#include "team.h"

namespace pyconv::network {
namespace {

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    default:
      return 2;
  }
}

bool saves_pre_activation(Activation a) { return a == Activation::gelu || a == Activation::silu; }

Strides4 contiguous(int64_t c, int64_t h, int64_t w) { return {c * h * w, h * w, w, 1}; }

int64_t multiply_adds(const ConvMaxPool2dGeometry& g, int64_t positions) {
  return g.N * g.K * positions * (g.C / g.groups) * g.R * g.S;
}

ConvMaxPool2dGeometry with_batch(ConvMaxPool2dGeometry g, int64_t n) {
  g.N = n;
  return g;
}

DenseGeometry with_batch(DenseGeometry g, int64_t n) {
  g.N = n;
  return g;
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

void TrainingPlan::Free::operator()(void* block) const { ::operator delete(block, std::align_val_t(64)); }

// ---- The operations in the kernels' terms -------------------------------------------------------------------

int64_t TrainingPlan::output_elements(size_t i) const {
  const Operation& operation = operations_[i];
  switch (operation.kind) {
    case Operation::Kind::conv_max_pool2d:
      return operation.conv.geometry.K * operation.conv.geometry.PH * operation.conv.geometry.PW;
    case Operation::Kind::dense:
      return operation.dense.geometry.outputs();
    case Operation::Kind::bias_act_dropout:
      break;
  }
  return operation.pointwise.columns;
}

bool TrainingPlan::has_trained_parameters(size_t i) const {
  const Operation& operation = operations_[i];
  return trains(operation.conv.weight) || trains(operation.conv.bias) || trains(operation.dense.matrix) ||
         trains(operation.pointwise.bias);
}

bool TrainingPlan::needs_grad_input(size_t i) const {
  for (size_t before = 0; before < i; ++before) {
    if (has_trained_parameters(before)) return true;
  }
  return false;
}

bool TrainingPlan::zero_is_dead(size_t i) const {
  const Operation& operation = operations_[i];
  switch (operation.kind) {
    case Operation::Kind::conv_max_pool2d:
      return operation.conv.geometry.activation == Activation::relu;
    case Operation::Kind::dense:
      return false;
    case Operation::Kind::bias_act_dropout:
      break;
  }
  const BiasActDropoutLayer& layer = operation.pointwise;
  return layer.activation == Activation::relu ||
         (layer.activation == Activation::none && layer.bias < 0 && i > 0 && zero_is_dead(i - 1));
}

ConvMaxPool2dForwardParams TrainingPlan::conv_forward(size_t i, int64_t n, const void* input,
                                                      const Threads& threads) const {
  const ConvMaxPool2dLayer& layer = operations_[i].conv;
  ConvMaxPool2dForwardParams p{};
  p.geometry = with_batch(layer.geometry, n);
  const ConvMaxPool2dGeometry& g = p.geometry;
  p.dtype = dtype_;
  p.input = input;
  p.input_strides = contiguous(g.C, g.H, g.W);
  p.weight = parameters_[static_cast<size_t>(layer.weight)].data;
  p.weight_strides = layer.weight_strides;
  if (layer.bias >= 0) {
    p.bias = parameters_[static_cast<size_t>(layer.bias)].data;
    p.bias_stride = 1;
  }
  p.output = states_[i].output;
  p.output_strides = contiguous(g.K, g.PH, g.PW);
  p.argmax = states_[i].argmax;
  p.pre_activation = states_[i].pre_activation;
  p.workspace = workspace_;
  p.threads = threads;
  return p;
}

ConvMaxPool2dBackwardParams TrainingPlan::conv_backward(size_t i, int64_t n, const void* input, void* grad_input,
                                                        const Threads& threads) const {
  const ConvMaxPool2dLayer& layer = operations_[i].conv;
  ConvMaxPool2dBackwardParams p{};
  p.geometry = with_batch(layer.geometry, n);
  const ConvMaxPool2dGeometry& g = p.geometry;
  p.dtype = dtype_;
  p.grad_output = states_[i].grad_output;
  p.argmax = states_[i].argmax;
  p.saved = saves_pre_activation(g.activation)                                          ? states_[i].pre_activation
            : g.activation == Activation::sigmoid || g.activation == Activation::tanh ? states_[i].output
                                                                                       : nullptr;
  p.output_strides = contiguous(g.K, g.PH, g.PW);
  p.input = input;
  p.input_strides = contiguous(g.C, g.H, g.W);
  p.weight = parameters_[static_cast<size_t>(layer.weight)].data;
  p.weight_strides = layer.weight_strides;
  p.grad_input = grad_input;
  p.grad_input_strides = p.input_strides;
  if (trains(layer.weight)) p.grad_weight = gradients_[static_cast<size_t>(layer.weight)];
  p.grad_weight_strides = layer.weight_strides;
  if (trains(layer.bias)) p.grad_bias = gradients_[static_cast<size_t>(layer.bias)];
  p.workspace = workspace_;
  p.threads = threads;
  return p;
}

DenseForwardParams TrainingPlan::dense_forward(size_t i, int64_t n, const void* input, const Threads& threads) const {
  const DenseLayer& layer = operations_[i].dense;
  DenseForwardParams p{};
  p.geometry = with_batch(layer.geometry, n);
  p.dtype = dtype_;
  p.matrix = parameters_[static_cast<size_t>(layer.matrix)].data;
  p.input = input;
  p.output = states_[i].output;
  p.workspace = workspace_;
  p.threads = threads;
  return p;
}

DenseBackwardParams TrainingPlan::dense_backward(size_t i, int64_t n, const void* input, void* grad_input,
                                                 const Threads& threads) {
  const DenseLayer& layer = operations_[i].dense;
  Parameter& matrix = parameters_[static_cast<size_t>(layer.matrix)];
  DenseBackwardParams p{};
  p.geometry = with_batch(layer.geometry, n);
  p.dtype = dtype_;
  p.input = input;
  p.grad_output = states_[i].grad_output;
  p.grad_input = grad_input;
  p.input_zero_is_dead = i > 0 && zero_is_dead(i - 1);
  p.matrix = matrix.data;
  p.update = matrix.trained;
  p.momentum_buffer = matrix.momentum_buffer;
  p.step = matrix.step;
  if (matrix.trained && matrix.in_l2) p.squares = &matrix.squares;
  p.workspace = workspace_;
  p.threads = threads;
  return p;
}

BiasActDropoutForwardParams TrainingPlan::pointwise_forward(size_t i, int64_t n, const void* input,
                                                            const Threads& threads) const {
  const BiasActDropoutLayer& layer = operations_[i].pointwise;
  BiasActDropoutForwardParams p{};
  p.rows = n;
  p.columns = layer.columns;
  p.dtype = dtype_;
  p.activation = layer.activation;
  p.input = input;
  if (layer.bias >= 0) p.bias = parameters_[static_cast<size_t>(layer.bias)].data;
  p.output = states_[i].output;
  p.pre_activation = states_[i].pre_activation;
  p.drop = layer.generator >= 0;
  p.p = layer.p;
  p.scale = layer.scale;
  p.seed = states_[i].seed;
  p.threads = threads;
  return p;
}

BiasActDropoutBackwardParams TrainingPlan::pointwise_backward(size_t i, int64_t n, void* grad_input,
                                                              const Threads& threads) const {
  const BiasActDropoutLayer& layer = operations_[i].pointwise;
  BiasActDropoutBackwardParams p{};
  p.rows = n;
  p.columns = layer.columns;
  p.dtype = dtype_;
  p.activation = layer.activation;
  p.grad_output = states_[i].grad_output;
  p.saved = layer.activation == Activation::none           ? nullptr
            : saves_pre_activation(layer.activation) ? states_[i].pre_activation
                                                     : states_[i].output;
  p.grad_input = grad_input;
  if (trains(layer.bias)) p.grad_bias = gradients_[static_cast<size_t>(layer.bias)];
  p.drop = layer.generator >= 0;
  p.p = layer.p;
  p.scale = layer.scale;
  p.seed = states_[i].seed;
  p.threads = threads;
  return p;
}

SoftmaxCrossEntropyParams TrainingPlan::cross_entropy(int64_t n, double* loss) const {
  return {n, classes_, dtype_, states_.back().output, labels_, states_.back().grad_output, loss, workspace_};
}

// ---- Buffers ------------------------------------------------------------------------------------------------

// take(pointer, bytes) for every buffer.
template <class Layout>
void TrainingPlan::lay_out(const Layout& take) {
  const int64_t size = element_size(dtype_);
  for (size_t i = 0; i < operations_.size(); ++i) {
    const Operation& operation = operations_[i];
    State& state = states_[i];
    const int64_t count = batch_ * output_elements(i);
    take(state.output, count * size);
    take(state.grad_output, count * size);
    Activation activation = Activation::none;
    if (operation.kind == Operation::Kind::conv_max_pool2d) {
      take(state.argmax, count * (argmax_is_byte(operation.conv.geometry) ? 1 : 4));
      activation = operation.conv.geometry.activation;
    } else if (operation.kind == Operation::Kind::bias_act_dropout) {
      activation = operation.pointwise.activation;
    }
    if (saves_pre_activation(activation)) take(state.pre_activation, count * size);
    for (const int parameter : {operation.conv.weight, operation.conv.bias, operation.pointwise.bias}) {
      if (trains(parameter)) {
        take(gradients_[static_cast<size_t>(parameter)], parameters_[static_cast<size_t>(parameter)].count * size);
      }
    }
  }
  take(rows_, batch_ * features_ * size);
  take(labels_, batch_ * int64_t(sizeof(int64_t)));
}

TrainingPlan::TrainingPlan(DType dtype, int64_t batch, int64_t features, int64_t classes,
                           std::vector<Operation> operations, std::vector<Parameter> parameters)
    : dtype_(dtype),
      batch_(batch),
      features_(features),
      classes_(classes),
      operations_(std::move(operations)),
      parameters_(std::move(parameters)),
      states_(operations_.size()),
      gradients_(parameters_.size(), nullptr) {
  constexpr int64_t kAlignment = 128;  // a buffer shares no cache line, nor the neighbour that is fetched with it
  const auto rounded = [](int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; };
  lay_out([&](auto&, int64_t bytes) { buffer_bytes_ += rounded(bytes); });
  memory_.reset(::operator new(static_cast<size_t>(buffer_bytes_), std::align_val_t(64)));
  std::memset(memory_.get(), 0, static_cast<size_t>(buffer_bytes_));
  char* next = static_cast<char*>(memory_.get());
  lay_out([&](auto& pointer, int64_t bytes) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
    next += rounded(bytes);
  });
}

// What the kernels of a mini-batch of n want at most.
int64_t TrainingPlan::workspace_bytes(int64_t n, const Team& team) {
  const cpu::KernelTable& table = cpu::kernel_table();
  int64_t most = table.softmax_cross_entropy_workspace_bytes(cross_entropy(n, nullptr));
  const auto need = [&](int64_t bytes) { most = std::max(most, bytes); };
  for (size_t i = 0; i < operations_.size(); ++i) {
    const void* input = i == 0 ? rows_ : states_[i - 1].output;
    void* grad_input = needs_grad_input(i) ? states_[i - 1].grad_output : nullptr;
    switch (operations_[i].kind) {
      case Operation::Kind::conv_max_pool2d: {
        const auto forward = conv_forward(i, n, input, conv_threads(i, n, team));
        need(cpu::select_kernel(table.conv_max_pool2d_forward, forward).workspace_bytes(forward));
        const auto backward = conv_backward(i, n, input, grad_input, conv_threads(i, n, team));
        need(cpu::select_kernel(table.conv_max_pool2d_backward, backward).workspace_bytes(backward));
        break;
      }
      case Operation::Kind::dense:
        need(table.dense_forward_workspace_bytes(dense_forward(i, n, input, dense_threads(i, n, team))));
        need(table.dense_backward_workspace_bytes(dense_backward(i, n, input, grad_input, dense_threads(i, n, team))));
        break;
      case Operation::Kind::bias_act_dropout:
        break;
    }
  }
  return most;
}

// ---- A mini-batch -------------------------------------------------------------------------------------------

Threads TrainingPlan::conv_threads(size_t i, int64_t n, const Team& team) const {
  const ConvMaxPool2dGeometry g = with_batch(operations_[i].conv.geometry, n);
  return team.threads(multiply_adds(g, g.PH * g.PW));
}

Threads TrainingPlan::dense_threads(size_t i, int64_t n, const Team& team) const {
  const DenseGeometry& g = operations_[i].dense.geometry;
  return team.threads(n * g.rows * g.columns);
}

void TrainingPlan::forward(int64_t n, const Team& team, const Seeds& seeds) {
  const cpu::KernelTable& table = cpu::kernel_table();
  const void* input = input_;
  for (size_t i = 0; i < operations_.size(); ++i) {
    const Operation& operation = operations_[i];
    const auto start = Clock::now();
    switch (operation.kind) {
      case Operation::Kind::conv_max_pool2d: {
        const auto params = conv_forward(i, n, input, conv_threads(i, n, team));
        cpu::select_kernel(table.conv_max_pool2d_forward, params).run(params);
        break;
      }
      case Operation::Kind::dense:
        table.dense_forward(dense_forward(i, n, input, dense_threads(i, n, team)));
        break;
      case Operation::Kind::bias_act_dropout:
        if (operation.pointwise.generator >= 0) states_[i].seed = seeds(operation.pointwise.generator);
        table.bias_act_dropout_forward(
            pointwise_forward(i, n, input, team.threads(n * operation.pointwise.columns)));
        break;
    }
    input = states_[i].output;
    states_[i].forward_seconds += seconds_since(start);
  }
}

void TrainingPlan::backward(int64_t n, const Team& team) {
  const cpu::KernelTable& table = cpu::kernel_table();
  for (size_t i = operations_.size(); i-- > 0;) {
    const Operation& operation = operations_[i];
    const void* input = i == 0 ? input_ : states_[i - 1].output;
    void* grad_input = needs_grad_input(i) ? states_[i - 1].grad_output : nullptr;
    if (grad_input == nullptr && !has_trained_parameters(i)) return;
    const auto start = Clock::now();
    switch (operation.kind) {
      case Operation::Kind::conv_max_pool2d: {
        const auto params = conv_backward(i, n, input, grad_input, conv_threads(i, n, team));
        cpu::select_kernel(table.conv_max_pool2d_backward, params).run(params);
        update(operation.conv.weight, team);
        update(operation.conv.bias, team);
        break;
      }
      case Operation::Kind::dense:
        table.dense_backward(dense_backward(i, n, input, grad_input, dense_threads(i, n, team)));
        break;
      case Operation::Kind::bias_act_dropout: {
        // The kernel writes what nobody wants, too.
        void* target = grad_input != nullptr ? grad_input : i > 0 ? states_[i - 1].grad_output : rows_;
        const auto params = pointwise_backward(i, n, target, team.threads(n * operation.pointwise.columns));
        table.bias_act_dropout_backward(params);
        update(operation.pointwise.bias, team);
        break;
      }
    }
    states_[i].backward_seconds += seconds_since(start);
    if (grad_input == nullptr) return;
  }
}

void TrainingPlan::update(int number, const Team& team) {
  if (!trains(number)) return;
  Parameter& parameter = parameters_[static_cast<size_t>(number)];
  cpu::kernel_table().sgd_update({parameter.count, dtype_, parameter.data, gradients_[static_cast<size_t>(number)],
                                  parameter.momentum_buffer, parameter.step,
                                  parameter.in_l2 ? &parameter.squares : nullptr, team.threads(parameter.count)});
}

double TrainingPlan::sum_of_squares() const {
  double sum = 0;
  for (const Parameter& parameter : parameters_) sum += parameter.in_l2 ? parameter.squares : 0.0;
  return sum;
}

bool TrainingPlan::fetch(const Examples& examples, int64_t begin, int64_t n, Progress& progress) {
  const int64_t row_bytes = features_ * element_size(dtype_);
  const char* x = static_cast<const char*>(examples.x);
  input_ = examples.order == nullptr ? x + begin * row_bytes : rows_;
  for (int64_t i = 0; i < n; ++i) {
    progress.index = begin + i;
    const int64_t position = examples.order == nullptr ? begin + i : examples.order[begin + i];
    if (position < 0 || position >= examples.count) {
      progress.obstacle = Progress::Obstacle::no_such_position;
      return false;
    }
    labels_[i] = examples.labels[position];
    if (labels_[i] < 0 || labels_[i] >= classes_) {
      progress.obstacle = Progress::Obstacle::no_such_label;
      return false;
    }
    if (examples.order != nullptr) {
      std::memcpy(static_cast<char*>(rows_) + i * row_bytes, x + position * row_bytes, static_cast<size_t>(row_bytes));
    }
  }
  return true;
}

Progress TrainingPlan::run(const Examples& examples, int64_t count, int64_t mini_batch, int64_t first, int64_t last,
                           double seconds, const Threads& pool, const Seeds& seeds, double* costs) {
  Progress progress;
  const auto start = Clock::now();
  Team::run(pool, [&](const Team& team) {
    int64_t needed = workspace_bytes(mini_batch, team);
    if (count % mini_batch != 0) needed = std::max(needed, workspace_bytes(count % mini_batch, team));
    if (needed > workspace_bytes_) {
      workspace_memory_.reset();
      workspace_memory_.reset(::operator new(static_cast<size_t>(needed), std::align_val_t(64)));
      workspace_ = workspace_memory_.get();
      workspace_bytes_ = needed;
    }
    for (int64_t index = first; index < last; ++index) {
      const int64_t begin = index * mini_batch, n = std::min(mini_batch, count - begin);
      if (!fetch(examples, begin, n, progress)) return;
      forward(n, team, seeds);
      double cost = 0;
      const auto cost_start = Clock::now();
      cpu::kernel_table().softmax_cross_entropy(cross_entropy(n, &cost));
      if (l2 != 0) cost += l2 * sum_of_squares();
      costs[index - first] = cost;
      cost_seconds_ += seconds_since(cost_start);
      if (!std::isfinite(cost)) {
        progress.obstacle = Progress::Obstacle::cost_not_finite;
        return;
      }
      backward(n, team);
      for (Parameter& parameter : parameters_) parameter.step.first = false;
      ++progress.mini_batches;
      ++mini_batches_;
      if (seconds_since(start) > seconds) return;
    }
  });
  return progress;
}

// ---- In words -----------------------------------------------------------------------------------------------

namespace {

std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : "x") + std::to_string(size);
  return text;
}

std::string activation_text(Activation activation) {
  switch (activation) {
    case Activation::none:
      return "";
    case Activation::relu:
      return " relu";
    case Activation::sigmoid:
      return " sigmoid";
    case Activation::tanh:
      return " tanh";
    case Activation::gelu:
      return " gelu";
    case Activation::silu:
      break;
  }
  return " silu";
}

}  // namespace

std::vector<TrainingPlan::Row> TrainingPlan::describe(const Threads& pool) {
  std::vector<Row> rows;
  Team::run(pool, [&](const Team& team) {
    const cpu::KernelTable& table = cpu::kernel_table();
    const int64_t size = element_size(dtype_), n = batch_;
    for (size_t i = 0; i < operations_.size(); ++i) {
      const Operation& operation = operations_[i];
      void* grad_input = needs_grad_input(i) ? states_[i - 1].grad_output : nullptr;
      const int64_t passes = 2 + (grad_input != nullptr);  // forward, gradient of the parameters, of the input
      Row row{};
      switch (operation.kind) {
        case Operation::Kind::conv_max_pool2d: {
          const auto forward = conv_forward(i, n, rows_, conv_threads(i, n, team));
          const auto backward = conv_backward(i, n, rows_, grad_input, conv_threads(i, n, team));
          const ConvMaxPool2dGeometry& g = forward.geometry;
          row.operation = "conv_max_pool2d " + shape_text({g.K, g.C / g.groups, g.R, g.S}) + ", pool " +
                          shape_text({g.pool_h, g.pool_w}) + activation_text(g.activation);
          row.input = shape_text({n, g.C, g.H, g.W});
          row.output = shape_text({n, g.K, g.PH, g.PW});
          row.kernels = std::string(cpu::select_kernel(table.conv_max_pool2d_forward, forward).name) + ", " +
                        cpu::select_kernel(table.conv_max_pool2d_backward, backward).name;
          row.flops = 2 * passes * multiply_adds(g, g.OH * g.OW);
          row.bytes = size * passes * (g.C * g.H * g.W * n + g.K * (g.C / g.groups) * g.R * g.S + g.K * g.PH * g.PW * n);
          break;
        }
        case Operation::Kind::dense: {
          const DenseGeometry& g = operation.dense.geometry;
          row.operation = "dense " + shape_text({g.inputs(), g.outputs()});
          row.input = shape_text({n, g.inputs()});
          row.output = shape_text({n, g.outputs()});
          row.kernels = "dense";
          row.flops = 2 * passes * n * g.rows * g.columns;
          row.bytes = size * (3 * g.rows * g.columns + passes * n * (g.inputs() + g.outputs()));
          break;
        }
        case Operation::Kind::bias_act_dropout:
          row.operation = "bias_act_dropout";
          if (operation.pointwise.bias >= 0) row.operation += " bias";
          row.operation += activation_text(operation.pointwise.activation);
          if (operation.pointwise.p > 0) row.operation += " p=" + std::to_string(operation.pointwise.p).substr(0, 4);
          row.input = row.output = shape_text({n, operation.pointwise.columns});
          row.kernels = "bias_act_dropout";
          row.flops = 0;
          row.bytes = size * 5 * n * operation.pointwise.columns;
          break;
      }
      row.forward_seconds = states_[i].forward_seconds;
      row.backward_seconds = states_[i].backward_seconds;
      rows.push_back(row);
    }
    rows.push_back({"cross_entropy", shape_text({n, classes_}), "1", "softmax_cross_entropy", 0, size * 2 * n * classes_,
                    cost_seconds_, 0.0});
  });
  return rows;
}

}  // namespace pyconv::network
