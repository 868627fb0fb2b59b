#include "build_info.h"

#ifdef FASTCELL_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "embedded.h"
#endif

namespace fastcell::cuda {

#ifdef FASTCELL_HAVE_CUDA

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < embedded_module_count; ++i) {
    const char* name = embedded_modules[i].architecture;
    if (names.empty() || names.back() != name) names.emplace_back(name);
  }
  return names;
}

int runtime_version() { return CUDART_VERSION; }

const char* report_json() { return embedded_report; }

#else

std::vector<std::string> architectures() { return {}; }

int runtime_version() { return 0; }

const char* report_json() { return "{}"; }

#endif

}  // namespace fastcell::cuda
