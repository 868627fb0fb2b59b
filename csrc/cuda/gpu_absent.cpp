// gpu.h in a build without CUDA.
#include <stdexcept>

#include "gpu.h"

namespace fastcell::cuda {
namespace {
[[noreturn]] void refuse() {
  throw std::runtime_error("this build of fastcell has no CUDA kernels (FASTCELL_CUDA=OFF)");
}
}  // namespace

Limits limits(int) { refuse(); }
int resident_blocks(int, const Launch&) { refuse(); }
void launch(int, const Launch&, const void*) { refuse(); }

}  // namespace fastcell::cuda
