#include "reservoir_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu/reservoir_call.h"
#include "pointers.h"

namespace py = pybind11;

namespace fastcell {
namespace {

// Multiplications of one step, below which a barrier, and of all steps, below which waking a
// thread, costs more than the thread does for it.
constexpr int64_t kStepEach = 8192;
constexpr int64_t kCallEach = 65536;

// Blocks of samples apart, which costs no barrier; then units apart.
Schedule schedule_of(const ReservoirCall& call, const ReservoirKernels& kernels, int threads) {
  const int64_t slices = (call.units + kernels.lanes - 1) / kernels.lanes;
  const int64_t blocks = (call.samples + kernels.lanes - 1) / kernels.lanes;
  // A block of several samples takes a vector per entry, one alone a lane.
  const int64_t step = (call.offsets[slices] + slices * call.inputs) * kernels.lanes;
  const int64_t most = std::min<int64_t>(threads, 1 + step * blocks * call.lengths[0] / kCallEach);
  const int64_t groups = std::min<int64_t>({most, blocks, kMaxBarriers - 1});
  int64_t sharing = std::min({most / groups, 1 + step / kStepEach, slices});
  if (crowded()) sharing = 1;
  return {1, int(groups), int(sharing)};
}

class BoundReservoir {
 public:
  BoundReservoir(const ReservoirKernels& kernels, int64_t units, int64_t inputs, Pointer offsets,
                 Pointer columns, Pointer values, Pointer input_weights, Pointer bias,
                 Pointer alpha)
      : kernels_(kernels) {
    call_.units = units;
    call_.inputs = inputs;
    call_.offsets = as<const int64_t>(offsets);
    call_.columns = as<const int32_t>(columns);
    call_.values = as(values);
    call_.input_weights = as(input_weights);
    call_.bias = as(bias);
    call_.alpha = as(alpha);
  }

  // Every call in this way from now on, whatever it costs; 0 groups: as the sizes suggest again.
  void force_schedule(int batch_groups, int unit_threads) {
    forced_ = {1, batch_groups, unit_threads};
  }

  int64_t workspace_bytes(int64_t samples, int threads) const {
    ReservoirCall call = call_;
    call.samples = samples;
    return kernels_.workspace_bytes(call, threads);
  }

  void run(const std::vector<int64_t>& lengths, const std::vector<Pointer>& x,
           const std::vector<Pointer>& states, Pointer state, Pointer workspace,
           int threads) const {
    if (lengths.empty() || lengths.back() < 1 || x.size() != lengths.size() ||
        !std::is_sorted(lengths.rbegin(), lengths.rend()) ||
        (!states.empty() && states.size() != lengths.size())) {
      throw std::invalid_argument("run: lengths must fall, from sample to sample, to 1 at least");
    }
    static_assert(sizeof(Pointer) == sizeof(void*), "an address is a pointer");
    ReservoirCall call = call_;
    call.samples = int64_t(lengths.size());
    call.lengths = lengths.data();
    call.x = reinterpret_cast<const void* const*>(x.data());
    call.states = states.empty() ? nullptr : reinterpret_cast<void* const*>(states.data());
    call.state = as(state);
    call.workspace = as(workspace);
    call.schedule = forced_.batch_groups > 0 ? forced_ : schedule_of(call, kernels_, threads);
    struct Job {
      const ReservoirCall& call;
      const ReservoirKernels& kernels;
    } job{call, kernels_};
    py::gil_scoped_release release;
    run_team(
        call.schedule.threads(),
        [](const Team& team, Barrier* barriers, const void* context) {
          const Job& job = *static_cast<const Job*>(context);
          job.kernels.run(job.call, team, barriers);
        },
        &job);
  }

 private:
  const ReservoirKernels& kernels_;
  ReservoirCall call_{};
  Schedule forced_{};
};

}  // namespace

void bind_reservoir(py::module_& module, const Kernels& (*kernels)()) {
  module.def(
      "reservoir_lanes", [kernels](bool float64) { return kernels().reservoir[float64].lanes; },
      py::arg("float64"), "Units of a slice of a reservoir's matrices.");
  py::class_<BoundReservoir>(module, "Reservoir",
                             "Fixed sparse leaky units, bound to their weights.")
      .def(py::init([kernels](bool float64, int64_t units, int64_t inputs, Pointer offsets,
                              Pointer columns, Pointer values, Pointer input_weights, Pointer bias,
                              Pointer alpha) {
             return BoundReservoir(kernels().reservoir[float64], units, inputs, offsets, columns,
                                   values, input_weights, bias, alpha);
           }),
           py::arg("float64"), py::arg("units"), py::arg("inputs"), py::arg("offsets"),
           py::arg("columns"), py::arg("values"), py::arg("input_weights"), py::arg("bias"),
           py::arg("alpha"))
      .def("force_schedule", &BoundReservoir::force_schedule)
      .def("workspace_bytes", &BoundReservoir::workspace_bytes)
      .def("run", &BoundReservoir::run);
}

}  // namespace fastcell
