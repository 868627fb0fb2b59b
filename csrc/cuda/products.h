// What the recurrent products multiply, and one warp's share of such a product.
//
// A warp multiplies 16 rows by N groups of 8 columns, along k in chunks of 64 bytes per row and
// column. It holds the sums as the tensor cores do: a lane has rows lane/4 and lane/4 + 8, columns
// 2 (lane%4) and the next. Which numbers of a chunk meet in which instruction is free, as long as
// rows and columns agree; here lane%4 takes 16 bytes in a row, so that every load is one of 16
// bytes. Weights are packed as [chunk][group][column][64 bytes] (pack() in
// python/fastcell/cuda_weights.py): what a warp reads is contiguous.
#pragma once

#include "device.h"
#include "shared_layout.h"

namespace fastcell::cuda {

struct BFloat16 {
  Bits16 bits;
};
struct Float16 {
  Bits16 bits;
};

FASTCELL_INLINE float widen(BFloat16 x) { return float_of(Bits32(x.bits) << 16); }
FASTCELL_INLINE float widen(Float16 x) { return widen_float16(x.bits); }
FASTCELL_INLINE float widen(float x) { return x; }
FASTCELL_INLINE double widen(double x) { return x; }

FASTCELL_INLINE void narrow(float x, BFloat16& to) {
  const Bits32 bits = bits_of(x);
  // To nearest, ties to even; NaN stays one.
  to.bits = Bits16(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FASTCELL_INLINE void narrow(float x, Float16& to) { to.bits = round_to_float16(x); }
FASTCELL_INLINE void narrow(float x, float& to) { to = x; }
FASTCELL_INLINE void narrow(double x, double& to) { to = x; }

// 16 bytes as numbers.
template <class E>
struct Vector {
  static constexpr int count = 16 / int(sizeof(E));
  E v[count];
};
template <class E>
FASTCELL_INLINE Vector<E> as_vector(Bytes16 b) {
  static_assert(sizeof(Vector<E>) == sizeof(Bytes16), "");
  Vector<E> r;
  memcpy(&r, &b, sizeof r);
  return r;
}

// Without tensor cores: every lane walks over all of k. The lanes that share their rows start at
// different quarters of the chunk, and so read different banks.
template <class T>
struct Plain {
  using Element = T;                 // as states and weights are stored
  using Real = T;                    // of sums and the cell's maths
  static constexpr int kUnroll = 1;  // of the loop over chunks: loads in flight against code
  static constexpr bool kTensor = false;

  template <int N, class Load>
  static FASTCELL_INLINE void chunk(Real (&sums)[N][4], const char* row, Index row_bytes,
                                    const char* weights, const Load& load) {
    const int quad = lane() & 3;
    const char* columns = weights + 2 * quad * kChunkBytes;
    for (int i = 0; i < 4; ++i) {
      const int at = ((i + quad) & 3) * 16;
      const Vector<T> a = as_vector<T>(load(row + at));
      const Vector<T> b = as_vector<T>(load(row + 8 * row_bytes + at));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const char* w = columns + n * kChunkWeights + at;
        const Vector<T> c = as_vector<T>(load16(w));
        const Vector<T> d = as_vector<T>(load16(w + kChunkBytes));
#pragma unroll
        for (int j = 0; j < Vector<T>::count; ++j) {
          sums[n][0] = fma_of(a.v[j], c.v[j], sums[n][0]);
          sums[n][1] = fma_of(a.v[j], d.v[j], sums[n][1]);
          sums[n][2] = fma_of(b.v[j], c.v[j], sums[n][2]);
          sums[n][3] = fma_of(b.v[j], d.v[j], sums[n][3]);
        }
      }
    }
  }
};

// With tensor cores; Kind says what the 32 bits of a fragment hold and which instruction it is.
template <class Kind>
struct Tensor {
  using Element = typename Kind::Element;
  using Real = float;
  static constexpr int kUnroll = 2;
  static constexpr bool kTensor = true;

  template <int N, class Load>
  static FASTCELL_INLINE void chunk(Real (&sums)[N][4], const char* row, Index row_bytes,
                                    const char* weights, const Load& load) {
    Bytes16 own[N];
    take<N>(own, weights);
    held_chunk<N>(sums, row, row_bytes, own, load);
  }

  // A lane's part of a chunk's weights.
  template <int N>
  static FASTCELL_INLINE void take(Bytes16 (&own)[N], const char* weights) {
#pragma unroll
    for (int n = 0; n < N; ++n) own[n] = load16(weights + n * kChunkWeights + lane() * 16);
  }

  template <int N, class Load>
  static FASTCELL_INLINE void held_chunk(Real (&sums)[N][4], const char* row, Index row_bytes,
                                         const Bytes16 (&own)[N], const Load& load) {
    const int at = (lane() & 3) * 16;
    const Bytes16 a = load(row + at);
    const Bytes16 b = load(row + 8 * row_bytes + at);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * half;
        const Bits32 rows[4] = {a.word[i], b.word[i], a.word[i + 1], b.word[i + 1]};
        const Bits32 columns[2] = {own[n].word[i], own[n].word[i + 1]};
        Kind::multiply(sums[n], rows, columns);
      }
    }
  }
};

struct BFloat16Kind {
  using Element = BFloat16;
  static FASTCELL_INLINE void multiply(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
    mma_bfloat16(d, a, b);
  }
};

struct Float16Kind {
  using Element = Float16;
  static FASTCELL_INLINE void multiply(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
    mma_float16(d, a, b);
  }
};

// float32 of which the products see 10 bits of the mantissa: who stores operands rounds them.
struct Tf32Kind {
  using Element = float;
  static FASTCELL_INLINE void multiply(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
    mma_tf32(d, a, b);
  }
};

// A number as an operand of the next product.
template <class P>
struct Operand {
  template <class Real, class E>
  static FASTCELL_INLINE void from(Real x, E& to) {
    narrow(x, to);
  }
};

using Float64 = Plain<double>;
using Float32 = Plain<float>;
using Tf32 = Tensor<Tf32Kind>;
using Half = Tensor<Float16Kind>;
using Brain = Tensor<BFloat16Kind>;

template <>
struct Operand<Tf32> {
  static FASTCELL_INLINE void from(float x, float& to) {
    to = x != x ? x : float_of((bits_of(x) + 0x1000u) & ~0x1fffu);
  }
};

}  // namespace fastcell::cuda
