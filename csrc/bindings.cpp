// The Python module _C: instruction sets, the dispatch lists in words, and direct calls of the operators, which
// spare eager mode the cost of torch.ops (about 2 us a call).
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "conv_max_pool2d.h"
#include "cpu/isa.h"
#include "dropout.h"
#include "eager_call.h"
#include "network/bindings.h"
#include "random_distortion.h"

#ifdef PYCONV_WITH_CUDA
#include <ATen/Context.h>

#include "kernel_table.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace pyconv {
namespace {

std::string isa_choices() {
  std::string choices;
  for (int i = 0; i < cpu::compiled_isa_count(); ++i) {
    if (!choices.empty()) choices += ", ";
    choices += cpu::compiled_isa(i);
    if (!cpu::cpu_supports(i)) choices += " (not supported by this CPU)";
  }
  return choices;
}

void set_isa(const std::string& name, const char* given_by) {
  switch (cpu::set_isa(name.c_str())) {
    case cpu::SetIsaResult::ok:
      return;
    case cpu::SetIsaResult::unknown:
      throw py::value_error(std::string(given_by) + ": unknown instruction set '" + name + "'; choose one of " +
                            isa_choices());
    case cpu::SetIsaResult::unsupported:
      throw py::value_error(std::string(given_by) + ": this CPU does not support '" + name + "'; choose one of " +
                            isa_choices());
  }
}

py::list written(const ConvMaxPool2dForwardParams& params) {
  py::list names;
  names.append("output");
  if (params.argmax != nullptr) names.append("argmax");
  if (params.pre_activation != nullptr) names.append("pre_activation");
  return names;
}

py::list written(const ConvMaxPool2dBackwardParams& params) {
  py::list names;
  if (params.grad_input != nullptr) names.append("grad_input");
  if (params.grad_weight != nullptr) names.append("grad_weight");
  if (params.grad_bias != nullptr) names.append("grad_bias");
  return names;
}

// Why `list` serves `params` as it does: the entries it tries, of which the last one runs.
template <class Params>
py::dict phase_of(const char* name, const char* pass, const cpu::KernelList<Params>& list, const Params& params) {
  py::list kernels;
  if (params.geometry.N > 0) {  // no kernel runs on an empty batch
    const cpu::Kernel<Params>& chosen = cpu::select_kernel(list, params);
    for (const cpu::Kernel<Params>* kernel = list.entries; kernel <= &chosen; ++kernel) {
      const bool runs = kernel == &chosen;
      kernels.append(py::dict("name"_a = std::string("cpu/") + cpu::isa() + "/" + pass + "/" + kernel->name,
                              "runs"_a = runs, "accepts"_a = kernel->accepts_what, "exact"_a = kernel->exact,
                              "workspace_bytes"_a = runs ? py::cast(kernel->workspace_bytes(params)) : py::none()));
    }
  }
  return py::dict("name"_a = name, "writes"_a = written(params), "threads"_a = params.threads.num_threads,
                  "kernels"_a = kernels);
}

py::dict conv_max_pool2d_plan(at::IntArrayRef input_size, at::IntArrayRef weight_size, at::ScalarType dtype,
                              at::MemoryFormat format, at::IntArrayRef stride, at::IntArrayRef padding,
                              at::IntArrayRef dilation, int64_t groups, at::IntArrayRef pool_size,
                              at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                              bool ceil_mode, const std::string& activation) {
  const ConvMaxPool2dPlan plan =
      plan_conv_max_pool2d(input_size, weight_size, dtype, format, stride, padding, dilation, groups, pool_size,
                           pool_stride, pool_padding, pool_dilation, ceil_mode, activation);
  const ConvMaxPool2dGeometry& g = plan.geometry;
  const auto& table = cpu::kernel_table();
  const auto& forward = table.conv_max_pool2d_forward;
  const auto& backward = table.conv_max_pool2d_backward;
  py::list phases;
  phases.append(phase_of("forward, inference", "forward", forward, plan.inference));
  phases.append(phase_of("forward, training", "forward", forward, plan.training));
  phases.append(phase_of("backward", "backward", backward, plan.backward));
  phases.append(phase_of("backward, parameters only", "backward", backward, plan.backward_of_parameters));
  return py::dict("convolution"_a = py::make_tuple(g.N, g.K, g.OH, g.OW),
                  "output"_a = py::make_tuple(g.N, g.K, g.PH, g.PW), "phases"_a = phases);
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::compiled_isa_count(); ++i) names.emplace_back(cpu::compiled_isa(i));
  return names;
}

}  // namespace
}  // namespace pyconv

PYBIND11_MODULE(_C, m) {
  using namespace pyconv;
  if (const char* name = std::getenv("PYCONV_CPU_ISA"); name != nullptr && *name != '\0') {
    set_isa(name, "PYCONV_CPU_ISA");
  }
  m.def("isa", [] { return std::string(cpu::isa()); });
  m.def("set_isa", [](const std::string& name) { set_isa(name, "set_isa"); });
  if (const char* exact = std::getenv("PYCONV_EXACT"); exact != nullptr && *exact != '\0') {
    const std::string value = exact;
    if (value != "0" && value != "1") {
      throw py::value_error("PYCONV_EXACT: expected 0 or 1, but got '" + value + "'");
    }
    cpu::set_exact(value == "1");
  }
  m.def("exact", &cpu::exact);
  m.def("set_exact", &cpu::set_exact, py::arg("only_exact").noconvert());
  m.def("compiled_isas", &compiled_isas);
  m.def("_load_kernel_table", [](const std::string& path) { return std::string(cpu::load_kernel_table(path)); });
  m.def("cuda_built", [] {
#ifdef PYCONV_WITH_CUDA
    return true;
#else
    return false;
#endif
  });
  static PyMethodDef conv_max_pool2d_method[] = {
      {"conv_max_pool2d", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(conv_max_pool2d_of_plain_arguments)),
       METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), conv_max_pool2d_method) != 0) throw py::error_already_set();
  m.def("dropout", torch::wrap_pybind_function_no_gil(dropout));
  m.def("bias_act_dropout", torch::wrap_pybind_function_no_gil(bias_act_dropout));
  m.def("random_distortion", torch::wrap_pybind_function_no_gil(random_distortion));
  m.def("conv_max_pool2d_plan", torch::wrap_pybind_function(conv_max_pool2d_plan));
  network::bind(m);
  m.def("conv_max_pool2d_kernels", [] {
    std::vector<std::tuple<std::string, bool, std::string>> rows;
    const auto add = [&](const std::string& prefix, const auto& table, bool live) {
      const auto add_list = [&](const char* phase, const auto& list) {
        for (int i = 0; i < list.count; ++i) {
          const bool wanted = list.entries[i].exact || prefix == "cuda" || !cpu::exact();
          rows.emplace_back(prefix + phase + list.entries[i].name, live && wanted, list.entries[i].accepts_what);
        }
      };
      add_list("/forward/", table.conv_max_pool2d_forward);
      add_list("/backward/", table.conv_max_pool2d_backward);
    };
    add(std::string("cpu/") + cpu::isa(), cpu::kernel_table(), true);
#ifdef PYCONV_WITH_CUDA
    add("cuda", cuda::kernel_table(), at::globalContext().hasCUDA());
#endif
    return rows;
  });
}
