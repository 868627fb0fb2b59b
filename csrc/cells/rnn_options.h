// Elman units and independent ones with options: any activation, and zoneout.
//
// Independent: h_t = phi(W x_t + b + u h_{t-1}), each unit seeing its own past alone (Li et al.
// 2018). The product with U is gone; what is left of the recurrence is one multiplication.
#pragma once

#include "activation.h"

namespace fastcell::cells {

struct RnnOptionsTraits : CellTraits {
  static constexpr int gates = 1;
  static constexpr int saved = 1;  // phi(.), which zoneout hides
  static constexpr bool direct = true;
  static constexpr int held = 1;
};

template <class V>
struct RnnGeneral : RnnOptionsTraits {
  static FASTCELL_INLINE void forward(const CellOptions& options, const V* a, const V* p, V* state,
                                      V* saved_gates) {
    const V v = activate(options.activation, a[0]);
    state[0] = held_part(p[0], state[0], v);
    saved_gates[0] = v;
  }

  static FASTCELL_INLINE void backward(const CellOptions& options, const V* saved_gates, const V* p,
                                       const V*, const V*, V* d_state, V* d_a) {
    const V d_v = d_state[0] * (V(1) - p[0]);
    d_a[0] = d_v * slope(options.activation, saved_gates[0]);
    d_state[0] = d_state[0] * p[0];
  }
};

template <class V>
struct Independent : RnnOptionsTraits {
  static constexpr int parameters = 1;  // u
  static constexpr bool recurrent = false;

  static FASTCELL_INLINE void forward(const CellOptions& options, const V* a, const V* p, V* state,
                                      V* saved_gates) {
    const V v = activate(options.activation, fma(p[0], state[0], a[0]));
    state[0] = held_part(p[1], state[0], v);
    saved_gates[0] = v;
  }

  static FASTCELL_INLINE void backward(const CellOptions& options, const V* saved_gates, const V* p,
                                       const V* before, const V*, V* d_state, V* d_a) {
    const V d_v = d_state[0] * (V(1) - p[1]);
    const V d = d_v * slope(options.activation, saved_gates[0]);
    d_a[0] = d;
    d_a[1] = d * before[0];
    d_state[0] = fma(d, p[0], d_state[0] * p[1]);
  }
};

}  // namespace fastcell::cells
