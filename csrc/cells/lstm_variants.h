// LSTM with peepholes: i and f also see c_{t-1}, o sees c_t, each through a weight per unit (Gers &
// Schmidhuber 2000). LSTM with coupled gates: f = 1 - i, forgetting only where something is written
// (CIFG of Greff et al. 2015); gate order i, g, o.
#pragma once

#include "../common/portable.h"

namespace fastcell::cells {

template <class V, bool kPeephole, bool kCoupled>
struct LstmVariant {
  static constexpr int gates = kCoupled ? 3 : 4;
  static constexpr int apart = 0;
  static constexpr int states = 2;
  static constexpr int saved = gates;
  static constexpr bool direct = false;
  static constexpr int parameters = kPeephole ? gates - 1 : 0;  // rows i, f (unless coupled), o
  static constexpr int g_at = gates - 2, o_at = gates - 1;

  static FASTCELL_INLINE void forward(const V* a, const V* p, V* state, V* saved_gates) {
    const V before = state[1];
    const V i = sigmoid(seen(a[0], p, 0, before));
    V f;
    if constexpr (kCoupled) {
      f = V(1) - i;
    } else {
      f = sigmoid(seen(a[1], p, 1, before));
      saved_gates[1] = f;
    }
    const V g = tanh(a[g_at]);
    const V c = fma(f, before, i * g);
    const V o = sigmoid(seen(a[o_at], p, parameters - 1, c));
    state[0] = o * tanh(c);
    state[1] = c;
    saved_gates[0] = i;
    saved_gates[g_at] = g;
    saved_gates[o_at] = o;
  }

  static FASTCELL_INLINE void backward(const V* saved_gates, const V* p, const V* before,
                                       const V* after, V* d_state, V* d_a) {
    const V i = saved_gates[0], g = saved_gates[g_at], o = saved_gates[o_at];
    const V tanh_c = tanh(after[1]);
    const V d_h = d_state[0];
    const V d_o = d_h * tanh_c * o * (V(1) - o);
    V d_c = fma(d_h * o, V(1) - tanh_c * tanh_c, d_state[1]);
    if constexpr (kPeephole) d_c = fma(d_o, p[parameters - 1], d_c);
    V d_i, d_before;
    if constexpr (kCoupled) {
      d_i = d_c * (g - before[1]) * i * (V(1) - i);
      d_before = d_c * (V(1) - i);
    } else {
      const V f = saved_gates[1];
      d_i = d_c * g * i * (V(1) - i);
      const V d_f = d_c * before[1] * f * (V(1) - f);
      d_before = d_c * f;
      d_a[1] = d_f;
      if constexpr (kPeephole) {
        d_before = fma(d_f, p[1], d_before);
        d_a[gates + 1] = d_f * before[1];
      }
    }
    if constexpr (kPeephole) {
      d_before = fma(d_i, p[0], d_before);
      d_a[gates] = d_i * before[1];
      d_a[gates + parameters - 1] = d_o * after[1];
    }
    d_a[0] = d_i;
    d_a[g_at] = d_c * i * (V(1) - g * g);
    d_a[o_at] = d_o;
    d_state[1] = d_before;
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
struct LstmPeephole : LstmVariant<V, true, false> {};
template <class V>
struct LstmCoupled : LstmVariant<V, false, true> {};
template <class V>
struct LstmCoupledPeephole : LstmVariant<V, true, true> {};

}  // namespace fastcell::cells
