// What the engine of cells with layer normalisation offers to the bindings.
#pragma once

#include "../common/normed.h"
#include "team.h"

namespace fastcell {

// The kernels of one cell with layer normalisation at one dtype.
struct NormedKernels {
  const char* name;
  int64_t (*kept_elements)(int64_t hidden, bool projected);  // of a row
  int64_t (*cells_at)(int64_t hidden);                       // where c lies in those
  int64_t (*forward_workspace)(const NormedCall&, int threads);
  int64_t (*backward_workspace)(const NormedCall&, int threads);
  void (*forward)(const NormedCall&, const Team&);
  void (*backward)(const NormedCall&, const NormedGradients&, const Team&);
};

struct NormedTable {
  int count;
  const NormedKernels* cells[kDTypes];
};

}  // namespace fastcell
