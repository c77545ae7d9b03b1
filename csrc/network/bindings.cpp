// The training plan for Python: tensors and descriptions in, memory and numbers out.
#include "bindings.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../conv_max_pool2d.h"
#include "../door.h"
#include "training_plan.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace pyconv::network {
namespace {

using at::Tensor;

// A plan, and the tensors and generators it works on.
class Plan {
 public:
  Plan(const Tensor& like, int64_t batch, int64_t features, int64_t classes)
      : options_(like.options()), batch_(batch), features_(features), classes_(classes) {
    TORCH_CHECK(like.device().is_cpu(), "expected parameters on the CPU, but got ", like.device());
    kernel_dtype(like.scalar_type());
  }

  // The number of a parameter.
  int add_parameter(const Tensor& tensor, bool trained, bool in_l2) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      TORCH_CHECK(!tensors_[i].is_same(tensor), "a parameter that two layers share cannot be trained by a plan");
    }
    TORCH_CHECK(tensor.scalar_type() == at::typeMetaToScalarType(options_.dtype()) && tensor.device().is_cpu() &&
                    tensor.is_non_overlapping_and_dense(),
                "expected a parameter of dtype ", options_.dtype(), " on the CPU that fills its memory, but got ",
                tensor.scalar_type(), " on ", tensor.device(), " of size ", tensor.sizes(), " and strides ",
                tensor.strides());
    Parameter parameter;
    parameter.count = tensor.numel();
    parameter.trained = trained;
    parameter.in_l2 = in_l2;
    parameters_.push_back(parameter);
    tensors_.push_back(tensor);
    shapes_.push_back({tensor.sizes().vec(), tensor.strides().vec()});
    buffers_.emplace_back();
    return static_cast<int>(tensors_.size()) - 1;
  }

  int add_generator(std::optional<at::Generator> generator) {
    generators_.push_back(std::move(generator));
    return static_cast<int>(generators_.size()) - 1;
  }

  // The shape (K, PH, PW) of an example behind it.
  std::vector<int64_t> add_conv_max_pool2d(int weight, int bias, at::IntArrayRef input_size, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, at::IntArrayRef pool_size,
                           at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                           bool ceil_mode, const std::string& activation) {
    const Tensor& w = tensors_.at(static_cast<size_t>(weight));
    const ConvMaxPool2dPlan plan = plan_conv_max_pool2d(
        input_size, w.sizes(), w.scalar_type(), at::MemoryFormat::Contiguous, stride, padding, dilation, groups,
        pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode, activation);
    Operation operation{Operation::Kind::conv_max_pool2d};
    operation.conv.geometry = plan.geometry;
    operation.conv.weight_strides = {w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
    operation.conv.weight = weight;
    operation.conv.bias = bias;
    operations_.push_back(operation);
    return {plan.geometry.K, plan.geometry.PH, plan.geometry.PW};
  }

  void add_dense(int matrix, bool inputs_are_rows) {
    const Tensor& m = tensors_.at(static_cast<size_t>(matrix));
    TORCH_CHECK(m.dim() == 2 && m.is_contiguous(), "expected a contiguous matrix, but got one of size ", m.sizes(),
                " and strides ", m.strides());
    Operation operation{Operation::Kind::dense};
    operation.dense.geometry = {batch_, m.size(0), m.size(1), inputs_are_rows};
    operation.dense.matrix = matrix;
    operations_.push_back(operation);
  }

  void add_bias_act_dropout(int64_t columns, int bias, const std::string& activation, double p, double scale,
                            int generator) {
    Operation operation{Operation::Kind::bias_act_dropout};
    operation.pointwise = {columns, parse_activation(activation), bias, p, scale, generator};
    operations_.push_back(operation);
  }

  void finish() {
    plan_ = std::make_unique<TrainingPlan>(kernel_dtype(at::typeMetaToScalarType(options_.dtype())), batch_, features_,
                                           classes_, operations_, parameters_);
  }

  void set_l2(double factor) { plan_->l2 = factor; }

  void set_step(int parameter, double rate, double decay, double momentum, double dampening, bool nesterov, bool first,
                std::optional<Tensor> buffer) {
    const auto i = static_cast<size_t>(parameter);
    const Tensor& tensor = tensors_.at(i);
    TORCH_CHECK(!buffer.has_value() || (buffer->sizes() == tensor.sizes() && buffer->strides() == tensor.strides() &&
                                        buffer->scalar_type() == tensor.scalar_type()),
                "expected a momentum buffer like its parameter");
    plan_->parameters()[i].step = {rate, decay, momentum, dampening, nesterov, first};
    buffers_[i] = buffer.value_or(Tensor());
  }

  void set_rate(double rate) {
    for (Parameter& parameter : plan_->parameters()) parameter.step.rate = rate;
  }

  // (mini-batches done, their costs, whether the next one's cost is finite); the cost that is not is among them.
  std::tuple<int64_t, std::vector<double>, bool> run(const Tensor& x, const Tensor& labels,
                                                     const std::optional<Tensor>& order, int64_t count,
                                                     int64_t mini_batch, int64_t first, int64_t last, double seconds) {
    TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::typeMetaToScalarType(options_.dtype()) && x.dim() >= 1 &&
                    x.numel() == x.size(0) * features_ && x.device().is_cpu(),
                "expected contiguous examples of ", features_, " numbers each, ", options_.dtype(), ", but got ",
                x.sizes(), " ", x.scalar_type(), " on ", x.device());
    TORCH_CHECK(labels.is_contiguous() && labels.scalar_type() == at::kLong && labels.dim() == 1 &&
                    labels.size(0) == x.size(0) && labels.device().is_cpu(),
                "expected int64 labels of size [", x.size(0), "] on the CPU, but got ", labels.sizes(), " ",
                labels.scalar_type(), " on ", labels.device());
    TORCH_CHECK(!order.has_value() || (order->is_contiguous() && order->scalar_type() == at::kLong && order->dim() == 1 &&
                                       order->size(0) >= count && order->device().is_cpu()),
                "expected a contiguous order, int64, of at least ", count, " positions");
    TORCH_CHECK(order.has_value() || count <= x.size(0), "expected at most ", x.size(0), " examples, but got ", count);
    TORCH_CHECK(mini_batch >= 1 && mini_batch <= batch_, "expected mini-batches of 1 to ", batch_, ", but got ",
                mini_batch);
    TORCH_CHECK(first >= 0 && first <= last && last <= (count + mini_batch - 1) / mini_batch,
                "no mini-batches ", first, " to ", last, " of ", count, " examples");
    const Examples examples{x.const_data_ptr(), labels.const_data_ptr<int64_t>(), x.size(0),
                            order.has_value() ? order->const_data_ptr<int64_t>() : nullptr};
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Parameter& parameter = plan_->parameters()[i];
      const at::IntArrayRef sizes = shapes_[i].sizes, strides = shapes_[i].strides;
      TORCH_CHECK(tensors_[i].sizes() == sizes && tensors_[i].strides() == strides &&
                      tensors_[i].dtype() == options_.dtype() && tensors_[i].device().is_cpu(),
                  "a parameter has changed during the training: expected ", options_.dtype(), " on the CPU of size ",
                  sizes, " and strides ", strides, ", but got ", tensors_[i].scalar_type(), " on ",
                  tensors_[i].device(), " of size ", tensors_[i].sizes(), " and strides ", tensors_[i].strides());
      parameter.data = tensors_[i].mutable_data_ptr();
      parameter.momentum_buffer = buffers_[i].defined() ? buffers_[i].mutable_data_ptr() : nullptr;
      if (parameter.in_l2 && !squares_known_) {
        parameter.squares = tensors_[i].detach().to(at::kDouble).square().sum().item<double>();
      }
      if (parameter.trained) tensors_[i].unsafeGetTensorImpl()->bump_version();
    }
    squares_known_ = true;
    const auto seeds = [&](int generator) {
      auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generators_[static_cast<size_t>(generator)],
                                                                        at::detail::getDefaultCPUGenerator());
      const std::lock_guard<std::mutex> lock(source->mutex_);
      return source->random64();
    };
    std::vector<double> costs(static_cast<size_t>(last - first));
    Progress progress;
    {
      const py::gil_scoped_release no_gil;
      const Threads pool{at::get_num_threads(), torch_pool_parallel_for};
      progress = plan_->run(examples, count, mini_batch, first, last, seconds, pool, seeds, costs.data());
    }
    using Obstacle = Progress::Obstacle;
    const bool ordered = order.has_value() && progress.obstacle != Obstacle::none;
    const int64_t position = ordered ? examples.order[progress.index] : progress.index;
    TORCH_CHECK_INDEX(progress.obstacle != Obstacle::no_such_position, "expected positions from 0 to ", x.size(0) - 1,
                      ", but got ", position, " at index ", progress.index, " of the order");
    TORCH_CHECK_VALUE(progress.obstacle != Obstacle::no_such_label, "expected labels from 0 to ", classes_ - 1,
                      ", but got ", examples.labels[position], " at index ", position);
    const bool finite = progress.obstacle != Obstacle::cost_not_finite;
    costs.resize(static_cast<size_t>(progress.mini_batches + !finite));
    return {progress.mini_batches, std::move(costs), finite};
  }

  // The values of parameters may have been changed from outside.
  void forget_squares() { squares_known_ = false; }

  py::list describe() {
    py::list rows;
    for (const auto& row : plan_->describe({at::get_num_threads(), torch_pool_parallel_for})) {
      rows.append(py::dict("operation"_a = row.operation, "input"_a = row.input, "output"_a = row.output,
                           "kernels"_a = row.kernels, "flops"_a = row.flops, "bytes"_a = row.bytes,
                           "forward_seconds"_a = row.forward_seconds, "backward_seconds"_a = row.backward_seconds));
    }
    return rows;
  }
  int64_t buffer_bytes() const { return plan_->buffer_bytes(); }
  int64_t mini_batches() const { return plan_->mini_batches(); }

 private:
  struct Shape {
    std::vector<int64_t> sizes, strides;
  };

  at::TensorOptions options_;
  int64_t batch_, features_, classes_;
  std::vector<Operation> operations_;
  std::vector<Parameter> parameters_;
  std::vector<Tensor> tensors_, buffers_;
  std::vector<Shape> shapes_;  // of the tensors, when they were added
  std::vector<std::optional<at::Generator>> generators_;
  std::unique_ptr<TrainingPlan> plan_;
  bool squares_known_ = false;
};

}  // namespace

