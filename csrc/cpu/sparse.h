// A sparse matrix in slices, times one vector or a block of them.
//
// A slice is as many rows as a vector has lanes, their entries side by side: entry k of all rows,
// then entry k + 1 (sliced ELLPACK). One vector: a register holds a row per lane, and the operand's
// numbers are gathered. A block of vectors: a register holds one row of the product for all of
// them, and nothing is gathered. Either way an element is the same chain of FMAs over k.
//
// Monakov, Lokhmotov, Avetisyan, "Automatically tuning sparse matrix-vector multiplication for GPU
// architectures" (2010).
#pragma once

#include "simd.h"

namespace fastcell::FASTCELL_ISA {

// from[index[i]], lane by lane.
template <class T>
FASTCELL_INLINE Vec<T> gather(const T* from, const int32_t* index) {
  using V = Vec<T>;
  // (The masked forms: gcc 12 warns within its header of the others.)
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i at = _mm512_loadu_si512(index);
    return V(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), __mmask16(-1), at, from, 4));
  } else {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return V(_mm512_mask_i32gather_pd(_mm512_setzero_pd(), __mmask8(-1), at, from, 8));
  }
#else
  V r(T(0));
  for (int i = 0; i < V::lanes; ++i) r.v[i] = from[index[i]];
  return r;
#endif
}

template <class T>
struct SparseSlices {
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;

  const int64_t* offsets;
  const int32_t* columns;
  const T* values;

  // sum += slice s times one vector.
  FASTCELL_INLINE void add_product(int64_t s, const T* vector, V& sum) const {
    for (int64_t k = offsets[s]; k < offsets[s + 1]; ++k) {
      sum = fma(V::load(values + k * lanes), gather(vector, columns + k * lanes), sum);
    }
  }

  // sum[row] += that row of slice s times each of a block of vectors, which lie side by side.
  FASTCELL_INLINE void add_products(int64_t s, const T* vectors, V (&sum)[lanes]) const {
    for (int64_t k = offsets[s]; k < offsets[s + 1]; ++k) {
#pragma GCC unroll 16
      for (int row = 0; row < lanes; ++row) {
        const V operand = V::load(vectors + int64_t(columns[k * lanes + row]) * lanes);
        sum[row] = fma(V(values[k * lanes + row]), operand, sum[row]);
      }
    }
  }
};

}  // namespace fastcell::FASTCELL_ISA
