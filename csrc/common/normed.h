// The plain structures of a layer with layer normalisation: one layer, one direction, after its
// input terms have been computed and normalised.
#pragma once

#include "stack.h"

namespace fastcell {

struct NormedCall {
  DType dtype;
  int64_t hidden;
  Timeline time;
  bool reverse;
  const void* terms;              // (rows, G*H): the gates' input terms
  const void* weights;            // (G*H, H)
  const void* gain;               // (G*H), of the recurrent terms' norm
  const void* bias;               // (G*H), added behind it, or null
  const void* cell_norm;          // LSTM: (2, H), gain and bias of c's norm
  const void* state[kMaxStates];  // (B, H), or null for zeros
  void* final_state[kMaxStates];
  const uint8_t* reset;  // (rows), or null
  void* y;               // (rows, H)
  void* kept;            // (rows, kept elements): written forward, if there, and read backward
  void* workspace;
};

// What the backward call reads and writes besides.
struct NormedGradients {
  const void* d_y;                  // (rows, H), or null
  const void* d_final[kMaxStates];  // null: zero
  void* d_state[kMaxStates];
  void* d_terms;   // (rows, G*H)
  void* d_sums;    // (rows, G*H): of the products with the weights, before their norm
  void* d_normed;  // (rows, G*H): behind it
  void* d_cell;    // LSTM: (rows, H): behind c's norm
  void* before;    // (rows, H): h before each step
};

}  // namespace fastcell
