// GRU, reset after (torch, cuDNN): r, z = sigma(.), n = tanh(W x + b + r (U h + b_h)),
// h_t = (1 - z) n + z h_{t-1}. Cho et al. 2014 in the form of cuDNN; gate order r, z, n.
#pragma once

#include "traits.h"

namespace fastcell::cells {

template <class V>
struct Gru : CellTraits {
  static constexpr int gates = 3;
  static constexpr int apart = 1;       // n's recurrent term is scaled by r before it joins
  static constexpr int saved = 4;       // r, z, n and n's recurrent term
  static constexpr bool direct = true;  // z h_{t-1}

  // a: r, z, n's input term, n's recurrent term.
  static FASTCELL_INLINE void forward(const CellOptions&, const V* a, const V*, V* state,
                                      V* saved_gates) {
    const V r = sigmoid(a[0]);
    const V z = sigmoid(a[1]);
    const V n = tanh(fma(r, a[3], a[2]));
    state[0] = fma(z, state[0] - n, n);
    saved_gates[0] = r;
    saved_gates[1] = z;
    saved_gates[2] = n;
    saved_gates[3] = a[3];
  }

  static FASTCELL_INLINE void backward(const CellOptions&, const V* saved_gates, const V*,
                                       const V* before, const V*, V* d_state, V* d_a) {
    const V r = saved_gates[0], z = saved_gates[1], n = saved_gates[2], recurrent = saved_gates[3];
    const V d_h = d_state[0];
    const V d_n = d_h * (V(1) - z) * (V(1) - n * n);
    d_a[0] = d_n * recurrent * r * (V(1) - r);
    d_a[1] = d_h * (before[0] - n) * z * (V(1) - z);
    d_a[2] = d_n;
    d_a[3] = d_n * r;
    d_state[0] = d_h * z;
  }
};

}  // namespace fastcell::cells
