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

#include <utility>

#include "simd.h"

namespace fastcell::FASTCELL_ISA {

// from[columns[i]], lane by lane. By loads of single numbers, put together in registers: on Zen 5
// the gather instructions made a step take 1.5 times as long for float, and twice or more for
// double.
template <class T, int... i>
FASTCELL_INLINE Vec<T> gather(const T* from, const int32_t* columns,
                              std::integer_sequence<int, i...>) {
  return Vec<T>(typename Raw<T>::type{from[columns[i]]...});
}

template <class T>
struct SparseSlices {
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  using Lanes = std::make_integer_sequence<int, lanes>;

  const int64_t* offsets;
  const int32_t* columns;
  const T* values;

  // sum += slice s times one vector.
  FASTCELL_INLINE void add_product(int64_t s, const T* vector, V& sum) const {
    for (int64_t k = offsets[s]; k < offsets[s + 1]; ++k) {
      sum = fma(V::load(values + k * lanes), gather(vector, columns + k * lanes, Lanes()), sum);
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
