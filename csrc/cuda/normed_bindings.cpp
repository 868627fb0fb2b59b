#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../pointers.h"
#include "bindings.h"
#include "normed_run.h"

namespace py = pybind11;

namespace fastcell {
namespace {

using cuda::NormedPlan;
using cuda::NormedStep;

// The addresses of a step, in the order of NormedStep; 0 for null.
constexpr size_t kPointers = 29;
NormedStep step_of(const std::array<Pointer, kPointers>& p) {
  NormedStep step{};
  step.lengths = as<const long long>(p[0]);
  step.reset = as<const unsigned char>(p[1]);
  step.terms = as(p[2]);
  step.gain = as(p[3]);
  step.bias = as(p[4]);
  step.cell_norm = as(p[5]);
  step.carry[0] = as(p[6]);
  step.carry[1] = as(p[7]);
  step.sums = as(p[8]);
  step.operand = as(p[9]);
  step.y = as(p[10]);
  step.normed = as(p[11]);
  step.gates = as(p[12]);
  step.cells = as(p[13]);
  step.scales = as(p[14]);
  step.state[0] = as(p[15]);
  step.state[1] = as(p[16]);
  step.d_y = as(p[17]);
  step.d_terms = as(p[18]);
  step.d_normed = as(p[19]);
  step.d_sums = as(p[20]);
  step.d_cell = as(p[21]);
  step.before = as(p[22]);
  step.parameters = as(p[23]);
  step.d_parameters = as(p[24]);
  step.d_cells = as(p[25]);
  step.projected = as(p[26]);
  step.cell_output = as(p[27]);
  step.d_output = as(p[28]);
  return step;
}

}  // namespace

void bind_cuda_normed(py::module_& module) {
  py::class_<NormedPlan>(module, "CudaNormedPlan", py::module_local(),
                         "How a layer with layer normalisation runs on a GPU, and its launches.")
      .def(
          py::init([](int device, const std::string& cell, const std::string& products,
                      bool backward, long long steps, long long batch, int hidden, int projection) {
            const py::gil_scoped_release release;
            return cuda::choose_normed_plan(device, cell, products, backward, steps, batch, hidden,
                                            projection);
          }),
          py::arg("device"), py::arg("cell"), py::arg("products"), py::arg("backward"),
          py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("projection"))
      .def_property_readonly(
          "products",
          [](const NormedPlan& plan) {
            std::vector<std::tuple<int, int, int>> found;
            const auto add = [&](const cuda::Plan& one) {
              found.push_back({cuda::samples_of(one), one.width, cuda::columns_of(one)});
            };
            add(plan.product);
            if (plan.projection) add(*plan.projection);
            return found;
          })
      .def(
          "run",
          [](const NormedPlan& plan, Pointer stream, bool reverse,
             const std::vector<long long>& sizes, Pointer weights, Pointer projection,
             const std::array<Pointer, kPointers>& pointers) {
            const auto& planned = plan.product.sizes;
            if (static_cast<long long>(sizes.size()) != planned.steps || sizes.empty() ||
                *std::max_element(sizes.begin(), sizes.end()) > planned.batch) {
              throw std::invalid_argument("run: other steps or samples than planned");
            }
            std::vector<int64_t> offsets{0};
            for (const long long alive : sizes) offsets.push_back(offsets.back() + alive);
            const Timeline time{planned.steps, planned.batch, offsets.back(), offsets.data()};
            const NormedStep step = step_of(pointers);
            py::gil_scoped_release release;
            cuda::run(plan, step, time, reverse, as(weights), as(projection), as(stream));
          },
          py::arg("stream"), py::arg("reverse"), py::arg("sizes"), py::arg("weights"),
          py::arg("projection"), py::arg("pointers"));
}

}  // namespace fastcell
