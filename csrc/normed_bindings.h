// Layers with layer normalisation in Python.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/engine.h"

namespace fastcell {
// `kernels`: those in use.
void bind_normed(pybind11::module_& module, const Kernels& (*kernels)());
}  // namespace fastcell
