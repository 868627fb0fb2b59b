// What the host side of the CUDA engine asks of a device. Two implementations: gpu_nvidia.cpp (the
// CUDA runtime) and gpu_emulated.cpp (threads of this machine, for the tests).
#pragma once

#include <cstddef>
#include <string>

namespace fastcell::cuda {

struct Limits {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int shared_per_block;  // bytes that a kernel may opt in to
  bool cooperative;      // launches whose blocks are all resident
  int max_cluster;       // blocks of the largest cluster; 1 without clusters
};

struct Launch {
  const char* kernel;  // its C++ name expression, as in kernel_names.py
  unsigned grid[3];
  unsigned block;    // threads
  unsigned cluster;  // blocks per cluster along grid[0]; 1: none
  unsigned shared;   // dynamic shared memory, bytes
  bool cooperative;  // all blocks must be resident at once
  void* stream;
};

// Each throws std::runtime_error that says what failed and on which device.
Limits limits(int device);
// Blocks of such a launch that the device holds at once; of a cluster launch, clusters times their
// size.
int resident_blocks(int device, const Launch& launch);
// The kernel's one parameter, a plain structure, by address.
void launch(int device, const Launch& launch, const void* parameter);

}  // namespace fastcell::cuda
