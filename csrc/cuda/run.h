// From a plan and tensors' addresses to launches.
#pragma once

#include <vector>

#include "plan.h"
#include "sweep.h"

namespace fastcell::cuda {

// Runs the steps from `begin` to `end`, as a pass processes them, of `sweep`, whose sizes and
// addresses are set; what follows from the plan is filled in here. A pass may be run in several
// parts, one after another, with the same workspace.
void run(const Plan& plan, Sweep sweep, long long begin, long long end, void* stream);

}  // namespace fastcell::cuda
