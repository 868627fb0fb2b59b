#include "normed_bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cpu/team.h"

namespace py = pybind11;

namespace fastcell {
namespace {

using Pointer = std::uintptr_t;

template <class T = void>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// A layer of one direction at its sizes.
class BoundNormed {
 public:
  BoundNormed(const Kernels& kernels, const std::string& cell, bool float64, int64_t hidden,
              bool reverse)
      : hidden_(hidden), reverse_(reverse), dtype_(float64 ? DType::kFloat64 : DType::kFloat32) {
    if (hidden <= 0) throw std::invalid_argument("hidden must be positive");
    for (int i = 0; i < kernels.normed->count; ++i) {
      const NormedKernels& one = kernels.normed->cells[int(dtype_)][i];
      if (cell == one.name) kernels_ = &one;
    }
    if (!kernels_) throw std::invalid_argument("no normalised cell is called " + cell);
  }

  int64_t kept_elements() const { return kernels_->kept_elements(hidden_); }

  int64_t workspace(int64_t steps, int64_t batch, int64_t rows, bool backward, int threads) const {
    NormedCall call{};
    call.dtype = dtype_;
    call.hidden = hidden_;
    call.time = {steps, batch, rows, nullptr};
    return kernels_->workspace(call, backward, threads);
  }

  // pointers: offsets, terms, weights, gain, bias, cell norm, h0, c0, final h, final c, reset, y,
  // kept, workspace. gradients: none, or d_y, d_final (2), d_state (2), d_terms, d_sums, d_normed,
  // d_cell, before.
  void run(int64_t steps, int64_t batch, int64_t rows, const std::array<Pointer, 14>& p,
           const std::vector<Pointer>& g, int threads) const {
    NormedCall call{dtype_,
                    hidden_,
                    {steps, batch, rows, as<const int64_t>(p[0])},
                    reverse_,
                    as(p[1]),
                    as(p[2]),
                    as(p[3]),
                    as(p[4]),
                    as(p[5]),
                    {as(p[6]), as(p[7])},
                    {as(p[8]), as(p[9])},
                    as<const uint8_t>(p[10]),
                    as(p[11]),
                    as(p[12]),
                    as(p[13])};
    NormedGradients gradients{};
    if (!g.empty()) {
      if (g.size() != 10) throw std::invalid_argument("run: wrong number of gradients");
      gradients = {as(g[0]),
                   {as(g[1]), as(g[2])},
                   {as(g[3]), as(g[4])},
                   as(g[5]),
                   as(g[6]),
                   as(g[7]),
                   as(g[8]),
                   as(g[9])};
    }
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
          job.kernels.run(job.call, job.gradients, team);
        },
        &job);
  }

 private:
  const NormedKernels* kernels_ = nullptr;
  int64_t hidden_;
  bool reverse_;
  DType dtype_;
};

}  // namespace

void bind_normed(py::module_& module, const Kernels& (*kernels)()) {
  py::class_<BoundNormed>(module, "Normed", "A layer of one direction, with layer normalisation.")
      .def(py::init([kernels](const std::string& cell, bool float64, int64_t hidden, bool reverse) {
             return BoundNormed(kernels(), cell, float64, hidden, reverse);
           }),
           py::arg("cell"), py::arg("float64"), py::arg("hidden"), py::arg("reverse"))
      .def_property_readonly("kept_elements", &BoundNormed::kept_elements)
      .def("workspace", &BoundNormed::workspace)
      .def("run", &BoundNormed::run);
}

}  // namespace fastcell
