// LSTM and GRU with layer normalisation: the gates' input and recurrent terms are normalised each
// for itself over all units, and the LSTM's c before the output gate (Ba, Kiros, Hinton 2016). What
// is normalised, and over which gates together, is said here; the norms are the engine's
// (cpu/normed.h).
#pragma once

#include "gru.h"

namespace fastcell::cells {

// h = o tanh(n), n the normalised c. Peepholes see c itself; parameters and gates as in
// lstm_variants.h.
template <class V, bool kPeephole, bool kCoupled>
struct NormedLstmVariant {
  static constexpr int gates = kCoupled ? 3 : 4;
  static constexpr int states = 2;
  static constexpr int saved = gates;
  static constexpr int parameters = kPeephole ? gates - 1 : 0;
  // Gates whose recurrent terms are normalised together: as many each, in their order.
  static constexpr int parts = 1;
  static constexpr int part_gates[] = {gates};
  // Whether a gate's input and recurrent terms have the same gradient.
  static constexpr bool joined = true;
  static constexpr int g_at = gates - 2, o_at = gates - 1;

  // x, u: input and recurrent terms of the gates; p: the parameters. Leaves c.
  static FASTCELL_INLINE void forward(const V* x, const V* u, const V* p, V* state,
                                      V* saved_gates) {
    const V before = state[1];
    const V i = sigmoid(seen(x[0] + u[0], p, 0, before));
    V f;
    if constexpr (kCoupled) {
      f = V(1) - i;
    } else {
      f = sigmoid(seen(x[1] + u[1], p, 1, before));
      saved_gates[1] = f;
    }
    const V g = tanh(x[g_at] + u[g_at]);
    const V c = fma(f, before, i * g);
    saved_gates[0] = i;
    saved_gates[g_at] = g;
    saved_gates[o_at] = sigmoid(seen(x[o_at] + u[o_at], p, parameters - 1, c));
    state[1] = c;
  }
  static FASTCELL_INLINE V output(const V* saved_gates, V n) { return saved_gates[o_at] * tanh(n); }

  // Leaves the gradient of o's terms in d_u[o_at]; returns that of n.
  static FASTCELL_INLINE V backward_output(const V* saved_gates, V n, V d_h, V* d_u) {
    const V o = saved_gates[o_at], tanh_n = tanh(n);
    d_u[o_at] = d_h * tanh_n * o * (V(1) - o);
    return d_h * o * (V(1) - tanh_n * tanh_n);
  }
  // d_state[1]: of c, as far as it does not come through o, to be replaced by that of c before the
  // step. c: of this step. d_p: of the parameters.
  static FASTCELL_INLINE void backward(const V* saved_gates, const V* p, const V* before, V c,
                                       V* d_state, V* d_x, V* d_u, V* d_p) {
    const V i = saved_gates[0], g = saved_gates[g_at];
    V d_c = d_state[1], d_before;
    if constexpr (kPeephole) {
      d_c = fma(d_u[o_at], p[parameters - 1], d_c);
      d_p[parameters - 1] = d_u[o_at] * c;
    }
    if constexpr (kCoupled) {
      d_u[0] = d_c * (g - before[1]) * i * (V(1) - i);
      d_before = d_c * (V(1) - i);
    } else {
      const V f = saved_gates[1];
      d_u[0] = d_c * g * i * (V(1) - i);
      d_u[1] = d_c * before[1] * f * (V(1) - f);
      d_before = d_c * f;
      if constexpr (kPeephole) {
        d_before = fma(d_u[1], p[1], d_before);
        d_p[1] = d_u[1] * before[1];
      }
    }
    if constexpr (kPeephole) {
      d_before = fma(d_u[0], p[0], d_before);
      d_p[0] = d_u[0] * before[1];
    }
    d_u[g_at] = d_c * i * (V(1) - g * g);
    d_state[1] = d_before;
    for (int k = 0; k < gates; ++k) d_x[k] = d_u[k];
  }

 private:
  // A gate's argument with what it sees of c.
  static FASTCELL_INLINE V seen(V a, const V* p, int row, V c) {
    if constexpr (kPeephole) {
      return fma(p[row], c, a);
    } else {
      return a;
    }
  }
};

template <class V>
struct NormedLstm : NormedLstmVariant<V, false, false> {};
template <class V>
struct NormedLstmPeephole : NormedLstmVariant<V, true, false> {};
template <class V>
struct NormedLstmCoupled : NormedLstmVariant<V, false, true> {};
template <class V>
struct NormedLstmCoupledPeephole : NormedLstmVariant<V, true, true> {};

// The cell of gru.h on terms that have been normalised, r and z together and n apart.
template <class V>
struct NormedGru {
  static constexpr int gates = 3;
  static constexpr int states = 1;
  static constexpr int saved = Gru<V>::saved;
  static constexpr int parameters = 0;
  static constexpr int parts = 2;
  static constexpr int part_gates[] = {2, 1};
  static constexpr bool joined = false;

  static FASTCELL_INLINE void forward(const V* x, const V* u, const V*, V* state, V* saved_gates) {
    const V a[] = {x[0] + u[0], x[1] + u[1], x[2], u[2]};
    Gru<V>::forward(CellOptions{}, a, nullptr, state, saved_gates);
  }

  // d_state[0]: of h, to be replaced by what does not go through the product.
  static FASTCELL_INLINE void backward(const V* saved_gates, const V*, const V* before, V,
                                       V* d_state, V* d_x, V* d_u, V*) {
    V d_a[4];
    Gru<V>::backward(CellOptions{}, saved_gates, nullptr, before, nullptr, d_state, d_a);
    for (int k = 0; k < 3; ++k) d_x[k] = d_a[k];
    d_u[0] = d_a[0];
    d_u[1] = d_a[1];
    d_u[2] = d_a[3];
  }
};

}  // namespace fastcell::cells
