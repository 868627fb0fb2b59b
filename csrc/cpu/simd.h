// One SIMD register of T, in the width of the instruction set this file is compiled for.
//
// Compiled once per instruction set: everything lives in namespace FASTCELL_ISA, so that the linker
// can never merge an inline function of one set with that of another. No namespace-scope vectors:
// their initialisers would run at load, on CPUs that lack the set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../common/portable.h"

namespace fastcell {
extern bool estimate_quotients;  // see quotient(); set once, by what the CPU is
}

namespace fastcell::FASTCELL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// Whether fma() rounds once.
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// `in_memory` reads what is there whatever it was written as; `stored` writes numbers of its type:
// the compiler need not expect that a store changes a pointer or a size.
template <class T>
struct Raw;
template <>
struct Raw<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float in_memory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef float stored __attribute__((vector_size(kVectorBytes), aligned(4)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t counters __attribute__((vector_size(kVectorBytes)));  // one per lane
};
template <>
struct Raw<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double in_memory __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef double stored __attribute__((vector_size(kVectorBytes), aligned(8)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t counters __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct Raw<int32_t> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t in_memory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t stored __attribute__((vector_size(kVectorBytes), aligned(4)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};

// The result of a lanewise comparison: all bits set, or none.
template <class T>
struct Mask {
  typename Raw<T>::bits v;
};

template <class T>
struct Vec {
  using Number = T;
  using Bits = typename Raw<T>::bits;
  static constexpr int lanes = kVectorBytes / int(sizeof(T));

  typename Raw<T>::type v;

  Vec() = default;
  explicit FASTCELL_INLINE Vec(typename Raw<T>::type raw) : v(raw) {}
  // x - 0 is x for every x, -0 and NaN included, so the compiler keeps the broadcast alone.
  explicit FASTCELL_INLINE Vec(T x) : v(x - typename Raw<T>::type{}) {}
  template <class U = T, class = std::enable_if_t<!std::is_same_v<U, int>>>
  explicit FASTCELL_INLINE Vec(int x) : Vec(T(x)) {}

  static FASTCELL_INLINE Vec load(const T* p) {
    return Vec(typename Raw<T>::type(*reinterpret_cast<const typename Raw<T>::in_memory*>(p)));
  }
  FASTCELL_INLINE void store(T* p) const { *reinterpret_cast<typename Raw<T>::stored*>(p) = v; }
  FASTCELL_INLINE Bits bits() const { return reinterpret_cast<Bits>(v); }
  static FASTCELL_INLINE Vec from_bits(Bits b) {
    return Vec(reinterpret_cast<typename Raw<T>::type>(b));
  }

  friend FASTCELL_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend FASTCELL_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend FASTCELL_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend FASTCELL_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend FASTCELL_INLINE Vec operator-(Vec a) { return Vec(-a.v); }
  friend FASTCELL_INLINE Mask<T> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend FASTCELL_INLINE Mask<T> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  friend FASTCELL_INLINE Mask<T> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend FASTCELL_INLINE Vec select(Mask<T> m, Vec yes, Vec no) { return Vec(m.v ? yes.v : no.v); }

  // a where a is the smaller (larger), else b: so a NaN in b passes. The order of the operands is
  // what the x86 instructions do. (The masked forms: gcc 12 warns within its header of the others.)
  friend FASTCELL_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return Vec(_mm512_maskz_min_ps(__mmask16(-1), a.v, b.v));
    if constexpr (sizeof(T) == 8) return Vec(_mm512_maskz_min_pd(__mmask8(-1), a.v, b.v));
#else
    return Vec(a.v < b.v ? a.v : b.v);
#endif
  }
  friend FASTCELL_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return Vec(_mm512_maskz_max_ps(__mmask16(-1), a.v, b.v));
    if constexpr (sizeof(T) == 8) return Vec(_mm512_maskz_max_pd(__mmask8(-1), a.v, b.v));
#else
    return Vec(a.v > b.v ? a.v : b.v);
#endif
  }

  // a b + c with one rounding where the instruction set has it. Never left to the compiler's
  // contraction: two instantiations of one function must give the same bits.
  friend FASTCELL_INLINE Vec fma(Vec a, Vec b, Vec c) {
    if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
      return Vec(_mm512_fmadd_ps(a.v, b.v, c.v));
#elif defined(__AVX2__)
      return Vec(_mm256_fmadd_ps(a.v, b.v, c.v));
#elif defined(__aarch64__)
      return Vec(vfmaq_f32(c.v, a.v, b.v));
#else
      return Vec(a.v * b.v + c.v);
#endif
    } else {
#if defined(__AVX512F__)
      return Vec(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif defined(__AVX2__)
      return Vec(_mm256_fmadd_pd(a.v, b.v, c.v));
#elif defined(__aarch64__)
      return Vec(vfmaq_f64(c.v, a.v, b.v));
#else
      return Vec(a.v * b.v + c.v);
#endif
    }
  }
};

// a / b to within one ULP, for b from 0.5 to 2^126, and NaN of a NaN. Where dividing 16 floats
// takes 16 cycles (Intel; AMD: 3 to 10), by an estimate of 14 bits and one correction.
template <class T>
FASTCELL_INLINE Vec<T> quotient(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (estimate_quotients) {
      const Vec<T> estimate(_mm512_maskz_rcp14_ps(__mmask16(-1), b.v));
      const Vec<T> first = a * estimate;
      return fma(fma(-b, first, a), estimate, first);
    }
  }
#endif
  return a / b;
}

// 1 / b likewise, for b up to 2^128; but 0 where x is below `least`.
template <class T>
FASTCELL_INLINE Vec<T> reciprocal(Vec<T> b, Vec<T> x, Vec<T> least) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (estimate_quotients) {
      const __mmask16 some = _mm512_cmp_ps_mask(x.v, least.v, _CMP_NLT_UQ);
      const Vec<T> estimate(_mm512_maskz_rcp14_ps(some, b.v));
      return fma(fma(-b, estimate, Vec<T>(1)), estimate, estimate);
    }
  }
