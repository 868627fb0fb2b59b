// Unpacking of what the build compressed.
#pragma once

#include <cstddef>
#include <string>

namespace fastcell::cuda {

// By Python's own lzma: takes the GIL, so the caller must not hold a lock while another thread with
// the GIL may wait for that lock.
std::string inflate(const char* compressed, std::size_t bytes);

}  // namespace fastcell::cuda
