// The CUDA engine in Python: the submodule `cuda` of _core, and the emulated engine of the tests.
#pragma once

#include <pybind11/pybind11.h>

namespace fastcell {
void bind_cuda(pybind11::module_& module);
void bind_cuda_trees(pybind11::module_& module);  // (parts of it)
void bind_cuda_normed(pybind11::module_& module);
}  // namespace fastcell
