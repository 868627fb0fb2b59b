// One number as the cell headers want it: operators, and the functions of ../cells/README.md.
#pragma once

#include "device.h"

namespace fastcell::cuda {

template <class T>
struct Scalar {
  using Number = T;
  T v;
  Scalar() = default;
  FASTCELL_INLINE explicit Scalar(T x) : v(x) {}
  FASTCELL_INLINE explicit Scalar(int x) : v(T(x)) {}

  friend FASTCELL_INLINE Scalar operator+(Scalar a, Scalar b) { return Scalar(a.v + b.v); }
  friend FASTCELL_INLINE Scalar operator-(Scalar a, Scalar b) { return Scalar(a.v - b.v); }
  friend FASTCELL_INLINE Scalar operator*(Scalar a, Scalar b) { return Scalar(a.v * b.v); }
  friend FASTCELL_INLINE Scalar operator/(Scalar a, Scalar b) { return Scalar(a.v / b.v); }
  friend FASTCELL_INLINE Scalar operator-(Scalar a) { return Scalar(-a.v); }
  friend FASTCELL_INLINE bool operator<(Scalar a, Scalar b) { return a.v < b.v; }
  friend FASTCELL_INLINE bool operator<=(Scalar a, Scalar b) { return a.v <= b.v; }

  friend FASTCELL_INLINE Scalar select(bool mask, Scalar yes, Scalar no) { return mask ? yes : no; }
  friend FASTCELL_INLINE Scalar fma(Scalar a, Scalar b, Scalar c) {
    return Scalar(fma_of(a.v, b.v, c.v));
  }
  friend FASTCELL_INLINE Scalar tanh(Scalar x) { return Scalar(tanh_of(x.v)); }
  // exp overflows to infinity where the result is 0.
  friend FASTCELL_INLINE Scalar sigmoid(Scalar x) { return Scalar(T(1) / (T(1) + exp_of(-x.v))); }
};

}  // namespace fastcell::cuda
