// The plain structs of linear layers and activations.
#pragma once

#include "../common/stack.h"

namespace fastcell {

struct LinearCall {
  int64_t in, out;       // features
  int64_t steps, batch;  // rows of x
  RowMap<const char> x;  // in elements; base as bytes
  const void* packed;    // what pack() made
  void* y;               // (steps * batch, out)
};

// Of one dtype.
struct LinearKernels {
  int64_t (*packed_bytes)(int64_t in, int64_t out);
  void (*pack)(int64_t in, int64_t out, const void* weight, const void* bias, void* packed);
  void (*run)(const LinearCall&, int64_t begin, int64_t end);  // of these rows
  void (*activate)(Activation, const void* from, void* to, int64_t count);
};

}  // namespace fastcell
