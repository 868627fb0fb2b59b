// The innermost product: a register tile of R rows times N vectors of columns.
//
// Each output element is one chain of FMAs over k, in order, whatever the tile around it: results
// do not depend on how rows and columns are grouped (docs/numerics.md, "the same bits").
#pragma once

#include "simd.h"

namespace fastcell::FASTCELL_ISA {

constexpr int kMaxVectors = 4;  // widest panel, in vectors

// Rows per tile for a panel of `vectors`: what keeps accumulators, one panel row and a broadcast
// in registers.
constexpr int tile_rows(int vectors) {
  if (kRegisters >= 32) return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12;
  return vectors >= 4 ? 3 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
}
constexpr int kMaxRows = 12;

template <class T>
struct TileArgs {
  const T* const* a;  // one pointer per row, element k at a[row][a_offset + k * a_step]
  int64_t a_offset;
  const T* panel;  // [k][N vectors]
  int64_t k;
  T* const* c;     // one pointer per row
  int64_t c_step;  // elements from one vector of a row of c to the next
  const T* init;   // what the sums begin with: [N vectors] for all rows, or null for c itself
};

template <class T, int R, int N, int AStep>
void tile(const TileArgs<T>& t) {
  using V = Vec<T>;
  V acc[R][N];
  const T* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) a[r] = t.a[r] + t.a_offset;
  const int64_t init_step = t.init ? V::lanes : t.c_step;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const T* const from = t.init ? t.init : t.c[r];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = V::load(from + n * init_step);
  }
  const T* panel = t.panel;
  const int64_t count = t.k;
  for (int64_t k = 0; k < count; ++k, panel += N * V::lanes) {
    V w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) w[n] = V::load(panel + n * V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V x(a[r][k * AStep]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = fma(x, w[n], acc[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n].store(t.c[r] + n * t.c_step);
  }
}

// tile() for `rows` and `vectors` known at run time only.
template <class T, int AStep, int R = kMaxRows, int N = kMaxVectors>
FASTCELL_INLINE void run_tile(int rows, int vectors, const TileArgs<T>& t) {
  if constexpr (N > 1) {
    if (vectors < N) return run_tile<T, AStep, kMaxRows, N - 1>(rows, vectors, t);
  }
  constexpr int top = R < tile_rows(N) ? R : tile_rows(N);
  if constexpr (top > 1) {
    if (rows < top) return run_tile<T, AStep, top - 1, N>(rows, vectors, t);
  }
  tile<T, top, N, AStep>(t);
}

// Rows that pass over one panel together. Their sums must stay in cache between blocks of k.
constexpr int kRowBlock = 96;

// c[row] (+)= a[row] times a whole panel, for up to kRowBlock rows. In blocks of k such that the
// panel's part stays in the nearest cache (32 KB) while all rows use it: an L2 cannot feed two FMA
// units with 4 vectors per 24 operations.
template <class T>
FASTCELL_INLINE void multiply_panel(const T* const* a, T* const* c, int rows, const T* panel,
                                    int vectors, int64_t depth, int64_t c_step, const T* init) {
  const int rows_each = tile_rows(vectors);
  const int tiles = (rows + rows_each - 1) / rows_each;
  int64_t block = 32768 / (vectors * kVectorBytes);
  if (tiles <= 1) block = depth;  // nothing is used twice
  int64_t k = 0;
  do {
    const int64_t count = depth - k < block ? depth - k : block;
    // Tiles of nearly equal height: a low one would wait for the panel, not for its sums.
    for (int i = 0, r = 0; i < tiles; ++i) {
      const int n = (rows - r + tiles - i - 1) / (tiles - i);
      run_tile<T, 1>(n, vectors,
                     {a + r, k, panel + k * vectors * Vec<T>::lanes, count, c + r, c_step,
                      k == 0 ? init : nullptr});
      r += n;
    }
    k += count;
  } while (k < depth);
}

}  // namespace fastcell::FASTCELL_ISA
