#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"
#include "tree_run.h"

namespace py = pybind11;

namespace fastcell {
namespace {

using Pointer = std::uintptr_t;

template <class T = void>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// The members of TreeLevel that are addresses, in their order; 0 for null.
constexpr size_t kLevelPointers = 22;
cuda::TreeLevel level_of(const std::array<Pointer, kLevelPointers>& p) {
  using Numbers = const long long;
  cuda::TreeLevel level{};
  level.forest = {at<Numbers>(p[0]), at<Numbers>(p[1]), at<Numbers>(p[2]),
                  at<Numbers>(p[3]), at<Numbers>(p[4]), at<Numbers>(p[5])};
  level.terms = at(p[6]);
  level.h = at(p[7]);
  level.c = at(p[8]);
  level.gates = at(p[9]);
  level.forget = at(p[10]);
  level.seen = at(p[11]);
  level.edge_seen = at(p[12]);
  level.products = at(p[13]);
  level.d_h = at(p[14]);
  level.d_c = at(p[15]);
  level.d_terms = at(p[16]);
  level.d_products = at(p[17]);
  level.d_forget = at(p[18]);
  level.d_edge_c = at(p[19]);
  level.d_seen = at(p[20]);
  level.d_edge_seen = at(p[21]);
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
                          at<const long long>(level_offsets),
                          at<const long long>(level_edges),
                          level_of(pointers),
                          at(weights),
                          at(edge_weights),
                          at(stream)};
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
