// The thin layer between Python and the engines: pointers and sizes in, plain structures out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bound_stack.h"
#include "bound_stream.h"
#include "cpu/ragged_rows.h"
#include "cuda/bindings.h"
#include "cuda/build_info.h"
#include "fingerprint.h"
#include "normed_bindings.h"
#include "remembered_call.h"
#include "reservoir_bindings.h"
#include "tree_bindings.h"

namespace py = pybind11;

namespace fastcell {
namespace {

std::uint64_t fingerprint(const std::vector<std::tuple<Pointer, int64_t, int64_t>>& tensors,
                          bool whole) {
  Hash hash;
  for (const auto& [pointer, count, item_size] : tensors) {
    hash.add(as(pointer), count, item_size, whole);
  }
  return hash.value();
}

double measure_fma_peak(int threads, double seconds) {
  struct Job {
    double seconds;
    std::vector<double> rates;
  } job{seconds, std::vector<double>(size_t(threads), 0.0)};
  py::gil_scoped_release release;
  run_team(
      threads,
      [](const Team& team, Barrier*, const void* context) {
        Job& job = *static_cast<Job*>(const_cast<void*>(context));
        float sink[64];
        using Clock = std::chrono::steady_clock;
        kernels().run_fma(100000, sink);
        team.sync();
        const auto start = Clock::now();
        int64_t flops = 0;
        double elapsed = 0;
        while ((elapsed = std::chrono::duration<double>(Clock::now() - start).count()) <
               job.seconds) {
          flops += kernels().run_fma(100000, sink);
        }
        job.rates[size_t(team.index)] = double(flops) / elapsed;
      },
      &job);
  double total = 0;
  for (double rate : job.rates) total += rate;
  return total;
}

double measure_read_bandwidth(int64_t bytes_per_thread, int threads, double seconds) {
  struct Job {
    double seconds;
    int64_t count;
    std::vector<std::vector<float>> data;
    std::vector<double> rates;
  } job{seconds, bytes_per_thread / 4, {}, std::vector<double>(size_t(threads), 0.0)};
  py::gil_scoped_release release;
  for (int i = 0; i < threads; ++i) job.data.emplace_back(size_t(job.count) + 16, 1.0f);
  run_team(
      threads,
      [](const Team& team, Barrier*, const void* context) {
        Job& job = *static_cast<Job*>(const_cast<void*>(context));
        // Whole cache lines, as the kernels' packed weights are.
        const auto start_of_data =
            reinterpret_cast<std::uintptr_t>(job.data[size_t(team.index)].data());
        const float* data = as<const float>((start_of_data + 63) & ~std::uintptr_t(63));
        float sink[64];
        using Clock = std::chrono::steady_clock;
        kernels().read(data, job.count, sink);
        team.sync();
        const auto start = Clock::now();
        int64_t bytes = 0;
        double elapsed = 0;
        const int64_t rounds = 1 + (1 << 22) / (job.count * 4 + 1);
        while ((elapsed = std::chrono::duration<double>(Clock::now() - start).count()) <
               job.seconds) {
          for (int64_t i = 0; i < rounds; ++i) kernels().read(data, job.count, sink);
          bytes += rounds * job.count * 4;
        }
        job.rates[size_t(team.index)] = double(bytes) / elapsed;
      },
      &job);
  double total = 0;
  for (double rate : job.rates) total += rate;
  return total;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastcell's kernels, on raw pointers; fastcell.ops is the layer that knows tensors.";
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def(
      "estimate_quotients",
      [](std::optional<bool> wanted) {
        const bool before = estimate_quotients;
        if (wanted) estimate_quotients = *wanted;
        return before;
      },
      py::arg("wanted") = py::none(),
      "Whether AVX-512 kernels divide by estimate and correction; sets it, for tests.");
  m.def(
      "dot_products",
      [](std::optional<bool> wanted) {
        const bool before = bfloat16_dots || int8_dots;
        if (wanted) {
          bfloat16_dots = *wanted && has_bfloat16_dots();
          int8_dots = *wanted && has_int8_dots();
        }
        return before;
      },
      py::arg("wanted") = py::none(),
      "Whether AVX-512 kernels use BF16 and VNNI, which the CPU has; sets it, for tests.");
  m.def(
      "isas",
      [] {
        int count;
        const Kernels* const* all = compiled_kernels(&count);
        std::vector<std::string> names;
        for (int i = 0; i < count; ++i) {
          if (supported(*all[i])) names.emplace_back(all[i]->isa);
        }
        return names;
      },
      "The instruction sets that this build and this CPU have, lowest first.");
  m.def(
      "address",
      [](py::handle array) {
        Py_buffer view;
        if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_STRIDES) != 0)
          throw py::error_already_set();
        const auto address = reinterpret_cast<Pointer>(view.buf);
        PyBuffer_Release(&view);
        return address;
      },
      py::arg("array"));
  m.def(
      "drop",
      [](Pointer from, Pointer to, int64_t count, bool float64, uint64_t seed, double probability) {
        py::gil_scoped_release release;
        kernels().drop(float64 ? DType::kFloat64 : DType::kFloat32, as<const void>(from), as(to),
                       count, seed, probability);
      },
      "Dropout by a seed: each element is zeroed with that probability, the others are scaled.");
  m.def(
      "ragged_order",
      [](int64_t batch, Pointer lengths, Pointer order, Pointer offsets) {
        ragged_order(batch, as<const int64_t>(lengths), as<int64_t>(order), as<int64_t>(offsets));
      },
      "Fills the tensors of csrc/cpu/ragged_rows.h.");
  m.def(
      "ragged_rows",
      [](int64_t steps, int64_t batch, Pointer lengths, bool batch_first, Pointer order,
         Pointer rank, Pointer sizes, Pointer rows) {
        ragged_rows(steps, batch, as<const int64_t>(lengths), batch_first, as<int64_t>(order),
                    as<int64_t>(rank), as<int64_t>(sizes), as<int64_t>(rows));
      },
      "Fills the tensors of csrc/cpu/ragged_rows.h.");
  m.def("fingerprint", &fingerprint, py::arg("tensors"), py::arg("whole"));
  m.def("measure_fma_peak", &measure_fma_peak, py::arg("threads"), py::arg("seconds"),
        "float32 operations per second of independent FMA chains on all threads together.");
  m.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("bytes_per_thread"),
        py::arg("threads"), py::arg("seconds"),
        "Bytes per second read by all threads together, each from its own array of that size.");
  const auto bind_map = [&m](const char* name, bool is_tanh) {
    m.def(
        name,
        [is_tanh](Pointer x, Pointer y, int64_t count, bool float64) {
          py::gil_scoped_release release;
          (is_tanh ? kernels().tanh : kernels().sigmoid)(
              float64 ? DType::kFloat64 : DType::kFloat32, as(x), as(y), count);
        },
        py::arg("x"), py::arg("y"), py::arg("count"), py::arg("float64"));
  };
  bind_map("tanh", true);
  bind_map("sigmoid", false);

  py::class_<BoundStack>(m, "Stack", "A configuration of layers with the kernels that run it.")
      .def(py::init<const std::string&, const std::string&, const std::string&, int64_t, int64_t,
                    int64_t, int, int, bool, const CellOptionsTuple&, int64_t>(),
           py::arg("cell"), py::arg("dtype"), py::arg("products"), py::arg("input"),
           py::arg("hidden"), py::arg("proj"), py::arg("layers"), py::arg("directions"),
           py::arg("bias"), py::arg("options"), py::arg("delay") = 0)
      .def_property_readonly("packed_bytes", &BoundStack::packed_bytes)
      .def_property_readonly("reserve_row_elements", &BoundStack::reserve_row_elements)
      .def("cells_at", &BoundStack::cells_at)
      .def("pack", &BoundStack::pack)
      .def("explain", &BoundStack::explain, py::arg("steps"), py::arg("batch"), py::arg("rows"),
           py::arg("offsets"), py::arg("threads"), py::arg("wavefront"), py::arg("barriers") = true)
      .def("force_schedule", &BoundStack::force_schedule)
      .def("forward_workspace", &BoundStack::forward_workspace)
      .def("backward_workspace", &BoundStack::backward_workspace)
      .def("forward", &BoundStack::forward)
      .def("backward", &BoundStack::backward);

  m.def(
      "has_exchange_api", [](py::handle capsule) { return exchange_api(capsule) != nullptr; },
      py::arg("capsule"));
  m.def(
      "remembered_call",
      [](const BoundStack& stack, const py::object& api, const py::dict& attributes,
         const std::vector<py::object>& absent,
         const std::vector<std::pair<py::str, py::object>>& weights,
         const std::vector<py::object>& none, int64_t steps, int64_t batch, bool batch_first,
         bool single_step, int threads,
         const std::tuple<std::vector<std::pair<py::dict, py::object>>, std::vector<py::object>,
                          py::object, py::object>& surroundings,
         const std::array<py::object, 5>& python, const py::object& packed,
         const std::vector<py::object>& templates, const py::object& reserve,
         const py::list& served) {
        const auto& [unchanged, quiet, threads_now, gradients] = surroundings;
        const auto& [empty_like, scratch, pack, apply, backward] = python;
        return RememberedCall::make(
            stack, api,
            {attributes, absent, weights, none, steps, batch, batch_first, single_step, threads},
            {unchanged, quiet, threads_now, gradients},
            {empty_like, scratch, pack, apply, backward}, packed, templates, reserve, served);
      },
      py::arg("stack"), py::arg("exchange_api"), py::arg("attributes"), py::arg("absent"),
      py::arg("weights"), py::arg("none"), py::arg("steps"), py::arg("batch"),
      py::arg("batch_first"), py::arg("single_step"), py::arg("threads"), py::arg("surroundings"),
      py::arg("python"), py::arg("packed"), py::arg("templates"), py::arg("reserve"),
      py::arg("served"),
      "A module's call at one shape, which is likely to come again, as a function.");

  py::class_<BoundLinear>(m, "Linear", "A linear layer of a stream.")
      .def(py::init<bool, int64_t, int64_t>(), py::arg("float64"), py::arg("in_features"),
           py::arg("out_features"))
      .def_property_readonly("packed_bytes", &BoundLinear::packed_bytes)
      .def("pack", &BoundLinear::pack);

  py::class_<BoundStream>(m, "Stream", "Layers that are fed block by block.")
      .def(py::init<const std::vector<BoundStream::StageOf>&, int64_t, bool, int64_t, bool, int>(),
           py::arg("stages"), py::arg("features"), py::arg("float64"), py::arg("batch"),
           py::arg("batch_first"), py::arg("threads"))
      .def_property_readonly("current", &BoundStream::current)
      .def("workspace_bytes", &BoundStream::workspace_bytes)
      .def("bind", &BoundStream::bind)
      .def("run", &BoundStream::run)
      .def("remember", &BoundStream::remember)
      .def("again", &BoundStream::again);

  m.def("cuda_architectures", &cuda::architectures, "What this build has CUDA kernels for.");
  m.def("cuda_runtime_version", &cuda::runtime_version, "12090 for 12.9; 0 without CUDA.");
  m.def(
      "cuda_images",
      [] {
        py::list found;
        for (const auto& [architecture, image] : cuda::images()) {
          found.append(py::make_tuple(architecture, py::bytes(image)));
        }
        return found;
      },
      "(architecture, machine code or PTX) of every CUDA module inside.");
  m.def(
      "cuda_report", [] { return std::string(cuda::report_json()); },
      "What the compiler said of the CUDA kernels, as JSON.");
  bind_cuda(m);
  bind_trees(m, kernels);
  bind_normed(m, kernels);
  bind_reservoir(m, &kernels);
}

}  // namespace fastcell
