// The plain structures of a call over trees: see stack.h.
#pragma once

#include "stack.h"

namespace fastcell {

// Trees side by side, as a schedule: a node's level is the longest way down to a leaf, so that all
// children of a level's nodes lie in the levels before it.
struct Forest {
  int64_t nodes, levels;
  const int64_t* parents;        // (nodes), -1 at a root
  const int64_t* positions;      // (nodes), among the children of the parent
  const int64_t* order;          // (nodes), level by level, leaves first
  const int64_t* level_offsets;  // (levels + 1)
  const int64_t* child_offsets;  // (nodes + 1)
  const int64_t* children;       // node by node, by position

  FASTCELL_INLINE int64_t child_count(int64_t node) const {
    return child_offsets[node + 1] - child_offsets[node];
  }
  // The child at a position, -1 if there is none.
  FASTCELL_INLINE int64_t child_at(int64_t node, int64_t position) const {
    for (int64_t e = child_offsets[node]; e < child_offsets[node + 1]; ++e) {
      if (positions[children[e]] == position) return children[e];
    }
    return -1;
  }
};

enum TreeWeight { kInputWeight, kHiddenWeight, kInputBias, kHiddenBias, kTreeWeights };

// Weights are torch's: rows of gates, i, f, g, o. An N-ary cell has a recurrent matrix (., N
// hidden) with one block of columns per position, and one block of f's rows per position in it.
struct TreeCall {
  DType dtype;
  int64_t input, hidden;
  int arity;  // N; 0: the sum of the children
  Forest forest;
  const void* x;                      // (nodes, input)
  const void* weights[kTreeWeights];  // biases null: none
  void* h;                            // (nodes, hidden)
  void* c;                            // the same, of cells that have it
  void* gates;                        // kept for the backward call, or null
  void* workspace;

  FASTCELL_INLINE int positions() const { return arity > 0 ? arity : 1; }
};

// Of the backward call; null: not asked for, or zero where it comes in.
struct TreeGradients {
  const void *d_h, *d_c;  // (nodes, hidden)
  void* d_x;
  void* d_w_ih;
  void* d_w_hh;  // (positions, rows, hidden): one matrix per block of columns
  void* d_bias;  // of each of the two
};

}  // namespace fastcell
