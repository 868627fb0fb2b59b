// The CUDA engine over emulated kernels, as an extension of its own: `_core.cuda` for the tests.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/bindings.h"
#include "cuda/choose_module.h"
#include "cuda/gpu_emulated.h"

PYBIND11_MODULE(_emulated, module) {
  fastcell::bind_cuda(module);
  module.def("cuda_architectures", [] { return std::vector<std::string>{"emulated"}; });
  module.def(
      "pretend",
      [](int capability, int multiprocessors, int shared_per_block, bool cooperative,
         int max_cluster) {
        fastcell::cuda::emulated::pretend(
            {capability, multiprocessors, shared_per_block, cooperative, max_cluster});
      },
      pybind11::arg("capability") = 90, pybind11::arg("multiprocessors") = 16,
      pybind11::arg("shared_per_block") = 227 << 10, pybind11::arg("cooperative") = true,
      pybind11::arg("max_cluster") = 16);
  // Which of (architecture, capability, exact, ptx) a GPU runs; embedded.h.
  module.def("choose_module",
             [](const std::vector<std::tuple<std::string, int, bool, bool>>& given,
                int capability) -> std::optional<std::string> {
               std::vector<fastcell::cuda::EmbeddedModule> modules;
               for (const auto& [architecture, capability_of, exact, ptx] : given) {
                 modules.push_back(
                     {architecture.c_str(), capability_of, exact, ptx, nullptr, 0, nullptr, 0});
               }
               const auto* found =
                   fastcell::cuda::choose_module(modules.data(), modules.size(), capability);
               if (found == nullptr) return std::nullopt;
               return found->architecture;
             });
}