#endif
  return select(x < least, Vec<T>(0), Vec<T>(1) / b);
}

// The first n lanes from memory, zero behind them: the tail of a row whose length is no multiple
// of a register. Nothing past p[n - 1] is touched.
template <class T>
FASTCELL_INLINE Vec<T> load_first(const T* p, int n) {
  using V = Vec<T>;
  if (__builtin_expect(n >= V::lanes, 1)) return V::load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return V(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  } else {
    return V(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
  }
#else
  V r(T(0));
  for (int i = 0; i < n; ++i) r.v[i] = p[i];
  return r;
#endif
}

// A vector from any column of a row that has just been written in whole vectors, as far as one lies
// behind it: read in such, since a CPU waits for memory where what it reads lies in two writes.
template <class T>
FASTCELL_INLINE Vec<T> load_across(const T* row, int64_t column) {
  using V = Vec<T>;
#if defined(__AVX512F__)
  const int64_t within = column % V::lanes;
  const T* const first = row + (column - within);
  const V low = V::load(first), high = V::load(first + V::lanes);
  if constexpr (sizeof(T) == 4) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i from = _mm512_add_epi32(lane, _mm512_set1_epi32(int(within)));
    return V(_mm512_permutex2var_ps(low.v, from, high.v));
  } else {
    const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i from = _mm512_add_epi64(lane, _mm512_set1_epi64(within));
    return V(_mm512_permutex2var_pd(low.v, from, high.v));
  }
#else
  return V::load(row + column);
#endif
}

template <class T>
FASTCELL_INLINE void store_first(T* p, Vec<T> x, int n) {
  using V = Vec<T>;
  if (__builtin_expect(n >= V::lanes, 1)) return x.store(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x.v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), x.v);
  }
#else
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
#endif
}

}  // namespace fastcell::FASTCELL_ISA
