// Elman RNN: h_t = phi(W x_t + b + U h_{t-1}), phi = tanh or relu.
// Goodfellow, Bengio, Courville, "Deep Learning" (2016), equations 10.8-10.9.
#pragma once

#include "traits.h"

namespace fastcell::cells {

// The backward step reads h_t itself, and h_{t-1} reaches h_t through U alone: nothing is saved.
struct RnnTraits : CellTraits {
  static constexpr int gates = 1;
};

template <class V>
struct RnnTanh : RnnTraits {
  static FASTCELL_INLINE void forward(const CellOptions&, const V* a, const V*, V* state, V*) {
    state[0] = tanh(a[0]);
  }

  static FASTCELL_INLINE void backward(const CellOptions&, const V*, const V*, const V*,
                                       const V* after, V* d_state, V* d_a) {
    d_a[0] = d_state[0] * (V(1) - after[0] * after[0]);
  }
};

template <class V>
struct RnnRelu : RnnTraits {
  // Written so that NaN passes, as in torch.
  static FASTCELL_INLINE void forward(const CellOptions&, const V* a, const V*, V* state, V*) {
    state[0] = select(a[0] < V(0), V(0), a[0]);
  }

  static FASTCELL_INLINE void backward(const CellOptions&, const V*, const V*, const V*,
                                       const V* after, V* d_state, V* d_a) {
    d_a[0] = select(after[0] <= V(0), V(0), d_state[0]);
  }
};

}  // namespace fastcell::cells
