#include "build_info.h"

#ifdef FASTCELL_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "embedded.h"
#include "inflate.h"
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

std::vector<std::pair<std::string, std::string>> images() {
  std::vector<std::pair<std::string, std::string>> found;
  for (std::size_t i = 0; i < embedded_module_count; ++i) {
    const EmbeddedModule& module = embedded_modules[i];
    found.emplace_back(module.architecture, inflate(module.image, module.bytes));
  }
  return found;
}

const char* report_json() { return embedded_report; }

#else

std::vector<std::string> architectures() { return {}; }

int runtime_version() { return 0; }

std::vector<std::pair<std::string, std::string>> images() { return {}; }

const char* report_json() { return "{}"; }

#endif

}  // namespace fastcell::cuda
