#include "tree_levels.h"

#include <algorithm>
#include <vector>

namespace fastcell {

TreeLevels tree_levels(int64_t nodes, const int64_t* parents, bool number, int64_t* positions,
                       int64_t* order, int64_t* level_offsets, int64_t* child_offsets,
                       int64_t* children) {
  TreeLevels found{0, 0, -1, TreeFault::kNone, -1};
  std::fill(child_offsets, child_offsets + nodes + 1, 0);
  for (int64_t i = 0; i < nodes; ++i) {
    if (parents[i] >= 0) ++child_offsets[parents[i] + 1];
  }
  std::vector<int64_t> pending(static_cast<size_t>(nodes));  // children whose level is not known
  for (int64_t i = 0; i < nodes; ++i) {
    pending[size_t(i)] = child_offsets[i + 1];
    found.most_children = std::max(found.most_children, child_offsets[i + 1]);
    child_offsets[i + 1] += child_offsets[i];
  }
  std::vector<int64_t> filled(static_cast<size_t>(nodes));
  for (int64_t i = 0; i < nodes; ++i) {
    if (parents[i] < 0) {
      if (number) positions[i] = 0;
      continue;
    }
    const int64_t rank = filled[size_t(parents[i])]++;
    children[child_offsets[parents[i]] + rank] = i;
    if (number) positions[i] = rank;
  }
  for (int64_t i = 0; i < nodes; ++i) {
    int64_t *begin = children + child_offsets[i], *end = children + child_offsets[i + 1];
    if (begin == end) continue;
    std::sort(begin, end, [&](int64_t a, int64_t b) {
      return positions[a] != positions[b] ? positions[a] < positions[b] : a < b;
    });
    for (int64_t* k = begin + 1; k < end; ++k) {
      if (positions[k[0]] == positions[k[-1]]) {
        found.fault = TreeFault::kSamePosition;
        found.node = *k;
        return found;
      }
    }
    found.most_position = std::max(found.most_position, positions[end[-1]]);
  }

  // A node's level is known once those of its children are: `order` serves as the queue.
  std::vector<int64_t> level(static_cast<size_t>(nodes));
  int64_t known = 0;
  for (int64_t i = 0; i < nodes; ++i) {
    if (pending[size_t(i)] == 0) order[known++] = i;
  }
  for (int64_t next = 0; next < known; ++next) {
    const int64_t node = order[next], parent = parents[node];
    found.levels = std::max(found.levels, level[size_t(node)] + 1);
    if (parent < 0) continue;
    level[size_t(parent)] = std::max(level[size_t(parent)], level[size_t(node)] + 1);
    if (--pending[size_t(parent)] == 0) order[known++] = parent;
  }
  if (known < nodes) {
    // From a node that was not reached the way up does not end: it leads onto a cycle.
    int64_t node = std::find_if(pending.begin(), pending.end(), [](int64_t n) { return n > 0; }) -
                   pending.begin();
    for (int64_t i = 0; i < nodes; ++i) node = parents[node];
    found.fault = TreeFault::kCycle;
    found.node = node;
    return found;
  }

  // The nodes of a level in their own order: neighbours in memory.
  std::fill(level_offsets, level_offsets + found.levels + 1, 0);
  for (int64_t i = 0; i < nodes; ++i) ++level_offsets[level[size_t(i)] + 1];
  for (int64_t l = 0; l < found.levels; ++l) level_offsets[l + 1] += level_offsets[l];
  std::vector<int64_t> next(level_offsets, level_offsets + found.levels);
  for (int64_t i = 0; i < nodes; ++i) order[next[size_t(level[size_t(i)])]++] = i;
  return found;
}

}  // namespace fastcell
