// conv_max_pool2d as eager Python calls it: torch.ops takes 2 us to read the arguments, pybind11 and checks written in
// Python as long again, which is more than the kernels take on a small image.
#pragma once

#include <torch/csrc/python_headers.h>

namespace pyconv {

// A METH_FASTCALL function of the arguments of pyconv.functional.conv_max_pool2d, by position and as users write them:
// 2 or (2, 2), 'same', None. Returns the operator's output, or NotImplemented where an argument is of another kind
// (a wrong type, a tensor subclass, a SymInt) or a __torch_function__ mode is active: those are Python's to look at.
PyObject* conv_max_pool2d_of_plain_arguments(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace pyconv
