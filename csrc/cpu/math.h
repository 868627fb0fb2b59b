// exp-based vector functions. One algorithm for float and double:
//
//   expm1(y) = 2^n p(r) + (2^n - 1),   y = n ln 2 + r, |r| <= ln 2 / 2, p(r) = expm1(r)
//   tanh(x)  = sign(x) E / (E + 1),    E = expm1(2 |x|) / 2
//   sigmoid(x) = 1 / (1 + exp(-x))
//
// A step of a single sample waits for one after another of these, so what counts is the longest
// chain of operations: numerator and denominator are made side by side from the same p.
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
  // ln 2 in two parts. Where a product is rounded before it is added, the first has so few bits
  // (10) that n times it is exact.
  static constexpr float ln2 = kFused ? 0.693147182464599609f : 0.693359375f;
  static constexpr float ln2_rest = kFused ? -1.90465429995776805e-9f : -2.12194440e-4f;
  static constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23;
  static constexpr int bias = 127;
  // expm1(r) = r + r^2 q(r), |r| <= 0.3466: the minimax q of degree 4, which adds at most 0.11 ULP.
  static constexpr int terms = 5;
  static constexpr float q[terms] = {0.499999981527f, 0.166665435618f, 0.0416672001117f,
                                     0.00836652857153f, 0.00138825202477f};
  static constexpr float tanh_limit = 10.0f;  // |x| above which tanh rounds to 1
  static constexpr float exp_least = -87.3f;  // 2^n still a normal number
  static constexpr float exp_most = 88.37f;   // 2^n not yet infinite
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double ln2 = kFused ? 0.693147180559945286 : 6.93147180369123816490e-01;
  static constexpr double ln2_rest = kFused ? 2.31904681384629956e-17 : 1.90821492927058770002e-10;
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
  static constexpr double exp_most = 709.4;
};

// Two terms of f q(f r), without (f r)^i. The factor f is a power of 2, which changes no digit.
template <class T, int factor, int i>
FASTCELL_INLINE Vec<T> two_terms(Vec<T> r) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  constexpr auto scaled = [](int term) {
    T value = C::q[term] * factor;
    for (int k = 0; k < term; ++k) value *= factor;
    return value;
  };
  if constexpr (i + 1 == C::terms) {
    return V(scaled(i));
  } else {
    return fma(V(scaled(i + 1)), r, V(scaled(i)));
  }
}

// The terms [i, terms): pairs of them, which do not wait for one another, and these by powers of
// r^2.
template <class T, int factor, int i>
FASTCELL_INLINE Vec<T> terms_from(Vec<T> r, Vec<T> r2) {
  const Vec<T> two = two_terms<T, factor, i>(r);
  if constexpr (i + 2 >= ExpConstants<T>::terms) {
    return two;
  } else {
    return fma(r2, terms_from<T, factor, i + 2>(r, r2), two);
  }
}

// exp(factor x) = scale (1 + factor p): scale = 2^n, factor p = expm1(factor x - n ln 2). x must
// stay within the limits above.
template <class T>
struct SplitExp {
  Vec<T> scale, p;
};

template <class T, int factor>
FASTCELL_INLINE SplitExp<T> split_exp(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  // With the exponent's bias in it, the low bits of `shifted` make 2^n as they are.
  const V shift(C::shift + C::bias);
  const V shifted = fma(x, V(factor * C::log2e), shift);
  const V n = shifted - shift;
  const V r = fma(n, V(-C::ln2 / factor), x);
  const V whole = fma(n, V(-C::ln2_rest / factor), r);
  // What a float of all its bits leaves out matters to first order alone, not to the powers of r.
  const V base = kFused && sizeof(T) == 4 ? r : whole;
  const V base2 = base * base;
  V p;
  if constexpr (factor < 0) {
    // Two powers side by side: sooner, but rounded once more, for which tanh has no room.
    p = fma(base2 * base2, terms_from<T, factor, 2>(base, base2),
            fma(base2, two_terms<T, factor, 0>(base), whole));
  } else {
    p = fma(base2, terms_from<T, factor, 0>(base, base2), whole);
  }
  return {V::from_bits(shifted.bits() << C::mantissa), p};
}

template <class T>
FASTCELL_INLINE Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V most(-ExpConstants<T>::exp_least), least(-ExpConstants<T>::exp_most);
  const SplitExp<T> e = split_exp<T, -1>(max(least, min(most, x)));  // NaN passes through
  return reciprocal(fma(-e.scale, e.p, e.scale + V(1)), x, least);
}

template <class T>
FASTCELL_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const V limit(ExpConstants<T>::tanh_limit), half(T(0.5));
  const typename V::Bits sign = V(T(-0.0)).bits();
  const SplitExp<T> e = split_exp<T, 2>(min(limit, V::from_bits(x.bits() & ~sign)));
  const V magnitude = quotient(fma(e.scale, e.p, fma(e.scale, half, -half)),
                               fma(e.scale, e.p, fma(e.scale, half, half)));
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
