// Compiled once per instruction set, as kernels.cpp is.
#include "reservoir.h"

namespace fastcell::FASTCELL_ISA {

extern const ReservoirKernels reservoir_kernels[kDTypes];
const ReservoirKernels reservoir_kernels[kDTypes] = {
    {Vec<float>::lanes, Reservoir<float>::workspace_bytes, Reservoir<float>::run},
    {Vec<double>::lanes, Reservoir<double>::workspace_bytes, Reservoir<double>::run},
};

}  // namespace fastcell::FASTCELL_ISA
