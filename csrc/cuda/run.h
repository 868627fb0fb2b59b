// From a plan and tensors' addresses to launches.
#pragma once

#include <vector>

#include "plan.h"
#include "sweep.h"

namespace fastcell::cuda {

// Runs all steps of `sweep`, whose sizes and addresses are set; what follows from the plan is
// filled in here.
void run(const Plan& plan, Sweep sweep, void* stream);

}  // namespace fastcell::cuda
