// The table of kernels that this process uses.
#pragma once

#include "cpu/engine.h"

namespace fastcell {

// Chosen at the first call: the best that the CPU has, or FASTCELL_ISA. Throws std::runtime_error
// if that names something that is not there.
const Kernels& kernels();

}  // namespace fastcell
