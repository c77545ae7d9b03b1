#pragma once

#include <pybind11/pybind11.h>

namespace pyconv::network {

// Adds the class TrainingPlan to the Python module.
void bind(pybind11::module_& m);

}  // namespace pyconv::network
