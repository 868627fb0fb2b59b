// exp-based vector functions. One algorithm for float and double:
//
//   expm1(y) = 2^n p(r) + (2^n - 1),   y = n ln 2 + r, |r| <= ln 2 / 2, p(r) = expm1(r)
//   tanh(x)  = sign(x) E / (E + 2),    E = expm1(2 |x|)
//   sigmoid(x) = 1 / (1 + exp(-x))
//
// Contract (tests/test_math.py measures it, over all floats of the range for float):
//   tanh     all x        float <= 3 ULP, double <= 3 ULP; +-inf -> +-1, NaN -> NaN, -0 -> -0
//   sigmoid  all x        float <= 3 ULP, double <= 3 ULP where the result is a normal number;
//                         +inf -> 1, -inf -> 0, NaN -> NaN; below the normal numbers 0 or nearly so
#pragma once

#include "../common/noise.h"
#include "simd.h"

namespace fastcell::FASTCELL_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f;  // 10 bits: n ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23;
  static constexpr int bias = 127;
  // expm1(r) = r + r^2 q(r), |r| <= 0.3466: the minimax q of degree 4, which adds at most 0.11 ULP.
  static constexpr int terms = 5;
  static constexpr float q[terms] = {0.499999981527f, 0.166665435618f, 0.0416672001117f,
                                     0.00836652857153f, 0.00138825202477f};
  static constexpr float tanh_limit = 10.0f;  // |x| above which tanh rounds to 1
  static constexpr float exp_least = -87.3f;  // 2^n still a normal number
  static constexpr float exp_most = 88.8f;    // 2^n just infinite
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double ln2_high = 6.93147180369123816490e-01;  // 32 bits
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa = 52;
  static constexpr int bias = 1023;
  // The Taylor series, whose first term left out is below 0.01 ULP.
  static constexpr int terms = 12;
  static constexpr double q[terms] = {0.5,
                                      1.0 / 6,
                                      1.0 / 24,
                                      1.0 / 120,
                                      1.0 / 720,
                                      1.0 / 5040,
                                      1.0 / 40320.0,
                                      1.0 / 362880.0,
                                      1.0 / 3628800.0,
                                      1.0 / 39916800.0,
                                      1.0 / 479001600.0,
                                      1.0 / 6227020800.0};
  static constexpr double tanh_limit = 22.0;
  static constexpr double exp_least = -708.3;
  static constexpr double exp_most = 709.8;
};

// The terms [first, terms) of q, without r^first: pairs of them, which do not wait for one another,
// and these by powers of r^2.
template <class T, int first = 0>
FASTCELL_INLINE Vec<T> polynomial(Vec<T> r, Vec<T> r2) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  if constexpr (first + 1 == C::terms) {
    return V(C::q[first]);
  } else {
    const V pair = fma(V(C::q[first + 1]), r, V(C::q[first]));
    if constexpr (first + 2 == C::terms) {
      return pair;
    } else {
      return fma(r2, polynomial<T, first + 2>(r, r2), pair);
    }
  }
}

// exp(y) split as scale (1 + p): scale = 2^n, p = expm1(r). |y| must stay within the limits above.
template <class T>
struct SplitExp {
  Vec<T> scale, p;
};

// Of y = factor x, factor = -1 or 2 (by which multiplying is exact).
template <class T, int factor>
FASTCELL_INLINE SplitExp<T> split_exp(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  // With the exponent's bias in it, the low bits of `shifted` make 2^n as they are.
  const V shift(C::shift + C::bias);
  const V shifted = fma(x, V(factor * C::log2e), shift);
  const V n = shifted - shift;
  const V y = factor == 2 ? x + x : -x;
  const V r = fma(n, V(-C::ln2_low), fma(n, V(-C::ln2_high), y));
  const V scale = V::from_bits(shifted.bits() << C::mantissa);
  const V r2 = r * r;
  return {scale, fma(r2, polynomial<T>(r, r2), r)};
}

template <class T>
FASTCELL_INLINE Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V most(-ExpConstants<T>::exp_least), least(-ExpConstants<T>::exp_most);
  const SplitExp<T> e = split_exp<T, -1>(max(least, min(most, x)));  // NaN passes through
  // scale may be infinite, where the result is 0: so no sum of two infinities here.
  return quotient(V(1), fma(e.scale, V(1) + e.p, V(1)));
}

template <class T>
FASTCELL_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const V limit(ExpConstants<T>::tanh_limit);
  const typename V::Bits sign = V(T(-0.0)).bits();
  const SplitExp<T> e = split_exp<T, 2>(min(limit, V::from_bits(x.bits() & ~sign)));
  const V expm1 = fma(e.scale, e.p, e.scale - V(1));
  const V magnitude = quotient(expm1, expm1 + V(2));
  return V::from_bits(magnitude.bits() | (x.bits() & sign));
}

// Zoneout's part of a state that stays, per unit: drawn by `key`, or without one the probability.
template <class T>
FASTCELL_INLINE Vec<T> hold(double probability, const noise::Bits* key, int64_t unit) {
  using V = Vec<T>;
  if (!key || probability == 0) return V(T(probability));
  using Units = typename Raw<T>::counters;
  Units units{};
  for (int i = 0; i < V::lanes; ++i) units[i] = noise::Bits(unit) + noise::Bits(i);
  const auto held = noise::draw(*key, units) < Units{} + noise::threshold(probability);
  return V::from_bits(__builtin_convertvector(held, typename V::Bits) & V(1).bits());
}

}  // namespace fastcell::FASTCELL_ISA
