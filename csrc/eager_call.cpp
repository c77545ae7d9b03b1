#include "eager_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>
#include <optional>
#include <string_view>

#include "conv_max_pool2d.h"
#include "door.h"

namespace pyconv {
namespace {

// Each reader says whether `object` is of the plain kind, and sets no Python error.

// No bool, no number of another library, no SymInt.
bool read_int(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read_pair(PyObject* object, int64_t (&pair)[2]) {
  if (PyTuple_Check(object) || PyList_Check(object)) {
    return PySequence_Fast_GET_SIZE(object) == 2 && read_int(PySequence_Fast_GET_ITEM(object, 0), pair[0]) &&
           read_int(PySequence_Fast_GET_ITEM(object, 1), pair[1]);
  }
  if (!read_int(object, pair[0])) return false;
  pair[1] = pair[0];
  return true;
}

// Subclasses may have a __torch_function__ of their own.
bool read_tensor(PyObject* object, at::Tensor& tensor) {
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

bool read_text(PyObject* object, std::string_view& text) {
  if (!PyUnicode_CheckExact(object) || !PyUnicode_IS_COMPACT_ASCII(object)) return false;
  text = {static_cast<const char*>(PyUnicode_DATA(object)), static_cast<size_t>(PyUnicode_GET_LENGTH(object))};
  return true;
}

bool read_activation(PyObject* object, std::string_view& activation) {
  if (!read_text(object, activation)) return false;
  for (std::string_view name : kActivationNames) {
    if (activation == name) return true;
  }
  return false;
}

// Top, bottom, left, right.
bool read_padding(PyObject* object, const at::Tensor& weight, const int64_t (&stride)[2], const int64_t (&dilation)[2],
                  int64_t (&sides)[4]) {
  std::string_view name;
  if (read_text(object, name)) {
    if (name == "valid") {
      for (int64_t& side : sides) side = 0;
      return true;
    }
    if (name != "same" || weight.dim() != 4) return false;
    for (int d = 0; d < 2; ++d) {
      constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // so that the product is no overflow
      const int64_t size = weight.size(2 + d);
      if (stride[d] != 1 || size < 1 || size > kMost || dilation[d] < 1 || dilation[d] > kMost) return false;
      const int64_t total = dilation[d] * (size - 1);
      sides[2 * d] = total / 2;
      sides[2 * d + 1] = total - total / 2;
    }
    return true;
  }
  int64_t padding[2];
  if (!read_pair(object, padding)) return false;
  sides[0] = sides[1] = padding[0];
  sides[2] = sides[3] = padding[1];
  return true;
}

}  // namespace

PyObject* conv_max_pool2d_of_plain_arguments(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 13, "conv_max_pool2d: expected 13 arguments, but got ", count);
  at::Tensor input, weight;
  std::optional<at::Tensor> bias;
  int64_t stride[2], padding[4], dilation[2], groups, pool_size[2], pool_stride[2], pool_padding[2], pool_dilation[2];
  std::string_view activation;
  PyObject* const ceil_mode = arguments[11];
  const bool plain =
      !at::impl::torch_function_mode_enabled() && read_tensor(arguments[0], input) &&
      read_tensor(arguments[1], weight) &&
      (arguments[2] == Py_None || read_tensor(arguments[2], bias.emplace())) && read_pair(arguments[3], stride) &&
      read_pair(arguments[5], dilation) && read_padding(arguments[4], weight, stride, dilation, padding) &&
      read_int(arguments[6], groups) && read_pair(arguments[7], pool_size) &&
      read_pair(arguments[8] == Py_None ? arguments[7] : arguments[8], pool_stride) &&
      read_pair(arguments[9], pool_padding) && read_pair(arguments[10], pool_dilation) && PyBool_Check(ceil_mode) &&
      read_activation(arguments[12], activation);
  if (!plain) return Py_NewRef(Py_NotImplemented);
  at::Tensor output;
  {
    const pybind11::gil_scoped_release no_gil;
    output = conv_max_pool2d(input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding,
                             pool_dilation, ceil_mode == Py_True, activation);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

}  // namespace pyconv
