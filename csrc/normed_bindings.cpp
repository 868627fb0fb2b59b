#include "normed_bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cpu/normed_table.h"
#include "huge_pages.h"
#include "pointers.h"

namespace py = pybind11;

namespace fastcell {
namespace {

// A layer of one direction at its sizes.
class BoundNormed {
 public:
  BoundNormed(const Kernels& kernels, const std::string& cell, bool float64, int64_t features,
              int64_t hidden, int64_t output, bool projected, bool reverse)
      : features_(features),
        hidden_(hidden),
        output_(output),
        projected_(projected),
        reverse_(reverse),
        dtype_(float64 ? DType::kFloat64 : DType::kFloat32) {
    if (features <= 0 || hidden <= 0 || output <= 0) {
      throw std::invalid_argument("sizes of layer normalisation must be positive");
    }
    for (int i = 0; i < kernels.normed->count; ++i) {
      const NormedKernels& one = kernels.normed->cells[int(dtype_)][i];
      if (cell == one.name) kernels_ = &one;
    }
    if (!kernels_) throw std::invalid_argument("no normalised cell is called " + cell);
  }

  int64_t kept_elements() const { return kernels_->kept_elements(hidden_, projected_); }

  int64_t cells_at() const { return kernels_->cells_at(hidden_); }

  int64_t workspace(int64_t steps, int64_t batch, int64_t rows, bool keep, bool backward,
                    int threads) const {
    NormedCall call = call_of(steps, batch, rows);
    char anything;
    call.kept = keep ? &anything : nullptr;
    call.projection = projected_ ? &anything : nullptr;
    return backward ? kernels_->backward_workspace(call, threads)
                    : kernels_->forward_workspace(call, threads);
  }

  // pointers: offsets, x, weights (2), gains (2), biases (2), cell norm, projection, parameters,
  // h0, c0, final h, final c, reset, y, kept, workspace. gradients: none, or d_y, d_final (2),
  // d_state (2), d_x, d_weights (2), d_gains (2), d_biases (2), d_cell_norm, d_projection,
  // d_parameters, d_cells.
  void run(int64_t steps, int64_t batch, int64_t rows, const std::array<Pointer, 19>& p,
           const std::vector<Pointer>& g, int threads) const {
    NormedCall call = call_of(steps, batch, rows);
    call.time.offsets = as<const int64_t>(p[0]);
    call.x = as(p[1]);
    call.cell_norm = as(p[8]);
    call.projection = as(p[9]);
    call.parameters = as(p[10]);
    for (int i = 0; i < 2; ++i) {
      call.weights[i] = as(p[2 + i]);
      call.gains[i] = as(p[4 + i]);
      call.biases[i] = as(p[6 + i]);
      call.state[i] = as(p[11 + i]);
      call.final_state[i] = as(p[13 + i]);
    }
    call.reset = as<const uint8_t>(p[15]);
    call.y = as(p[16]);
    call.kept = as(p[17]);
    call.workspace = as(p[18]);
    NormedGradients gradients{};
    if (!g.empty()) {
      if (g.size() != 16) throw std::invalid_argument("run: wrong number of gradients");
      gradients = {as(g[0]),
                   {as(g[1]), as(g[2])},
                   as(g[15]),
                   {as(g[3]), as(g[4])},
                   as(g[5]),
                   {as(g[6]), as(g[7])},
                   {as(g[8]), as(g[9])},
                   {as(g[10]), as(g[11])},
                   as(g[12]),
                   as(g[13]),
                   as(g[14])};
    }
    const int64_t item = dtype_ == DType::kFloat64 ? 8 : 4;
    if (g.empty()) prefer_huge_pages(call.kept, rows * kept_elements() * item);
    struct Job {
      const NormedCall& call;
      const NormedGradients* gradients;
      const NormedKernels& kernels;
    } job{call, g.empty() ? nullptr : &gradients, *kernels_};
    py::gil_scoped_release release;
    run_team(
        threads,
        [](const Team& team, Barrier*, const void* context) {
          const Job& job = *static_cast<const Job*>(context);
          if (job.gradients) {
            job.kernels.backward(job.call, *job.gradients, team);
          } else {
            job.kernels.forward(job.call, team);
          }
        },
        &job);
  }

 private:
  NormedCall call_of(int64_t steps, int64_t batch, int64_t rows) const {
    NormedCall call{};
    call.dtype = dtype_;
    call.features = features_;
    call.hidden = hidden_;
    call.output = output_;
    call.reverse = reverse_;
    call.time = {steps, batch, rows, nullptr};
    return call;
  }

  const NormedKernels* kernels_ = nullptr;
  int64_t features_, hidden_, output_;
  bool projected_, reverse_;
  DType dtype_;
};

}  // namespace

void bind_normed(py::module_& module, const Kernels& (*kernels)()) {
  py::class_<BoundNormed>(module, "Normed", "A layer of one direction, with layer normalisation.")
      .def(py::init([kernels](const std::string& cell, bool float64, int64_t features,
                              int64_t hidden, int64_t output, bool projected, bool reverse) {
             return BoundNormed(kernels(), cell, float64, features, hidden, output, projected,
                                reverse);
           }),
           py::arg("cell"), py::arg("float64"), py::arg("features"), py::arg("hidden"),
           py::arg("output"), py::arg("projected"), py::arg("reverse"))
      .def_property_readonly("kept_elements", &BoundNormed::kept_elements)
      .def_property_readonly("cells_at", &BoundNormed::cells_at)
      .def("workspace", &BoundNormed::workspace)
      .def("run", &BoundNormed::run);
}

}  // namespace fastcell
