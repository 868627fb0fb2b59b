// LSTM and GRU with layer normalisation: the gates' input and recurrent terms are normalised each
// for itself over all units, and the LSTM's c before the output gate (Ba, Kiros, Hinton 2016). What
// is normalised, and over which gates together, is said here; the norms are the engine's
// (cpu/normed.h).
#pragma once

#include "gru.h"

namespace fastcell::cells {

// h = o tanh(n), n the normalised c.
template <class V>
struct NormedLstm {
  static constexpr int gates = 4;
  static constexpr int states = 2;
  static constexpr int saved = 4;  // i, f, g, o
  // Gates whose recurrent terms are normalised together: as many each, in their order.
  static constexpr int parts = 1;
  static constexpr int part_gates[] = {4};

  // x, u: input and recurrent terms of the gates. Leaves c.
  static FASTCELL_INLINE void forward(const V* x, const V* u, V* state, V* saved_gates) {
    const V i = sigmoid(x[0] + u[0]);
    const V f = sigmoid(x[1] + u[1]);
    const V g = tanh(x[2] + u[2]);
    const V o = sigmoid(x[3] + u[3]);
    state[1] = fma(f, state[1], i * g);
    saved_gates[0] = i;
    saved_gates[1] = f;
    saved_gates[2] = g;
    saved_gates[3] = o;
  }
  static FASTCELL_INLINE V output(const V* saved_gates, V n) { return saved_gates[3] * tanh(n); }

  // Leaves the gradient of o's terms in d_u[3]; returns that of n.
  static FASTCELL_INLINE V backward_output(const V* saved_gates, V n, V d_h, V* d_u) {
    const V o = saved_gates[3], tanh_n = tanh(n);
    d_u[3] = d_h * tanh_n * o * (V(1) - o);
    return d_h * o * (V(1) - tanh_n * tanh_n);
  }
  // d_state[1]: of c, to be replaced by that of c before the step. Input and recurrent terms have
  // the same gradients.
  static FASTCELL_INLINE void backward(const V* saved_gates, const V* before, V* d_state, V* d_x,
                                       V* d_u) {
    const V i = saved_gates[0], f = saved_gates[1], g = saved_gates[2];
    const V d_c = d_state[1];
    d_u[0] = d_c * g * i * (V(1) - i);
    d_u[1] = d_c * before[1] * f * (V(1) - f);
    d_u[2] = d_c * i * (V(1) - g * g);
    d_state[1] = d_c * f;
    for (int k = 0; k < gates; ++k) d_x[k] = d_u[k];
  }
};

// The cell of gru.h on terms that have been normalised, r and z together and n apart.
template <class V>
struct NormedGru {
  static constexpr int gates = 3;
  static constexpr int states = 1;
  static constexpr int saved = Gru<V>::saved;
  static constexpr int parts = 2;
  static constexpr int part_gates[] = {2, 1};

  static FASTCELL_INLINE void forward(const V* x, const V* u, V* state, V* saved_gates) {
    const V a[] = {x[0] + u[0], x[1] + u[1], x[2], u[2]};
    Gru<V>::forward(CellOptions{}, a, nullptr, state, saved_gates);
  }

  // d_state[0]: of h, to be replaced by what does not go through the product.
  static FASTCELL_INLINE void backward(const V* saved_gates, const V* before, V* d_state, V* d_x,
                                       V* d_u) {
    V d_a[4];
    Gru<V>::backward(CellOptions{}, saved_gates, nullptr, before, nullptr, d_state, d_a);
    for (int k = 0; k < 3; ++k) d_x[k] = d_a[k];
    d_u[0] = d_a[0];
    d_u[1] = d_a[1];
    d_u[2] = d_a[3];
  }
};

}  // namespace fastcell::cells
