// GRU, reset before, the original: r, z = sigma(.), n = phi(W x + b + U (r h_{t-1}) + b_h),
// h_t = (1 - z) n + z h_{t-1}. Cho et al. 2014 (whose z is here as torch has it); gate order r, z,
// n. n's product needs r of all units: a step has two products, and its maths two parts.
#pragma once

#include "activation.h"

namespace fastcell::cells {

template <class V>
struct GruBefore : CellTraits {
  static constexpr int gates = 3;
  static constexpr int second = 1;  // n, whose recurrent product takes what the first part makes
  static constexpr int saved = 4;   // r, z, n and what n's product took
  static constexpr bool direct = true;
  static constexpr int held = 1;

  // a: the arguments of r and z, to be replaced by what `forward` needs of them. Returns what the
  // second product takes; h is as the first one took it.
  static FASTCELL_INLINE V first(const CellOptions&, V* a, V h) {
    a[0] = sigmoid(a[0]);
    a[1] = sigmoid(a[1]);
    return a[0] * h;
  }

  // a: what the first part left, the argument of n, and what the second product took.
  static FASTCELL_INLINE void forward(const CellOptions& options, const V* a, const V* p, V* state,
                                      V* saved_gates) {
    const V r = a[0], z = a[1];
    const V n = activate(options.activation, a[2]);
    state[0] = held_part(p[0], state[0], fma(z, state[0] - n, n));
    saved_gates[0] = r;
    saved_gates[1] = z;
    saved_gates[2] = n;
    saved_gates[3] = a[3];
  }

  // All but r, to which the gradient comes through the second product.
  static FASTCELL_INLINE void backward(const CellOptions& options, const V* saved_gates, const V* p,
                                       const V* before, const V*, V* d_state, V* d_a) {
    const V z = saved_gates[1], n = saved_gates[2];
    const V d_h = d_state[0] * (V(1) - p[0]);
    d_a[0] = V(0);
    d_a[1] = d_h * (before[0] - n) * z * (V(1) - z);
    d_a[2] = d_h * (V(1) - z) * slope(options.activation, n);
    d_state[0] = fma(d_h, z, d_state[0] * p[0]);
  }

  // d: gradient of what the second product took; `h` as the first one took it. Fills d_a[0], and
  // returns the part of h's gradient.
  static FASTCELL_INLINE V backward_first(const V* saved_gates, V h, V d, V* d_a) {
    const V r = saved_gates[0];
    d_a[0] = d * h * r * (V(1) - r);
    return d * r;
  }
};

}  // namespace fastcell::cells
