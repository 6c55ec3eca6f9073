// Adds the functions of the CPU kernels to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace tlalign::cpu {

void bind(pybind11::module_& module);

}  // namespace tlalign::cpu
