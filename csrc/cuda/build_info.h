// What this build has of CUDA; without CUDA, nothing. Asks no device and no driver.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace fastcell::cuda {

// "sm_80" for machine code, "compute_100" for PTX, in the order of the build.
std::vector<std::string> architectures();
// 12090 for 12.9; 0 without CUDA.
int runtime_version();
// (architecture, machine code or PTX) of every embedded module.
std::vector<std::pair<std::string, std::string>> images();
// The compiler's report as JSON: {"compiler": "NVRTC 12.9", "options": [...], "architectures":
// {"sm_80": {"bytes": .., "modules": .., "kernels": {NAME: {"registers": .., "spill_stores": ..,
// "spill_loads": .., "stack": .., "shared": ..}}}}}, sizes in bytes; PTX kernels have null.
// Without CUDA, {}.
const char* report_json();

}  // namespace fastcell::cuda
