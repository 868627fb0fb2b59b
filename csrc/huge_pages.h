// Fresh memory in large pages.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace fastcell {

// Large fresh buffers are faulted in page by page; huge pages make that, and the TLB's work, cheap.
// A hint only: failure changes nothing.
inline void prefer_huge_pages(void* p, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = std::uintptr_t(1) << 21;
  if (!p || bytes < int64_t(16 * kHuge)) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1);
  const std::uintptr_t end =
      (reinterpret_cast<std::uintptr_t>(p) + std::uintptr_t(bytes)) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastcell
