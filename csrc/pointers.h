// Addresses of tensors, as Python hands them over.
#pragma once

#include <cstdint>

namespace fastcell {

using Pointer = std::uintptr_t;  // 0 for none

template <class T = void>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

}  // namespace fastcell
