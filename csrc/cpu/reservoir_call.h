// The plain structures of a reservoir's run: what the bindings fill and the kernel reads.
#pragma once

#include "../common/stack.h"
#include "team.h"

namespace fastcell {

// Leaky units with fixed, sparse recurrent weights. Rows of all matrices come in slices of as many
// units as a vector has lanes; the last slice is padded with units of zeros, and every slice of the
// recurrent matrix to its longest row, with weights of 0 from the unit itself.
struct ReservoirCall {
  int64_t units, inputs;
  const int64_t* offsets;     // [slices + 1]: the entries of a slice
  const int32_t* columns;     // [entry][lane]
  const void* values;         // [entry][lane]
  const void* input_weights;  // [slice][input][lane]
  const void* bias;           // [slice][lane]
  const void* alpha;          // [slice][lane]

  int64_t samples;
  const int64_t* lengths;  // of the samples, falling; each at least 1
  const void* const* x;    // of each sample: (length, inputs)
  void* const* states;     // of each sample: (length, units); null: not asked for
  void* state;             // (samples, units): before the first step, then after the last
  Schedule schedule;       // of the blocks of samples, and of a block's units
  void* workspace;
};

struct ReservoirKernels {
  int lanes;  // of one vector: units of a slice, and samples of a block
  int64_t (*workspace_bytes)(const ReservoirCall&, int threads);
  void (*run)(const ReservoirCall&, const Team&, Barrier*);
};

}  // namespace fastcell
