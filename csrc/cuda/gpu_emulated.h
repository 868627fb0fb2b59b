// What tests say to the emulated device.
#pragma once

#include "gpu.h"

namespace fastcell::cuda {

struct EmulatedKernel {
  const char* name;
  void (*run)(const void* parameter);
};
// Generated from kernel_names.py.
const EmulatedKernel* emulated_kernels(int* count);

namespace emulated {
// The device whose limits() are asked for from now on.
void pretend(const Limits& limits);
}  // namespace emulated

}  // namespace fastcell::cuda
