// Trees in Python: the schedule of a batch, and the kernels that run it.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/engine.h"

namespace fastcell {
// `kernels`: those in use.
void bind_trees(pybind11::module_& module, const Kernels& (*kernels)());
}  // namespace fastcell
