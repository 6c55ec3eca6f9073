// Adds the functions of the CUDA kernels to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace tlalign::cuda {

void bind(pybind11::module_& module);

}  // namespace tlalign::cuda
