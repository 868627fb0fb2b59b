// The launches' parameters in a step of a layer with layer normalisation: of the part behind the
// recurrent product, and of the products.
#pragma once

#include "sweep.h"

namespace fastcell::cuda {

// A block adds up to kMaxSums sums at a time, each over its threads and then over kSumRows parts.
constexpr int kMaxSums = 4, kSumRows = 16;
constexpr int kNormedShared = kMaxSums * (kThreads + kSumRows) * int(sizeof(double));

// Numbers as in sweep.h: elements (E) as stored, reals (R) of sums and states. Rows are (t, b).
struct NormedStep {
  long long hidden;           // H
  long long output;           // numbers of h: P, or H
  long long width;            // elements between rows of `operand`
  long long projected_width;  // elements between rows of `projected`
  bool tf32;                  // whether products see TF32, to which operands are rounded
  // Of this step and of the one whose states it begins with: number, samples (the first ones of the
  // batch; 0 if there is no such step), where their rows begin.
  long long t, alive, first;
  long long past_t, past_alive, past_first;
  const long long* lengths;    // (B): steps of each sample; null: all
  const unsigned char* reset;  // (rows): whether states are zero before that step; or null

  const void* terms;       // R (rows, G*H): the gates' input terms
  const void* gain;        // R (G*H): of the recurrent terms' norm
  const void* bias;        // R (G*H), added behind it, or null
  const void* cell_norm;   // R (2, H): LSTM, gain and bias of c's norm
  const void* parameters;  // R (N, H): the cell's vectors
  void* carry[2];          // R (B, P), (B, H): h and c, in the backward pass their gradients
  void* sums;              // R: what the product made; forward (B, G*H), backward (B, H)
  void* operand;           // E (., width): what the recurrent product takes
  void* projected;         // E (., projected_width): what the projection's takes; null without one
  void* y;                 // E (rows, P)

  // Kept for the backward pass, or null.
  void* normed;        // R (rows, G*H): normalised sums
  void* gates;         // R (rows, saved*H)
  void* cells;         // R (2, rows, H): LSTM, c_t and its normalised numbers
  void* scales;        // R (rows, norms): 1 / sqrt(variance + epsilon)
  long long all_rows;  // of the sequence

  // The backward pass.
  long long fed;         // samples, the first ones, for which `sums` has a gradient of h
  const void* state[2];  // E (B, P), R (B, H): before the first step, or null for zeros
  const void* d_y;       // E (rows, P), or null
  const void* d_cells;   // R (rows, H): of c at all steps, besides; or null
  void* d_terms;         // R (rows, G*H)
  void* d_normed;        // R (rows, G*H): behind the recurrent terms' norm; d_terms if they equal
  void* d_sums;          // E (rows, G*H): before it
  void* d_cell;          // R (rows, H): LSTM, behind c's norm
  void* before;          // E (rows, P): h before each step
  void* d_parameters;    // R (rows, N*H)
  void* cell_output;     // E (rows, H): what a projection was applied to
  void* d_output;        // E (rows, P): the gradient of what it made
};

// Of a product, and of what finishes a step behind one.
struct NormedProduct {
  Sweep product;
  NormedStep step;
};

}  // namespace fastcell::cuda
