#include "kernels_in_use.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastcell {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wanted = std::getenv("FASTCELL_ISA");
    const char* error = nullptr;
    const Kernels* found = choose_kernels(wanted, &error);
    if (!found) throw std::runtime_error(std::string("FASTCELL_ISA=") + wanted + " " + error);
    return *found;
  }();
  return chosen;
}

}  // namespace fastcell