void bind(py::module_& m) {
  py::class_<Plan>(m, "TrainingPlan")
      .def(py::init<const Tensor&, int64_t, int64_t, int64_t>(), "like"_a, "batch"_a, "features"_a, "classes"_a)
      .def("add_parameter", &Plan::add_parameter, "tensor"_a, "trained"_a, "in_l2"_a)
      .def("add_generator", &Plan::add_generator, "generator"_a)
      .def("add_conv_max_pool2d", &Plan::add_conv_max_pool2d, "weight"_a, "bias"_a, "input_size"_a, "stride"_a,
           "padding"_a, "dilation"_a, "groups"_a, "pool_size"_a, "pool_stride"_a, "pool_padding"_a, "pool_dilation"_a,
           "ceil_mode"_a, "activation"_a)
      .def("add_dense", &Plan::add_dense, "matrix"_a, "inputs_are_rows"_a)
      .def("add_bias_act_dropout", &Plan::add_bias_act_dropout, "columns"_a, "bias"_a, "activation"_a, "p"_a, "scale"_a,
           "generator"_a)
      .def("finish", &Plan::finish)
      .def("set_l2", &Plan::set_l2, "factor"_a)
      .def("set_step", &Plan::set_step, "parameter"_a, "rate"_a, "decay"_a, "momentum"_a, "dampening"_a, "nesterov"_a,
           "first"_a, "buffer"_a)
      .def("set_rate", &Plan::set_rate, "rate"_a)
      .def("run", &Plan::run, "x"_a, "labels"_a, "order"_a, "count"_a, "mini_batch"_a, "first"_a, "last"_a,
           "seconds"_a)
      .def("forget_squares", &Plan::forget_squares)
      .def("describe", &Plan::describe)
      .def_property_readonly("buffer_bytes", &Plan::buffer_bytes)
      .def_property_readonly("mini_batches", &Plan::mini_batches);
}

}  // namespace pyconv::network
