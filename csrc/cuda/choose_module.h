// Which of the compiled kernels a device runs.
#pragma once

#include <tuple>

#include "embedded.h"

namespace fastcell::cuda {

// Machine code of the device's capability, else of a lower one with the same major number, else
// PTX; null: none of them runs on it.
inline const EmbeddedModule* choose_module(const EmbeddedModule* modules, std::size_t count,
                                           int capability) {
  const auto runs = [&](const EmbeddedModule& m) {
    if (m.exact) return m.capability == capability;
    return m.capability <= capability && (m.ptx || m.capability / 10 == capability / 10);
  };
  const auto rank = [](const EmbeddedModule& m) {
    return std::make_tuple(!m.ptx, m.capability, m.exact);
  };
  const EmbeddedModule* best = nullptr;
  for (const EmbeddedModule* module = modules; module != modules + count; ++module) {
    if (runs(*module) && (best == nullptr || rank(*module) > rank(*best))) best = module;
  }
  return best;
}

}  // namespace fastcell::cuda
