// GRU, reset after, with options: another activation of the candidate, and zoneout.
#pragma once

#include "activation.h"

namespace fastcell::cells {

template <class V>
struct GruGeneral : CellTraits {
  static constexpr int gates = 3;
  static constexpr int apart = 1;
  static constexpr int saved = 4;  // r, z, n and n's recurrent term
  static constexpr bool direct = true;
  static constexpr int held = 1;

  // a: r, z, n's input term, n's recurrent term.
  static FASTCELL_INLINE void forward(const CellOptions& options, const V* a, const V* p, V* state,
                                      V* saved_gates) {
    const V r = sigmoid(a[0]);
    const V z = sigmoid(a[1]);
    const V n = activate(options.activation, fma(r, a[3], a[2]));
    state[0] = held_part(p[0], state[0], fma(z, state[0] - n, n));
    saved_gates[0] = r;
    saved_gates[1] = z;
    saved_gates[2] = n;
    saved_gates[3] = a[3];
  }

  static FASTCELL_INLINE void backward(const CellOptions& options, const V* saved_gates, const V* p,
                                       const V* before, const V*, V* d_state, V* d_a) {
    const V r = saved_gates[0], z = saved_gates[1], n = saved_gates[2], recurrent = saved_gates[3];
    const V d_h = d_state[0] * (V(1) - p[0]);
    const V d_n = d_h * (V(1) - z) * slope(options.activation, n);
    d_a[0] = d_n * recurrent * r * (V(1) - r);
    d_a[1] = d_h * (before[0] - n) * z * (V(1) - z);
    d_a[2] = d_n;
    d_a[3] = d_n * r;
    d_state[0] = fma(d_h, z, d_state[0] * p[0]);
  }
};

}  // namespace fastcell::cells
