// The CUDA engine over emulated kernels, as an extension of its own: `_core.cuda` for the tests.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/bindings.h"
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
}
