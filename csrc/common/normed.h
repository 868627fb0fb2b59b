// The plain structures of a layer with layer normalisation: one layer, one direction.
#pragma once

#include "stack.h"

namespace fastcell {

struct NormedCall {
  DType dtype;
  int64_t features;
  int64_t hidden;
  int64_t output;  // of h: hidden, or what the projection makes of it
  Timeline time;
  bool reverse;
  const void* x;                  // (rows, features)
  const void* weights[2];         // (G*H, features) of the input, (G*H, output) of h
  const void* gains[2];           // (G*H), of their products' norms
  const void* biases[2];          // (G*H), added behind them, or null
  const void* cell_norm;          // LSTM: (2, H), gain and bias of c's norm
  const void* projection;         // (output, H), or null
  const void* parameters;         // (parameters, H)
  const void* state[kMaxStates];  // (B, .), or null for zeros
  void* final_state[kMaxStates];
  const uint8_t* reset;  // (rows), or null
  void* y;               // (rows, output)
  void* kept;            // (rows, kept elements): written forward, if there, and read backward
  void* workspace;
};

// What the backward call reads and writes besides; null: zero, or not asked for.
struct NormedGradients {
  const void* d_y;  // (rows, output)
  const void* d_final[kMaxStates];
  const void* d_cells;  // (rows, H): of c at all steps, besides
  void* d_state[kMaxStates];
  void* d_x;
  void* d_weights[2];
  void* d_gains[2];
  void* d_biases[2];
  void* d_cell_norm;
  void* d_projection;
  void* d_parameters;
};

}  // namespace fastcell
