// Recursive cells: a node's state from its input and its children's states.
//
// TreeLstm: i, o = sigma(.), g = tanh(.), and per child k f_k = sigma(.);
// c = i g + sum_k f_k c_k, h = o tanh(c). Tai, Socher & Manning 2015, equations 2-14 (both the
// child-sum and the N-ary form: they differ in what the arguments are made of).
// TreeRnn: h = phi(.), Socher et al. 2011, with the plain cells of rnn.h.
#pragma once

#include "rnn.h"

namespace fastcell::cells {

template <class V>
struct TreeLstm {
  static constexpr int gates = 3;    // of a node: i, g, o
  static constexpr int forgets = 1;  // of each child
  static constexpr int states = 2;

  // a: the arguments of i, g, o; the gates take their place. Returns c so far.
  static FASTCELL_INLINE V begin(V* a) {
    a[0] = sigmoid(a[0]);
    a[1] = tanh(a[1]);
    a[2] = sigmoid(a[2]);
    return a[0] * a[1];
  }

  // The argument of a child's forget gate, its place taken by the gate. Returns c with that child.
  static FASTCELL_INLINE V remember(V& f, V c_child, V c) {
    f = sigmoid(f);
    return fma(f, c_child, c);
  }

  // h.
  static FASTCELL_INLINE V finish(const V* gates, V c) { return gates[2] * tanh(c); }

  // d_c: comes in as the gradient of c from outside of the node, leaves as the whole one.
  static FASTCELL_INLINE void backward(const V* saved, V, V c, V d_h, V& d_c, V* d_a) {
    const V i = saved[0], g = saved[1], o = saved[2];
    const V tanh_c = tanh(c);
    d_c = fma(d_h * o, V(1) - tanh_c * tanh_c, d_c);
    d_a[0] = d_c * g * i * (V(1) - i);
    d_a[1] = d_c * i * (V(1) - g * g);
    d_a[2] = d_h * tanh_c * o * (V(1) - o);
  }

  // d_f: of the argument of the child's forget gate. Returns the gradient of c_child.
  static FASTCELL_INLINE V remember_backward(V f, V c_child, V d_c, V& d_f) {
    d_f = d_c * c_child * f * (V(1) - f);
    return d_c * f;
  }
};

// Around a plain cell, whose one state is h.
template <class V, template <class> class Plain>
struct TreeRnn {
  static constexpr int gates = 1;
  static constexpr int forgets = 0;
  static constexpr int states = 1;

  static FASTCELL_INLINE V begin(V* a) { return a[0]; }
  static FASTCELL_INLINE V finish(const V* a, V) {
    V state[1];
    Plain<V>::forward(CellOptions{}, a, nullptr, state, nullptr);
    return state[0];
  }
  static FASTCELL_INLINE void backward(const V*, V h, V, V d_h, V&, V* d_a) {
    Plain<V>::backward(CellOptions{}, nullptr, nullptr, nullptr, &h, &d_h, d_a);
  }
};

template <class V>
struct TreeRnnTanh : TreeRnn<V, RnnTanh> {};
template <class V>
struct TreeRnnRelu : TreeRnn<V, RnnRelu> {};

}  // namespace fastcell::cells
