// The compiled kernels that lie in the extension; compile.py writes the table.
#pragma once

#include <cstddef>

namespace fastcell::cuda {

struct EmbeddedKernel {
  const char* name;    // the C++ name expression, as in kernel_names.py
  const char* symbol;  // as the module has it
};

// Some of an architecture's kernels.
struct EmbeddedModule {
  const char* architecture;  // sm_90a
  int capability;            // 90
  bool exact;                // runs on that capability alone
  bool ptx;                  // for the driver to compile; runs on every later one, too
  const char* image;         // compressed (xz); inflate.h
  std::size_t bytes;
  const EmbeddedKernel* kernels;
  std::size_t kernel_count;
};

extern const EmbeddedModule embedded_modules[];
extern const std::size_t embedded_module_count;
extern const char* const embedded_report;

}  // namespace fastcell::cuda
