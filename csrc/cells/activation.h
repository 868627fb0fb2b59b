// Nonlinearities chosen when a layer is made, and what zoneout does to a state: for the cells that
// have options. A choice is the same for a whole call, so its branches are foreseen. The usual one
// is inlined: around a call all vectors would be written to memory.
#pragma once

#include "traits.h"

namespace fastcell::cells {

template <class V>
FASTCELL_INLINE V magnitude(V x) {
  return select(x < V(0), -x, x);
}

template <class V>
FASTCELL_CALLED V unusual(Activation which, V x) {
  switch (which) {
    case Activation::kRelu:
      return select(x < V(0), V(0), x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kIdentity:
      return x;
    case Activation::kSoftsign:
      return x / (V(1) + magnitude(x));
    default: {
      // ELU: exp(x) - 1 = 2 t / (1 - t), t = tanh(x / 2), without cancellation near 0.
      const V t = tanh(x * V(typename V::Number(0.5)));
      return select(x <= V(0), (t + t) / (V(1) - t), x);
    }
  }
}

template <class V>
FASTCELL_INLINE V activate(Activation which, V x) {
  if (__builtin_expect(which == Activation::kTanh, 1)) return tanh(x);
  return unusual(which, x);
}

// The derivative, of the result.
template <class V>
FASTCELL_CALLED V unusual_slope(Activation which, V y) {
  switch (which) {
    case Activation::kRelu:
      return select(y <= V(0), V(0), V(1));
    case Activation::kSigmoid:
      return y * (V(1) - y);
    case Activation::kIdentity:
      return V(1);
    case Activation::kSoftsign: {
      const V rest = V(1) - magnitude(y);
      return rest * rest;
    }
    default:  // ELU
      return select(y <= V(0), y + V(1), V(1));
  }
}

template <class V>
FASTCELL_INLINE V slope(Activation which, V y) {
  if (__builtin_expect(which == Activation::kTanh, 1)) return V(1) - y * y;
  return unusual_slope(which, y);
}

// An activation's argument within its bounds. NaN passes.
template <class V>
FASTCELL_INLINE V clipped(const CellOptions& options, V x) {
  if (__builtin_expect(!options.clips, 1)) return x;
  const V most = V(typename V::Number(options.clip));
  return select(x < -most, -most, select(most < x, most, x));
}

// A gradient before the bounds, of y = activate(which, clipped(x)): nothing where they held x.
template <class V>
FASTCELL_CALLED V unclipped(double clip, Activation which, V y, V d) {
  const V most = V(typename V::Number(clip));
  d = select(y <= activate(which, -most), V(0), d);
  return select(activate(which, most) <= y, V(0), d);
}

template <class V>
FASTCELL_INLINE V unclipped(const CellOptions& options, Activation which, V y, V d) {
  if (__builtin_expect(!options.clips, 1)) return d;
  return unclipped(options.clip, which, y, d);
}

// Zoneout (Krueger et al. 2016): of a unit's state the part `hold` is the one before. Exact for 0
// and 1.
template <class V>
FASTCELL_INLINE V held_part(V hold, V before, V after) {
  return hold * before + (V(1) - hold) * after;
}

}  // namespace fastcell::cells
