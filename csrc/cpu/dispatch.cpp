#include <cstring>

#include "engine.h"

namespace fastcell {

bool estimate_quotients = [] {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}();

bool has_bfloat16_dots() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

bool has_int8_dots() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") != 0;
#else
  return false;
#endif
}

bool bfloat16_dots = has_bfloat16_dots();
bool int8_dots = has_int8_dots();

#define FASTCELL_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
FASTCELL_DECLARE(baseline)
#if defined(FASTCELL_HAVE_AVX2)
FASTCELL_DECLARE(avx2)
#endif
#if defined(FASTCELL_HAVE_AVX512)
FASTCELL_DECLARE(avx512)
#endif
#undef FASTCELL_DECLARE

const Kernels* const* compiled_kernels(int* count) {
  static const Kernels* const all[] = {
      &baseline::table,
#if defined(FASTCELL_HAVE_AVX2)
      &avx2::table,
#endif
#if defined(FASTCELL_HAVE_AVX512)
      &avx512::table,
#endif
  };
  *count = int(sizeof all / sizeof *all);
  return all;
}

bool supported([[maybe_unused]] const Kernels& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.isa, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  if (!std::strcmp(kernels.isa, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return true;
}

const Kernels* choose_kernels(const char* wanted, const char** error) {
  int count;
  const Kernels* const* all = compiled_kernels(&count);
  const Kernels* best = nullptr;
  for (int i = 0; i < count; ++i) {
    if (wanted && *wanted && std::strcmp(wanted, all[i]->isa)) continue;
    if (supported(*all[i])) best = all[i];
  }
  if (!best) *error = "is not an instruction set that this build and this CPU have";
  return best;
}

}  // namespace fastcell
