#include <pybind11/stl.h>

#include <array>
#include <string>

#include "../pointers.h"
#include "bindings.h"
#include "tree_run.h"

namespace py = pybind11;

namespace fastcell {
namespace {

// The members of TreeLevel that are addresses, in their order; 0 for null.
constexpr size_t kLevelPointers = 22;
cuda::TreeLevel level_of(const std::array<Pointer, kLevelPointers>& p) {
  using Numbers = const long long;
  cuda::TreeLevel level{};
  level.forest = {as<Numbers>(p[0]), as<Numbers>(p[1]), as<Numbers>(p[2]),
                  as<Numbers>(p[3]), as<Numbers>(p[4]), as<Numbers>(p[5])};
  level.terms = as(p[6]);
  level.h = as(p[7]);
  level.c = as(p[8]);
  level.gates = as(p[9]);
  level.forget = as(p[10]);
  level.seen = as(p[11]);
  level.edge_seen = as(p[12]);
  level.products = as(p[13]);
  level.d_h = as(p[14]);
  level.d_c = as(p[15]);
  level.d_terms = as(p[16]);
  level.d_products = as(p[17]);
  level.d_forget = as(p[18]);
  level.d_edge_c = as(p[19]);
  level.d_seen = as(p[20]);
  level.d_edge_seen = as(p[21]);
  return level;
}

}  // namespace

void bind_cuda_trees(py::module_& module) {
  module.def(
      "cuda_tree",
      [](int device, const std::string& cell, const std::string& real, bool backward, bool again,
         long long levels, Pointer level_offsets, Pointer level_edges, int hidden, int positions,
         bool sums, const std::array<int, 4>& widths,
         const std::array<Pointer, kLevelPointers>& pointers, Pointer weights, Pointer edge_weights,
         Pointer stream) {
        cuda::TreeRun run{device,
                          cell,
                          real,
                          backward,
                          again,
                          levels,
                          as<const long long>(level_offsets),
                          as<const long long>(level_edges),
                          level_of(pointers),
                          as(weights),
                          as(edge_weights),
                          as(stream)};
        run.level.hidden = hidden;
        run.level.positions = positions;
        run.level.sums = sums;
        run.level.seen_width = widths[0];
        run.level.edge_width = widths[1];
        run.level.columns = widths[2];
        run.level.d_width = widths[3];
        const py::gil_scoped_release release;
        cuda::run(run);
      },
      py::arg("device"), py::arg("cell"), py::arg("real"), py::arg("backward"), py::arg("again"),
      py::arg("levels"), py::arg("level_offsets"), py::arg("level_edges"), py::arg("hidden"),
      py::arg("positions"), py::arg("sums"), py::arg("widths"), py::arg("pointers"),
      py::arg("weights"), py::arg("edge_weights"), py::arg("stream"));
}

}  // namespace fastcell
