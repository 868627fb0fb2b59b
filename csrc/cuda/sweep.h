// One launch's parameter: a layer, in one or both directions, over some or all of its steps.
#pragma once

#include "../common/noise.h"
#include "../common/options.h"

namespace fastcell::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPairs = 2;  // (sample, hidden unit) pairs of a thread
// A step's two parts: the cell, and with a projection the output made of it.
constexpr int kCell = 1, kOutput = 2;

// Steps are counted as they are processed: step s of a pass is t = s or, where the pass goes back
// in time (a reverse direction's forward pass, a forward direction's backward pass), T - 1 - s.
//
// Elements are numbers as stored (E: 16 bits, float, double), reals those of sums and states (R:
// float, double). Rows are (t, b), time-major; packed sequences have no rows for ended samples.
struct Side {
  // Weights of the product with h (backward: with the gates' gradients), and of the projection
  // (backward: with h's gradient), packed.
  const void* weights;
  const void* projection;
  // R (rows, gate_stride). Forward: the gates' input terms, overwritten by what is saved for the
  // backward pass, if anything is. Backward: what was saved.
  void* gates;
  const void* parameters;  // R (parameters, H): the cell's own vectors, or null
  const void* factors;     // R (B, P), of h in the recurrent product, or null
  const void* apart_bias;  // R (apart * H): biases of the recurrent terms that stay apart, or null
  // What passes from step to step, R: h (B, P) and c (B, H), in the backward pass their gradients.
  void* carry[2];
  // What the products multiply, E, zero where no sample or unit is: [2][tiles * tile rows][stride]
  // (row_stride() of shared_layout.h).
  void* exchange;
  void* exchange_projected;  // with a projection: what it multiplies, [tiles * tile rows][stride]
  void* cells;               // R (rows, H): c_t, or null (forward: not kept)
  const void* first[2];      // E (B, P) and R (B, H): the states before the first step; backward
  void* cell_output;         // E (rows, H), projection: what it was applied to, or null
  void* d_gates;             // E (rows, (gates + apart + parameters) * H): backward
  void* d_output;            // E (rows, P), projection: h's gradient; backward
  const void* d_cells;       // R (rows, directions * H), from this direction's columns on: of c_t
                             // as a result, or null; backward
  int* flags;                // how often each block has published: [tiles][unit_blocks]
};

struct Sweep {
  Side side[2];
  long long steps, batch;
  const long long* offsets;        // packed: T + 1 first rows; else null
  const long long* lengths;        // (B): steps of each sample; null: all
  const unsigned char* reset;      // (rows): whether a sample's states are zero before that step
  const unsigned long long* seed;  // of what zoneout draws; null: it takes the expectation
  CellOptions options;
  noise::Bits held_below[2];  // of zoneout: draws below it keep a state
  int layer;                  // index of the first direction's
  int hidden;                 // H
  int output;                 // P, or H
  int directions;
  int gate_stride;       // reals between rows of `gates`
  void* y;               // E (rows, directions * P): output; backward: as it was
  const void* d_y;       // E, likewise, or null
  long long begin, end;  // steps to process
  int stages;            // of each step: kCell, kOutput or both
  bool keep;             // forward: what the backward pass needs
  bool finish;           // backward: after the last step, h's gradient before the first one
  int width;             // numbers along k that the product takes, padded
  int projected_width;   // the same for the projection; 0 without one
  int unit_blocks;       // blocks that share the units
  int tiles;             // of the whole batch
  int row_warps;         // 16 samples each
  int unit_warps;        // 8 units each
  int k_warps;           // parts of k; row_warps * unit_warps * k_warps = kWarps
  int first_tile;        // of the batch
  int* status;           // set where waiting was given up
  long long patience;    // looks at a flag before that
};

}  // namespace fastcell::cuda
