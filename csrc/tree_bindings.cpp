#include "tree_bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/tree_levels.h"
#include "pointers.h"

namespace py = pybind11;

namespace fastcell {
namespace {

py::tuple levels(int64_t nodes, Pointer parents, bool number, Pointer positions, Pointer order,
                 Pointer level_offsets, Pointer child_offsets, Pointer children) {
  const TreeLevels found = [&] {
    py::gil_scoped_release release;
    return tree_levels(nodes, as<const int64_t>(parents), number, as<int64_t>(positions),
                       as<int64_t>(order), as<int64_t>(level_offsets), as<int64_t>(child_offsets),
                       as<int64_t>(children));
  }();
  const char* const faults[] = {"", "cycle", "same position"};
  return py::make_tuple(found.levels, found.most_children, found.most_position,
                        faults[int(found.fault)], found.node);
}

// A recursive cell at its sizes.
class BoundTree {
 public:
  BoundTree(const Kernels& kernels, const std::string& cell, const std::string& dtype,
            int64_t input, int64_t hidden, int arity)
      : cell_(named(*kernels.trees, cell, dtype == "float64")) {
    if ((dtype != "float32" && dtype != "float64") || input < 0 || hidden <= 0 || arity < 0) {
      throw std::invalid_argument(
          "a tree cell needs dtype float32 or float64, input >= 0, hidden > 0, arity >= 0");
    }
    sizes_.dtype = dtype == "float64" ? DType::kFloat64 : DType::kFloat32;
    sizes_.input = input;
    sizes_.hidden = hidden;
    sizes_.arity = arity;
  }

  // What a forward call keeps for its backward call, per node.
  int64_t kept_elements() const {
    if (cell_.states < 2) return 0;  // the backward call reads h itself
    const int64_t padded = (sizes_.hidden + cell_.lanes - 1) / cell_.lanes * cell_.lanes;
    return (cell_.gates + cell_.forgets) * padded;
  }

  int64_t forward_workspace(int64_t nodes, bool keep) const {
    TreeCall call = sizes_;
    call.forest.nodes = nodes;
    call.gates = keep && cell_.states > 1 ? &call : nullptr;
    return cell_.forward_workspace(call, 1);
  }
  int64_t backward_workspace(int64_t nodes, int threads) const {
    TreeCall call = sizes_;
    call.forest.nodes = nodes;
    return cell_.backward_workspace(call, threads);
  }

  void forward(const std::vector<Pointer>& forest, int64_t nodes, int64_t levels, Pointer x,
               const std::vector<Pointer>& weights, Pointer h, Pointer c, Pointer gates,
               Pointer workspace, int threads) const {
    const TreeCall call = call_of(forest, nodes, levels, x, weights, {h, c, gates, workspace});
    launch(call, nullptr, cell_.forward, threads);
  }

  void backward(const std::vector<Pointer>& forest, int64_t nodes, int64_t levels, Pointer x,
                const std::vector<Pointer>& weights, Pointer h, Pointer c, Pointer gates,
                const std::vector<Pointer>& gradients, Pointer workspace, int threads) const {
    const TreeCall call = call_of(forest, nodes, levels, x, weights, {h, c, gates, workspace});
    if (gradients.size() != 6) throw std::invalid_argument("backward: six gradients");
    const TreeGradients out{as(gradients[0]), as(gradients[1]), as(gradients[2]),
                            as(gradients[3]), as(gradients[4]), as(gradients[5])};
    launch(call, &out, cell_.backward, threads);
  }

 private:
  static const TreeCellKernels& named(const TreeKernels& all, const std::string& name,
                                      bool float64) {
    std::string names;
    for (int i = 0; i < all.cell_count; ++i) {
      const TreeCellKernels& cell = all.cells[float64 ? 1 : 0][i];
      if (name == cell.name) return cell;
      names += std::string(i ? ", " : "") + cell.name;
    }
    throw std::invalid_argument("cell must be one of " + names + ", got " + name);
  }

  struct Memory {
    Pointer h, c, gates, workspace;
  };

  TreeCall call_of(const std::vector<Pointer>& forest, int64_t nodes, int64_t levels, Pointer x,
                   const std::vector<Pointer>& weights, const Memory& memory) const {
    if (forest.size() != 6 || weights.size() != kTreeWeights) {
      throw std::invalid_argument("a tree call takes six arrays of the forest and four weights");
    }
    TreeCall call = sizes_;
    call.forest = {nodes,
                   levels,
                   as<const int64_t>(forest[0]),
                   as<const int64_t>(forest[1]),
                   as<const int64_t>(forest[2]),
                   as<const int64_t>(forest[3]),
                   as<const int64_t>(forest[4]),
                   as<const int64_t>(forest[5])};
    call.x = as(x);
    for (int i = 0; i < kTreeWeights; ++i) call.weights[i] = as(weights[size_t(i)]);
    call.h = as(memory.h);
    call.c = as(memory.c);
    call.gates = as(memory.gates);
    call.workspace = as(memory.workspace);
    return call;
  }

  // Threads pay where a level has more to compute than meeting at its end costs: about 0.1 us, and
  // up to a time slice on a machine whose cores others use as well.
  int team_size(const TreeCall& call, int threads) const {
    const double level = 2.0 * double(call.forest.nodes) / double(call.forest.levels) *
                         double(call.hidden) * (cell_.gates + cell_.forgets) *
                         double(call.hidden + call.input);
    return level < (crowded() ? 2e8 : 5e4) ? 1 : threads;
  }

  void launch(const TreeCall& call, const TreeGradients* out,
              void (*kernel)(const TreeCall&, const TreeGradients*, const Team&),
              int threads) const {
    if (call.forest.nodes == 0) return;
    struct Job {
      const TreeCall& call;
      const TreeGradients* out;
      void (*kernel)(const TreeCall&, const TreeGradients*, const Team&);
    } job{call, out, kernel};
    const int size = team_size(call, threads);
    py::gil_scoped_release release;
    run_team(
        size,
        [](const Team& team, Barrier*, const void* context) {
          const Job& job = *static_cast<const Job*>(context);
          job.kernel(job.call, job.out, team);
        },
        &job);
  }

  TreeCall sizes_{};
  const TreeCellKernels& cell_;
};

}  // namespace

void bind_trees(py::module_& m, const Kernels& (*kernels)()) {
  m.def("tree_levels", &levels, py::arg("nodes"), py::arg("parents"), py::arg("number"),
        py::arg("positions"), py::arg("order"), py::arg("level_offsets"), py::arg("child_offsets"),
        py::arg("children"));
  py::class_<BoundTree>(m, "Tree", "A recursive cell at its sizes, with the kernels that run it.")
      .def(py::init([kernels](const std::string& cell, const std::string& dtype, int64_t input,
                              int64_t hidden, int arity) {
             return BoundTree(kernels(), cell, dtype, input, hidden, arity);
           }),
           py::arg("cell"), py::arg("dtype"), py::arg("input"), py::arg("hidden"), py::arg("arity"))
      .def_property_readonly("kept_elements", &BoundTree::kept_elements)
      .def("forward_workspace", &BoundTree::forward_workspace)
      .def("backward_workspace", &BoundTree::backward_workspace)
      .def("forward", &BoundTree::forward)
      .def("backward", &BoundTree::backward);
}

}  // namespace fastcell
