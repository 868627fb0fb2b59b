// From parents to a schedule: the children of each node, and the nodes level by level.
#pragma once

#include "../common/tree.h"

namespace fastcell {

enum class TreeFault { kNone, kCycle, kSamePosition };

struct TreeLevels {
  int64_t levels;
  int64_t most_children;
  int64_t most_position;  // -1 without children
  TreeFault fault;
  int64_t node;  // on the cycle, or a sibling at whose position there is another
};

// Fills the arrays of a forest of parents in [-1, nodes): order (nodes), level_offsets (room for
// nodes + 1), child_offsets (nodes + 1), children (nodes). `positions` (nodes) are read, or with
// `number` written: 0, 1, .. among siblings in the order of the nodes.
TreeLevels tree_levels(int64_t nodes, const int64_t* parents, bool number, int64_t* positions,
                       int64_t* order, int64_t* level_offsets, int64_t* child_offsets,
                       int64_t* children);

}  // namespace fastcell
