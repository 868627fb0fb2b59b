// What the machine can do at most: the yardsticks of the benchmark.
#pragma once

#include "simd.h"

namespace fastcell::FASTCELL_ISA {

// Independent FMA chains in registers. Returns the floating-point operations done.
inline int64_t run_fma(int64_t rounds, float* sink) {
  using V = Vec<float>;
  constexpr int kChains = kRegisters >= 32 ? 24 : 12;
  V acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = V(float(i));
  const V a(0.999f), b(1e-3f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
  }
  V sum(0);
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum = sum + acc[i];
  sum.store(sink);
  return rounds * kChains * V::lanes * 2;
}

inline void read_array(const float* from, int64_t count, float* sink) {
  using V = Vec<float>;
  constexpr int kWays = 8;
  V sum[kWays];
#pragma GCC unroll 8
  for (int i = 0; i < kWays; ++i) sum[i] = V(0);
  for (int64_t i = 0; i + kWays * V::lanes <= count; i += kWays * V::lanes) {
#pragma GCC unroll 8
    for (int w = 0; w < kWays; ++w) sum[w] = sum[w] + V::load(from + i + w * V::lanes);
  }
#pragma GCC unroll 8
  for (int i = 1; i < kWays; ++i) sum[0] = sum[0] + sum[i];
  sum[0].store(sink);
}

}  // namespace fastcell::FASTCELL_ISA
