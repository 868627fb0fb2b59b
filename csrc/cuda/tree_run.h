// From a forest and tensors' addresses to launches, level by level.
#pragma once

#include <string>

#include "tree_level.h"

namespace fastcell::cuda {

struct TreeRun {
  int device;
  std::string cell, real;  // in Python; "float32" or "float64"
  bool backward;
  bool again;  // backward: `seen` and `edge_seen` are made once more, those of all levels
  long long levels;
  const long long* level_offsets;  // (levels + 1): ranks; on the host
  const long long* level_edges;    // (levels + 1): edges of the inner nodes of the levels before
  TreeLevel level;                 // all but which nodes
  const void* weights;             // packed: of the inner nodes' product, and of the edges'
  const void* edge_weights;
  void* stream;
};

// Throws std::invalid_argument for a cell or a kind of number that has no kernels.
void run(const TreeRun& run);

}  // namespace fastcell::cuda
