// The CUDA kernels for trees as threads of this machine, without Python: for ThreadSanitizer.
//
// The threads of a launch have nothing from each other but through the barrier of a block. So it is
// reported if two of them write one number, or one reads what another writes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/gpu_emulated.h"
#include "cuda/shared_layout.h"
#include "cuda/tree_run.h"

namespace {

using namespace fastcell::cuda;
using Numbers = std::vector<long long>;

// Nodes in the order of their levels, each level's the children of the next one's in turn: the
// first nodes of a level have the most.
struct Trees {
  Numbers level_offsets{0, 70, 90, 93, 94}, level_edges{0}, order, edge, first_edge{0}, owner,
      child, position;
  long long most_children = 0;

  Trees() {
    const size_t nodes = size_t(level_offsets.back());
    edge.assign(nodes, -1);
    for (size_t n = 0; n < nodes; ++n) order.push_back((long long)(n));
    level_edges.push_back(0);
    for (size_t l = 1; l + 1 < level_offsets.size(); ++l) {
      const long long below = level_offsets[l - 1], first = level_offsets[l];
      const long long size = level_offsets[l + 1] - first;
      for (long long n = 0; n < size; ++n) {
        for (long long k = below + n; k < first; k += size) {
          edge[size_t(k)] = (long long)(child.size());
          owner.push_back((long long)(first_edge.size()) - 1);
          child.push_back(k);
          position.push_back((k - below) / size);
          most_children = std::max(most_children, position.back() + 1);
        }
        first_edge.push_back((long long)(child.size()));
      }
      level_edges.push_back((long long)(child.size()));
    }
  }
};

struct Cell {
  const char* name;
  int gates, forgets;
};

std::mt19937 generator(1);

template <class R>
std::vector<R> random(long long count) {
  std::vector<R> made(static_cast<size_t>(count));
  for (R& x : made) x = R(double(generator()) / 0x1p32 - 0.5);
  return made;
}
template <class R>
std::vector<R> unwritten(long long count) {
  return std::vector<R>(size_t(count), std::numeric_limits<R>::quiet_NaN());
}

// Forward and backward. Whether all that is a result was written.
template <class R>
bool run_passes(const Trees& trees, const Cell& cell, bool sums) {
  constexpr int H = 19, kChunk = kChunkBytes / int(sizeof(R));
  const auto padded = [](long long n) { return (n + kChunk - 1) / kChunk * kChunk; };
  const long long nodes = trees.level_offsets.back(), leaves = trees.level_offsets[1];
  const long long inner = nodes - leaves, edges = (long long)(trees.child.size());
  const long long positions = sums ? 1 : trees.most_children;
  const long long columns = (cell.gates + (sums ? 0 : cell.forgets * positions)) * H;
  const long long seen_width = padded(positions * H), edge_width = padded(H);
  const long long d_width = padded(columns);
  const auto packed = [&](long long to, long long width) {
    return random<R>((to + kProductColumns - 1) / kProductColumns * kProductColumns * width);
  };
  const auto rows = [](long long count, long long width) {
    return unwritten<R>((count + kProductRows) * width);
  };

  auto terms = random<R>(nodes * (cell.gates + cell.forgets) * H);
  auto h = unwritten<R>(nodes * H), c = h, gates = unwritten<R>(nodes * cell.gates * H);
  auto forget = unwritten<R>(edges * H), products = unwritten<R>(inner * columns);
  auto seen = rows(inner, seen_width), edge_seen = rows(edges, edge_width);
  auto weights = packed(columns, seen_width), edge_weights = packed(H, edge_width);
  const bool by_edge = sums && cell.forgets > 0;

  TreeRun call{};
  call.cell = cell.name;
  call.real = sizeof(R) == 8 ? "float64" : "float32";
  call.levels = (long long)(trees.level_offsets.size()) - 1;
  call.level_offsets = trees.level_offsets.data();
  call.level_edges = trees.level_edges.data();
  call.weights = weights.data();
  call.edge_weights = by_edge ? edge_weights.data() : nullptr;
  TreeLevel& level = call.level;
  level.forest = {trees.order.data(), trees.edge.data(),  trees.first_edge.data(),
                  trees.owner.data(), trees.child.data(), trees.position.data()};
  level.terms = terms.data();
  level.h = h.data();
  level.c = c.data();
  level.gates = cell.forgets ? gates.data() : nullptr;
  level.forget = forget.data();
  level.seen = seen.data();
  level.edge_seen = by_edge ? edge_seen.data() : nullptr;
  level.products = products.data();
  level.hidden = H;
  level.positions = int(positions);
  level.sums = sums;
  level.seen_width = int(seen_width);
  level.edge_width = int(edge_width);
  level.columns = int(columns);
  level.d_width = int(d_width);
  run(call);

  const auto d_h = random<R>(nodes * H);
  auto d_terms = unwritten<R>(nodes * (cell.gates + cell.forgets) * H);
  std::vector<R> d_products(size_t((inner + kProductRows) * d_width));
  std::vector<R> d_forget(size_t((edges + kProductRows) * edge_width));
  auto d_edge_c = unwritten<R>(edges * H), d_edge_seen = d_edge_c;
  auto d_seen = unwritten<R>(inner * positions * H);
  weights = packed(positions * H, d_width);
  call.weights = weights.data();
  call.backward = call.again = true;
  level.d_h = level.d_c = d_h.data();
  level.d_terms = d_terms.data();
  level.d_products = d_products.data();
  level.d_forget = d_forget.data();
  level.d_edge_c = d_edge_c.data();
  level.d_seen = d_seen.data();
  level.d_edge_seen = by_edge ? d_edge_seen.data() : nullptr;
  run(call);
  for (const auto* written : {&h, &d_terms, &d_seen}) {
    for (const R x : *written) {
      if (!std::isfinite(x)) return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  Trees trees;
  const Cell lstm{"tree_lstm", 3, 1};
  if (count > 1 && std::string(arguments[1]) == "order") {  // two nodes of a level have one row
    trees.order[3] = trees.order[2];
    run_passes<float>(trees, lstm, true);
    return 0;
  }
  int passes = 0, failures = 0;
  for (const Cell& cell : {lstm, Cell{"tree_rnn_tanh", 1, 0}, Cell{"tree_rnn_relu", 1, 0}}) {
    for (const bool sums : {true, false}) {
      failures += !run_passes<float>(trees, cell, sums);
      failures += !run_passes<double>(trees, cell, sums);
      passes += 4;
    }
  }
  std::printf("%d passes, %d failures\n", passes, failures);
  return failures ? 1 : 0;
}
