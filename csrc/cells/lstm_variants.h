// LSTM with peepholes: i and f also see c_{t-1}, o sees c_t, each through a weight per unit (Gers &
// Schmidhuber 2000). LSTM with coupled gates: f = 1 - i, forgetting only where something is written
// (CIFG of Greff et al. 2015); gate order i, g, o. With options besides: other activations than
// tanh, bounds on what they are applied to, zoneout.
#pragma once

#include "activation.h"

namespace fastcell::cells {

template <class V, bool kPeephole, bool kCoupled, bool kOptions>
struct LstmVariant : CellTraits {
  static constexpr int gates = kCoupled ? 3 : 4;
  static constexpr int states = 2;
  static constexpr int saved = gates + kOptions;                // and the c that zoneout hides
  static constexpr bool direct = kOptions;                      // a unit that keeps its h
  static constexpr int parameters = kPeephole ? gates - 1 : 0;  // rows i, f (unless coupled), o
  static constexpr int held = kOptions ? 2 : 0;
  static constexpr int g_at = gates - 2, o_at = gates - 1;

  static FASTCELL_INLINE void forward(const CellOptions& options, const V* a, const V* p, V* state,
                                      V* saved_gates) {
    const V before = state[1];
    const V i = gate(options, seen(a[0], p, 0, before));
    V f;
    if constexpr (kCoupled) {
      f = V(1) - i;
    } else {
      f = gate(options, seen(a[1], p, 1, before));
      saved_gates[1] = f;
    }
    const V g = kOptions ? activate(options.activation, clipped(options, a[g_at])) : tanh(a[g_at]);
    const V c = fma(f, before, i * g);
    const V o = gate(options, seen(a[o_at], p, parameters - 1, c));
    const V h = o * output(options, c);
    if constexpr (kOptions) {
      state[0] = held_part(p[parameters], state[0], h);
      state[1] = held_part(p[parameters + 1], before, c);
      saved_gates[gates] = c;
    } else {
      state[0] = h;
      state[1] = c;
    }
    saved_gates[0] = i;
    saved_gates[g_at] = g;
    saved_gates[o_at] = o;
  }

  static FASTCELL_INLINE void backward(const CellOptions& options, const V* saved_gates, const V* p,
                                       const V* before, const V* after, V* d_state, V* d_a) {
    const V i = saved_gates[0], g = saved_gates[g_at], o = saved_gates[o_at];
    V c = after[1], d_h = d_state[0], d_after = d_state[1];
    if constexpr (kOptions) {
      c = saved_gates[gates];
      d_state[0] = d_h * p[parameters];
      d_h = d_h * (V(1) - p[parameters]);
      d_after = d_after * (V(1) - p[parameters + 1]);
    }
    const V phi_c = output(options, c);
    const V d_o = gate_gradient(options, o, d_h * phi_c);
    V d_c = d_after;
    if constexpr (kOptions) {
      const Activation phi = options.output_activation;
      d_c = fma(d_h * o, slope(phi, phi_c), d_c);
    } else {
      d_c = fma(d_h * o, V(1) - phi_c * phi_c, d_c);
    }
    if constexpr (kPeephole) d_c = fma(d_o, p[parameters - 1], d_c);
    V d_i, d_before;
    if constexpr (kCoupled) {
      d_i = gate_gradient(options, i, d_c * (g - before[1]));
      d_before = d_c * (V(1) - i);
    } else {
      const V f = saved_gates[1];
      d_i = gate_gradient(options, i, d_c * g);
      const V d_f = gate_gradient(options, f, d_c * before[1]);
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
      d_a[gates + parameters - 1] = d_o * c;
    }
    d_a[0] = d_i;
    if constexpr (kOptions) {
      const Activation phi = options.activation;
      d_a[g_at] = unclipped(options, phi, g, d_c * i * slope(phi, g));
      d_before = fma(d_state[1], p[parameters + 1], d_before);
    } else {
      d_a[g_at] = d_c * i * (V(1) - g * g);
    }
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

  static FASTCELL_INLINE V gate(const CellOptions& options, V a) {
    return sigmoid(kOptions ? clipped(options, a) : a);
  }

  static FASTCELL_INLINE V gate_gradient(const CellOptions& options, V gate, V d) {
    d = d * gate * (V(1) - gate);
    return kOptions ? unclipped(options, Activation::kSigmoid, gate, d) : d;
  }

  static FASTCELL_INLINE V output(const CellOptions& options, V c) {
    return kOptions ? activate(options.output_activation, c) : tanh(c);
  }
};

template <class V>
struct LstmPeephole : LstmVariant<V, true, false, false> {};
template <class V>
struct LstmCoupled : LstmVariant<V, false, true, false> {};
template <class V>
struct LstmCoupledPeephole : LstmVariant<V, true, true, false> {};

// The same, and the plain one, with options.
template <class V>
struct LstmGeneral : LstmVariant<V, false, false, true> {};
template <class V>
struct LstmPeepholeGeneral : LstmVariant<V, true, false, true> {};
template <class V>
struct LstmCoupledGeneral : LstmVariant<V, false, true, true> {};
template <class V>
struct LstmCoupledPeepholeGeneral : LstmVariant<V, true, true, true> {};

}  // namespace fastcell::cells
