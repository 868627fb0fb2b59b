// The kernels for trees, without Python: gradients against finite differences, float against
// double, threads against one, a chain against the kernels for sequences. For kernels.cpp alone.
#pragma once

#include "cpu/tree_levels.h"

namespace {

struct TreeProblem {
  TreeCall sizes;
  std::vector<int64_t> parents, positions, order, level_offsets, child_offsets, children;
  Values x, weights[kTreeWeights], d_h, d_c;
};

struct TreeResult {
  Values h, c, d_x, d_weights[3];
};

TreeProblem make_tree(const TreeCellKernels& cell, int arity, int64_t input, int64_t hidden,
                      const std::vector<int64_t>& parents) {
  TreeProblem p;
  p.sizes = {};
  p.sizes.input = input;
  p.sizes.hidden = hidden;
  p.sizes.arity = arity;
  p.parents = parents;
  const size_t n = parents.size();
  for (auto* v : {&p.positions, &p.order, &p.children}) v->resize(n);
  for (auto* v : {&p.level_offsets, &p.child_offsets}) v->resize(n + 1);
  const TreeLevels found =
      tree_levels(int64_t(n), p.parents.data(), true, p.positions.data(), p.order.data(),
                  p.level_offsets.data(), p.child_offsets.data(), p.children.data());
  p.sizes.forest = {
      int64_t(n),     found.levels,           p.parents.data(),       p.positions.data(),
      p.order.data(), p.level_offsets.data(), p.child_offsets.data(), p.children.data()};
  const int64_t rows = (cell.gates + cell.forgets) * hidden;
  const int64_t positions = p.sizes.positions();
  const int64_t recurrent = rows + cell.forgets * (positions - 1) * hidden;
  const double size = 1 / std::sqrt(double(hidden));
  p.x = random_values(int64_t(n) * input);
  p.weights[kInputWeight] = random_values(rows * input, size);
  p.weights[kHiddenWeight] = random_values(recurrent * positions * hidden, size);
  p.weights[kInputBias] = random_values(rows, size);
  p.weights[kHiddenBias] = random_values(rows, size);
  p.d_h = random_values(int64_t(n) * hidden);
  p.d_c = random_values(int64_t(n) * hidden);
  return p;
}

template <class T>
TreeResult run_trees(const TreeProblem& p, const TreeCellKernels& cell, int threads) {
  TreeCall call = p.sizes;
  call.dtype = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
  const int64_t nodes = call.forest.nodes, hidden = call.hidden;
  std::vector<Buffer<T>> weights;
  for (const Values& w : p.weights) weights.emplace_back(w);
  for (int i = 0; i < kTreeWeights; ++i) call.weights[i] = weights[size_t(i)].data();
  const int64_t padded = (hidden + cell.lanes - 1) / cell.lanes * cell.lanes;
  Aligned gates(nodes * (cell.gates + cell.forgets) * padded * int64_t(sizeof(T)));
  Buffer<T> x(p.x), h(size_t(nodes * hidden)), c(size_t(nodes * hidden));
  call.x = x.data();
  call.h = h.data();
  call.c = c.data();
  if (cell.states > 1) call.gates = gates.p;

  struct Job {
    const TreeCall& call;
    const TreeGradients* out;
    void (*kernel)(const TreeCall&, const TreeGradients*, const Team&);
  };
  const auto run = [&](const TreeGradients* out,
                       void (*kernel)(const TreeCall&, const TreeGradients*, const Team&)) {
    const Job job{call, out, kernel};
    run_team(
        threads,
        [](const Team& team, Barrier*, const void* context) {
          const Job& job = *static_cast<const Job*>(context);
          job.kernel(job.call, job.out, team);
        },
        &job);
  };
  Aligned forward_workspace(cell.forward_workspace(call, threads));
  call.workspace = forward_workspace.p;
  run(nullptr, cell.forward);

  Buffer<T> d_h(p.d_h), d_c(p.d_c), d_x(p.x.size());
  Buffer<T> d_ih(p.weights[kInputWeight].size()), d_hh(p.weights[kHiddenWeight].size());
  Buffer<T> d_bias(p.weights[kInputBias].size());
  const TreeGradients out{d_h.data(),  d_c.data(),  d_x.data(),
                          d_ih.data(), d_hh.data(), d_bias.data()};
  Aligned workspace(cell.backward_workspace(call, threads));
  call.workspace = workspace.p;
  run(&out, cell.backward);
  TreeResult result{h.read(), {}, d_x.read(), {d_ih.read(), d_hh.read(), d_bias.read()}};
  if (cell.states > 1) result.c = c.read();
  return result;
}

void check_tree(const TreeCellKernels& cell, int arity, const char* what, double error,
                double bound) {
  if (error <= bound) return;
  ++failures;
  std::printf("%s arity %d: %s differs by %g, allowed %g\n", cell.name, arity, what, error, bound);
}

// What the gradients say of a small move of everything at once.
void check_gradients(const TreeProblem& p, const TreeCellKernels& cell, const TreeResult& at) {
  const double move = 1e-6;
  const int64_t positions = p.sizes.positions(), hidden = p.sizes.hidden;
  const int64_t rows = int64_t(p.weights[kHiddenWeight].size()) / (positions * hidden);
  Values direction[1 + kTreeWeights];
  direction[0] = random_values(int64_t(p.x.size()));
  double slope = dot(at.d_x, direction[0]);
  for (int i = 0; i < kTreeWeights; ++i) {
    const Values along = direction[1 + i] = random_values(int64_t(p.weights[i].size()));
    if (i != kHiddenWeight) {
      slope += dot(at.d_weights[i == kInputWeight ? 0 : 2], along);
      continue;
    }
    for (int64_t k = 0; k < int64_t(along.size()); ++k) {  // one matrix per position
      const int64_t row = k / (positions * hidden), column = k % (positions * hidden);
      const int64_t matrix = column / hidden;
      slope += along[size_t(k)] *
               at.d_weights[1][size_t((matrix * rows + row) * hidden + column % hidden)];
    }
  }
  const auto loss = [&](double sign) {
    TreeProblem q = p;
    for (size_t k = 0; k < q.x.size(); ++k) q.x[k] += sign * move * direction[0][k];
    for (int i = 0; i < kTreeWeights; ++i) {
      for (size_t k = 0; k < q.weights[i].size(); ++k) {
        q.weights[i][k] += sign * move * direction[1 + i][k];
      }
    }
    const TreeResult r = run_trees<double>(q, cell, 1);
    return dot(r.h, p.d_h) + (cell.states > 1 ? dot(r.c, p.d_c) : 0);
  };
  const double measured = (loss(1) - loss(-1)) / (2 * move);
  const bool kinked = std::strstr(cell.name, "relu") != nullptr;  // a unit may pass 0 on the way
  check_tree(cell, p.sizes.arity, "gradient", std::fabs(measured - slope),
             (kinked ? 1e-2 : 1e-6) * (1 + std::fabs(slope)));
}

void check_trees(const Kernels& kernels) {
  // Two trees; a tree of three levels with two, one and no children; and a chain.
  const std::vector<int64_t> shapes[] = {
      {2, 2, -1, 2, 1, 1, 0, -1, 7}, {-1, 0, 0, 1, 2, 2, 3, 3, 6}, {1, 2, 3, 4, 5, 6, -1}};
  for (int i = 0; i < kernels.trees->cell_count; ++i) {
    const TreeCellKernels& wide = kernels.trees->cells[int(DType::kFloat64)][i];
    const TreeCellKernels& narrow = kernels.trees->cells[int(DType::kFloat32)][i];
    for (const int arity : {0, 3}) {
      for (const auto& parents : shapes) {
        for (const int64_t hidden : {1, 9, 37}) {
          const TreeProblem p = make_tree(wide, arity, 5, hidden, parents);
          const TreeResult one = run_trees<double>(p, wide, 1), two = run_trees<double>(p, wide, 2);
          const TreeResult rounded = run_trees<float>(p, narrow, 2);
          check_tree(wide, arity, "h of two threads", largest_difference(one.h, two.h), 0);
          check_tree(wide, arity, "d_x of two threads", largest_difference(one.d_x, two.d_x), 0);
          for (int k = 0; k < 3; ++k) {
            check_tree(wide, arity, "weight gradient of two threads",
                       largest_difference(one.d_weights[k], two.d_weights[k]), 0);
          }
          check_tree(wide, arity, "h (float)", largest_difference(rounded.h, one.h), 2e-5);
          check_tree(wide, arity, "d_x (float)", largest_difference(rounded.d_x, one.d_x), 1e-3);
          check_gradients(p, wide, one);
        }
      }
    }
    // The sequence kernels' cell of the same name.
    const TreeProblem p = make_tree(wide, 0, 5, 37, shapes[2]);
    const Case c{wide.name + 5, 7, 1, 5, 37, 0, 1, 1, true, false, {1, 1, 1}, false};
    const CellTable& cells = kernels.narrow_cells[int(DType::kFloat64)][0];
    for (int k = 0; k < cells.count; ++k) {
      const CellKernels& cell = cells.cells[k];
      if (std::strcmp(cell.name, c.cell)) continue;
      Problem sequence = make_problem(c, cell);
      sequence.x = p.x;
      sequence.weights.assign(p.weights, p.weights + kTreeWeights);
      for (Values& state : sequence.state) std::fill(state.begin(), state.end(), 0);
      const Result expected = run_kernels<double>(sequence, cell, c.schedule, nullptr, nullptr);
      check_tree(wide, 0, "a chain",
                 largest_difference(run_trees<double>(p, wide, 1).h, expected.y), 0);
    }
  }
}

}  // namespace
