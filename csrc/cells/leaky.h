// Leaky units: h_t = alpha h_{t-1} + (1 - alpha) v_t, v_t = phi(W x_t + b + U h_{t-1}), alpha per
// unit: slow ones remember what fast ones pass on. Goodfellow et al., "Deep Learning", ch. 10.9.
#pragma once

#include "rnn.h"

namespace fastcell::cells {

struct LeakyTraits : CellTraits {
  static constexpr int gates = 1;
  static constexpr int saved = 1;       // v
  static constexpr bool direct = true;  // alpha h_{t-1}
  static constexpr int parameters = 1;  // alpha
};

// Around a plain cell, whose one state is v.
template <class V, template <class> class Plain>
struct Leaky : LeakyTraits {
  static FASTCELL_INLINE void forward(const CellOptions& options, const V* a, const V* p, V* state,
                                      V* saved_gates) {
    V v[1];
    Plain<V>::forward(options, a, nullptr, v, nullptr);
    state[0] = fma(p[0], state[0], (V(1) - p[0]) * v[0]);  // alpha 1 keeps every bit
    saved_gates[0] = v[0];
  }

  static FASTCELL_INLINE void backward(const CellOptions& options, const V* saved_gates, const V* p,
                                       const V* before, const V*, V* d_state, V* d_a) {
    const V d_h = d_state[0];
    V d_v[1] = {d_h * (V(1) - p[0])};
    Plain<V>::backward(options, nullptr, nullptr, nullptr, saved_gates, d_v, d_a);
    d_a[1] = d_h * (before[0] - saved_gates[0]);
    d_state[0] = d_h * p[0];
  }
};

template <class V>
struct LeakyTanh : Leaky<V, RnnTanh> {};
template <class V>
struct LeakyRelu : Leaky<V, RnnRelu> {};

}  // namespace fastcell::cells
