// LSTM: i, f, o = sigma(.), g = tanh(.), c_t = f c_{t-1} + i g, h_t = o tanh(c_t).
// Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; gate order i, f, g, o.
#pragma once

#include "traits.h"

namespace fastcell::cells {

template <class V>
struct Lstm : CellTraits {
  static constexpr int gates = 4;
  static constexpr int states = 2;
  static constexpr int saved = 4;  // i, f, g, o; c_t is kept as a state

  static FASTCELL_INLINE void forward(const CellOptions&, const V* a, const V*, V* state,
                                      V* saved_gates) {
    const V i = sigmoid(a[0]);
    const V f = sigmoid(a[1]);
    const V g = tanh(a[2]);
    const V o = sigmoid(a[3]);
    const V c = fma(f, state[1], i * g);
    state[0] = o * tanh(c);
    state[1] = c;
    saved_gates[0] = i;
    saved_gates[1] = f;
    saved_gates[2] = g;
    saved_gates[3] = o;
  }

  static FASTCELL_INLINE void backward(const CellOptions&, const V* saved_gates, const V*,
                                       const V* before, const V* after, V* d_state, V* d_a) {
    const V i = saved_gates[0], f = saved_gates[1], g = saved_gates[2], o = saved_gates[3];
    const V tanh_c = tanh(after[1]);
    const V d_h = d_state[0];
    const V d_c = fma(d_h * o, V(1) - tanh_c * tanh_c, d_state[1]);
    d_a[0] = d_c * g * i * (V(1) - i);
    d_a[1] = d_c * before[1] * f * (V(1) - f);
    d_a[2] = d_c * i * (V(1) - g * g);
    d_a[3] = d_h * tanh_c * o * (V(1) - o);
    d_state[1] = d_c * f;
  }
};

}  // namespace fastcell::cells
