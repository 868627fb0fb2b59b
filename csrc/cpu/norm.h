// Norms of the numbers in a row: (x - mean) / sqrt(variance + epsilon).
#pragma once

#include "math.h"

namespace fastcell::FASTCELL_ISA {

template <class T>
struct Norm {
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  static constexpr double kEpsilon = 1e-5;

  // What to take from a number and what to multiply the rest by.
  struct Moments {
    T mean, scale;
    FASTCELL_INLINE V normalise(V x) const { return (x - V(mean)) * V(scale); }
  };

  static Moments of(const T* x, int64_t n) {
    const T mean = sum(n, [&](int64_t k, int there) { return load_first(x + k, there); }) / T(n);
    const T variance = sum(n,
                           [&](int64_t k, int there) {
                             const V d = load_first(x + k, there) - mean_of(mean, there);
                             return d * d;
                           }) /
                       T(n);
    return {mean, T(1) / T(__builtin_sqrt(double(variance) + kEpsilon))};
  }

  // x to its normalised numbers; returns their scale.
  static T forward(T* x, int64_t n) {
    const Moments m = of(x, n);
    for (int64_t k = 0; k < n; k += lanes) {
      const int there = n - k < lanes ? int(n - k) : lanes;
      store_first(x + k, m.normalise(load_first(x + k, there)), there);
    }
    return m.scale;
  }

  // The same backwards: of the gradients d of normalised numbers, what does not reach x.
  struct Slope {
    T mean, along, scale;
    FASTCELL_INLINE V to_x(V d, V normed) const {
      return (d - V(mean) - normed * V(along)) * V(scale);
    }
  };

  static Slope slope(const T* d, const T* normed, T scale, int64_t n) {
    const T mean = sum(n, [&](int64_t k, int there) { return load_first(d + k, there); }) / T(n);
    const T along = sum(n,
                        [&](int64_t k, int there) {
                          return load_first(d + k, there) * load_first(normed + k, there);
                        }) /
                    T(n);
    return {mean, along, scale};
  }

  static void backward(const T* d, const T* normed, T scale, int64_t n, T* to) {
    const Slope s = slope(d, normed, scale, n);
    for (int64_t k = 0; k < n; k += lanes) {
      const int there = n - k < lanes ? int(n - k) : lanes;
      store_first(to + k, s.to_x(load_first(d + k, there), load_first(normed + k, there)), there);
    }
  }

 private:
  // The sum of f(k, lanes there) over vectors of [0, n), in an order that n alone decides. Several
  // chains side by side: one alone would wait for its own sums.
  template <class F>
  static FASTCELL_INLINE T sum(int64_t n, F f) {
    constexpr int kChains = 4;
    V chain[kChains] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    int64_t k = 0;
    for (; k + kChains * lanes <= n; k += kChains * lanes) {
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] + f(k + i * lanes, lanes);
    }
    for (int i = 0; k < n; k += lanes, ++i) {
      chain[i] = chain[i] + f(k, n - k < lanes ? int(n - k) : lanes);
    }
    alignas(64) T all[lanes];
    ((chain[0] + chain[1]) + (chain[2] + chain[3])).store(all);
    for (int step = lanes / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) all[i] += all[i + step];
    }
    return all[0];
  }

  // Zero behind the end, as what is loaded there.
  static FASTCELL_INLINE V mean_of(T mean, int there) {
    if (there >= lanes) return V(mean);
    alignas(64) T all[lanes] = {};
    for (int i = 0; i < there; ++i) all[i] = mean;
    return V::load(all);
  }
};

}  // namespace fastcell::FASTCELL_ISA
