// What the CPU engine offers to the bindings: one table of functions per instruction set.
#pragma once

#include "../common/stack.h"
#include "../common/tree.h"
#include "team.h"

namespace fastcell {

// The kernels of one cell at one dtype and one kind of products.
struct CellKernels {
  const char* name;
  int saved;  // values kept per hidden unit and row for the backward call
  int states;
  int gates;
  int parameters;
  bool recurrent;
  int lanes;  // of one vector
  int64_t (*packed_bytes)(const Stack&);
  void (*pack)(const Stack&, const void* const* weights, void* packed, const Team&);
  int64_t (*forward_workspace)(const ForwardCall&, int threads);
  void (*forward)(const ForwardCall&, const Team&, Barrier*);
  int64_t (*backward_workspace)(const BackwardCall&, int threads);  // null: forward only
  void (*backward)(const BackwardCall&, const Team&, Barrier*);
};

struct CellTable {
  const CellKernels* cells;
  int count;
};

// The kernels of one recursive cell at one dtype.
struct TreeCellKernels {
  const char* name;
  int states;
  int gates, forgets;  // of a node, and of each of its children
  int lanes;
  int64_t (*forward_workspace)(const TreeCall&, int threads);
  int64_t (*backward_workspace)(const TreeCall&, int threads);
  void (*forward)(const TreeCall&, const TreeGradients*, const Team&);
  void (*backward)(const TreeCall&, const TreeGradients*, const Team&);
};

struct TreeKernels {
  int cell_count;
  const TreeCellKernels* cells[kDTypes];
};

struct NormedTable;       // normed_table.h
struct ReservoirKernels;  // reservoir_call.h
struct LinearKernels;     // linear_call.h

struct Kernels {
  const char* isa;
  CellTable narrow_cells[kDTypes][kProducts];  // of count 0: there are none
  CellTable other_cells[kDTypes];              // for exact products alone
  const ReservoirKernels* reservoir;           // of each dtype
  // The vector functions over an array, for the tests of their contract.
  void (*tanh)(DType, const void* x, void* y, int64_t count);
  void (*sigmoid)(DType, const void* x, void* y, int64_t count);
  // For the benchmark's limits: FMA operations done, and bytes read (`sink` keeps them alive).
  int64_t (*run_fma)(int64_t rounds, float* sink);
  void (*read)(const float* from, int64_t count, float* sink);
  // Dropout: each element zeroed with that probability, by what the seed draws; the others scaled.
  void (*drop)(DType, const void* from, void* to, int64_t count, uint64_t seed, double probability);
  uint64_t (*hash)(const void* from, int64_t bytes, uint64_t start);
  const TreeKernels* trees;
  const NormedTable* normed;
  const LinearKernels* linear;  // of each dtype
};

// The instruction sets compiled in, lowest first, and whether this CPU has them.
const Kernels* const* compiled_kernels(int* count);
bool supported(const Kernels& kernels);

// The set in use: the highest supported, or FASTCELL_ISA if set. Null with `error` set if
// FASTCELL_ISA names something that is not there.
const Kernels* choose_kernels(const char* wanted, const char** error);

// Whether AVX-512 kernels divide by estimate (simd.h, quotient()): by what the CPU is.
extern bool estimate_quotients;
// Whether the instructions of AVX-512 BF16 and VNNI are used (precision.h): by what the CPU has.
extern bool bfloat16_dots, int8_dots;
bool has_bfloat16_dots();
bool has_int8_dots();

// How `threads` threads should share a call; without `barriers`, only in ways that need none per
// step. `wavefront`: layers apart, too, which is for the forward pass and without masks.
Schedule choose_schedule(const Stack& stack, const Timeline& time, const CellKernels& cell,
                         int threads, bool barriers, bool wavefront);

}  // namespace fastcell
