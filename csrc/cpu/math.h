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
  static constexpr float tanh_limit = 20.0f;  // 2|x| above which tanh rounds to 1
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
  static constexpr double tanh_limit = 44.0;
  static constexpr double exp_least = -708.3;
  static constexpr double exp_most = 709.8;
};

// exp(y) split as scale (1 + p): scale = 2^n, p = expm1(r). |y| must stay within the limits above.
template <class T>
struct SplitExp {
  Vec<T> scale, p;
};

template <class T>
FASTCELL_INLINE SplitExp<T> split_exp(Vec<T> y) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V shifted = fma(y, V(C::log2e), V(C::shift));
  const V n = shifted - V(C::shift);
  const V r = fma(n, V(-C::ln2_low), fma(n, V(-C::ln2_high), y));
  // The low bits of `shifted` hold n; as an exponent they make 2^n.
  const V scale = V::from_bits((shifted.bits() + C::bias) << C::mantissa);
  // expm1(r) = r + r^2 q(r), |r| <= 0.3466. float: the minimax q of degree 4, which adds at most
  // 0.11 ULP; double: the Taylor series, whose first term left out is below 0.01 ULP.
  V q;
  if constexpr (sizeof(T) == 4) {
    q = V(0.00138825202477f);
    q = fma(q, r, V(0.00836652857153f));
    q = fma(q, r, V(0.0416672001117f));
    q = fma(q, r, V(0.166665435618f));
    q = fma(q, r, V(0.499999981527f));
  } else {
    q = V(1.0 / 6227020800.0);
    q = fma(q, r, V(1.0 / 479001600.0));
    q = fma(q, r, V(1.0 / 39916800.0));
    q = fma(q, r, V(1.0 / 3628800.0));
    q = fma(q, r, V(1.0 / 362880.0));
    q = fma(q, r, V(1.0 / 40320.0));
    q = fma(q, r, V(1.0 / 5040.0));
    q = fma(q, r, V(1.0 / 720.0));
    q = fma(q, r, V(1.0 / 120.0));
    q = fma(q, r, V(1.0 / 24.0));
    q = fma(q, r, V(1.0 / 6.0));
    q = fma(q, r, V(0.5));
  }
  return {scale, fma(r * r, q, r)};
}

template <class T>
FASTCELL_INLINE Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V least(ExpConstants<T>::exp_least), most(ExpConstants<T>::exp_most);
  const SplitExp<T> e = split_exp(max(least, min(most, -x)));  // NaN passes through
  // scale may be infinite, where the result is 0: so no sum of two infinities here.
  return quotient(V(1), V(1) + e.scale * (V(1) + e.p));
}

template <class T>
FASTCELL_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const V limit(ExpConstants<T>::tanh_limit);
  const typename V::Bits sign = x.bits() & V(T(-0.0)).bits();
  V y = V::from_bits(x.bits() ^ sign);
  y = y + y;
  const SplitExp<T> e = split_exp(min(limit, y));
  const V expm1 = fma(e.scale, e.p, e.scale - V(1));
  const V magnitude = quotient(expm1, expm1 + V(2));
  return V::from_bits(magnitude.bits() | sign);
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
