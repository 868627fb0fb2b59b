// The reservoir's kernels in Python.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/engine.h"

namespace fastcell {
// `kernels`: those of the instruction set in use; asked when they are needed, not at import.
void bind_reservoir(pybind11::module_& module, const Kernels& (*kernels)());
}  // namespace fastcell
