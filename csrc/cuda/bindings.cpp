#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "../cell_options.h"
#include "../pointers.h"
#include "plan.h"
#include "run.h"

namespace py = pybind11;

namespace fastcell {
namespace {

using cuda::Plan;
using cuda::Sweep;

// The members of Side, in their order; 0 for null.
constexpr size_t kSidePointers = 17;
cuda::Side side_of(const std::array<Pointer, kSidePointers>& p) {
  return {as(p[0]),
          as(p[1]),
          as(p[2]),
          as(p[3]),
          as(p[4]),
          as(p[5]),
          {as(p[6]), as(p[7])},
          as(p[8]),
          as(p[9]),
          as(p[10]),
          {as(p[11]), as(p[12])},
          as(p[13]),
          as(p[14]),
          as(p[15]),
          as(p[16]),
          nullptr};
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::class_<Plan>(module, "CudaPlan", py::module_local(),
                   "How a layer runs on a GPU, and its launches.")
      .def(py::init([](int device, const std::string& cell, const std::string& products,
                       bool backward, long long steps, long long batch, int hidden, int output,
                       int directions, bool projected, const std::string& wanted) {
             // A plan may load kernels, for which whoever unpacks them takes the GIL.
             const py::gil_scoped_release release;
             return cuda::choose_plan(
                 device, cuda::cell_facts(cell), products,
                 {backward, steps, batch, hidden, output, directions, projected}, wanted);
           }),
           py::arg("device"), py::arg("cell"), py::arg("products"), py::arg("backward"),
           py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("output"),
           py::arg("directions"), py::arg("projected"), py::arg("wanted"))
      .def_property_readonly("place", [](const Plan& p) { return cuda::kPlaceNames[int(p.place)]; })
      .def_property_readonly("rows", [](const Plan& p) { return p.row_warps * 16; })
      .def_property_readonly("units", [](const Plan& p) { return p.unit_warps * 8; })
      .def_readonly("unit_blocks", &Plan::unit_blocks)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("tiles_at_once", &Plan::tiles_at_once)
      .def_readonly("at_once", &Plan::at_once)
      .def_readonly("time", &Plan::time)
      .def_readonly("width", &Plan::width)
      .def_readonly("projected_width", &Plan::projected_width)
      .def_readonly("stride", &Plan::stride)
      .def_readonly("projected_stride", &Plan::projected_stride)
      .def_readonly("shared", &Plan::shared)
      .def_property_readonly("kernel", &Plan::kernel)
      .def(
          "run",
          [](const Plan& plan, Pointer stream,
             const std::vector<std::array<Pointer, kSidePointers>>& sides, Pointer flags,
             Pointer offsets, Pointer lengths, Pointer reset, Pointer seed,
             const CellOptionsTuple& options, int layer, int gate_stride, Pointer y, Pointer d_y,
             bool keep, bool finish, Pointer status, long long patience, long long begin,
             long long end) {
            if (int(sides.size()) != plan.sizes.directions) {
              throw std::invalid_argument("one side per direction");
            }
            Sweep sweep{};
            for (size_t d = 0; d < sides.size(); ++d) {
              sweep.side[d] = side_of(sides[d]);
              sweep.side[d].flags =
                  as<int>(flags) + d * size_t(plan.tiles) * size_t(plan.unit_blocks);
            }
            sweep.offsets = as<const long long>(offsets);
            sweep.lengths = as<const long long>(lengths);
            sweep.reset = as<const unsigned char>(reset);
            sweep.seed = as<const unsigned long long>(seed);
            sweep.options = cell_options(options);
            for (int i = 0; i < 2; ++i) {
              sweep.held_below[i] = noise::threshold(sweep.options.zoneout[i]);
            }
            sweep.layer = layer;
            sweep.gate_stride = gate_stride;
            sweep.y = as(y);
            sweep.d_y = as(d_y);
            sweep.keep = keep;
            sweep.finish = finish;
            sweep.status = as<int>(status);
            sweep.patience = patience;
            py::gil_scoped_release release;
            cuda::run(plan, sweep, begin, end, as(stream));
          },
          py::arg("stream"), py::arg("sides"), py::arg("flags"), py::arg("offsets"),
          py::arg("lengths"), py::arg("reset"), py::arg("seed"), py::arg("options"),
          py::arg("layer"), py::arg("gate_stride"), py::arg("y"), py::arg("d_y"), py::arg("keep"),
          py::arg("finish"), py::arg("status"), py::arg("patience"), py::arg("begin"),
          py::arg("end"));

  module.def(
      "cuda_cell",
      [](const std::string& name) {
        const cuda::CellFacts& cell = cuda::cell_facts(name);
        return py::make_tuple(cell.gates, cell.apart, cell.states, cell.saved, cell.parameters,
                              cell.recurrent, cell.second);
      },
      py::arg("name"), "(gates, apart, states, saved, parameters, recurrent, second) of a cell.");
  module.def(
      "cuda_limits",
      [](int device) {
        const cuda::Limits found = [&] {
          const py::gil_scoped_release release;
          return cuda::limits(device);
        }();
        py::dict d;
        d["capability"] = found.capability;
        d["multiprocessors"] = found.multiprocessors;
        d["shared_per_block"] = found.shared_per_block;
        d["cooperative"] = found.cooperative;
        d["max_cluster"] = found.max_cluster;
        return d;
      },
      py::arg("device"), "What a device offers to a kernel.");
  bind_cuda_trees(module);
  bind_cuda_normed(module);
}

}  // namespace fastcell
