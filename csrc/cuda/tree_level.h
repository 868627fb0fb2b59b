// The parameters of the kernels for trees: a level of a forest, and products of its rows.
//
// Nodes are counted level by level, leaves first; that is their rank. All but the leaves are inner
// nodes, which are counted from 0 on in the same order, and so are edges, by the parent and its
// children's positions: what belongs to a level lies together in each of the three.
#pragma once

namespace fastcell::cuda {

struct TreeForest {
  const long long* order;       // (nodes): a rank's row of the caller's tensors
  const long long* edge;        // (nodes): of the node of a rank and its parent; -1 at a root
  const long long* first_edge;  // (inner + 1)
  const long long* owner;       // (edges): the parent, as an inner node
  const long long* child;       // (edges): its row
  const long long* position;    // (edges): among the parent's children
};

// All numbers are of one kind. "By position": a block of H columns for each that a node's children
// can have, zero where there is none; with sums over children one block, of the sum. Gates are in
// the order of the rows of torch's weights; with sums over children the forget gate's recurrent
// term is not a node's but an edge's.
struct TreeLevel {
  TreeForest forest;
  const void* terms;  // (nodes, gates and forget gate): input terms with biases
  void* h;            // (nodes, H)
  void* c;            // (nodes, H), of cells that have it
  void* gates;        // (nodes by rank, gates), or null: not kept
  void* forget;       // (edges, H): forget gates, before that the edges' recurrent terms; or null
  // What recurrent products take, padded with zeros, and what they give.
  void* seen;            // (inner nodes of the level, seen_width): the children's h, by position
  void* edge_seen;       // (edges of the level, edge_width): the child's h, or null
  const void* products;  // (inner nodes of the level, columns): terms of gates and forget gates
  // Backward; edges and inner nodes are those of all levels.
  const void* d_h;          // (nodes, H), or null
  const void* d_c;          // (nodes, H), or null
  void* d_terms;            // (nodes, gates and forget gate): those of a node's children added up
  void* d_products;         // (inner, d_width): of the recurrent terms
  void* d_forget;           // (edges, edge_width): with sums over children, of the edges' terms
  void* d_edge_c;           // (edges, H): of the child's c
  const void* d_seen;       // (inner, positions * H)
  const void* d_edge_seen;  // (edges, H), or null
  long long begin, end;     // ranks
  long long edge_begin, edge_end;  // of these nodes and their children
  long long leaves;
  int hidden, positions;
  bool sums;  // over children
  int seen_width, edge_width, columns, d_width;
};

// Rows of numbers by packed weights.
struct RowProduct {
  const void* rows;     // E (count, width), and behind them room for a tile
  const void* weights;  // [columns / kProductColumns][chunk of k][kProductGroups][8][64 bytes]
  void* to;             // R (count, columns)
  long long count;
  int width;  // along k, padded to whole chunks
  int columns;
  int tiles;  // of rows
};
struct RowProducts {
  RowProduct part[2];
};
// A block's share: its warps are two of rows and four parts of k, whatever the size, so that a
// row's result depends on no other row.
constexpr int kProductRowWarps = 2, kProductParts = 4, kProductGroups = 4;
constexpr int kProductRows = 16 * kProductRowWarps, kProductColumns = 8 * kProductGroups;

}  // namespace fastcell::cuda
