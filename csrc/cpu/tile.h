// The innermost product: a register tile of R rows times N vectors of columns.
//
// Each output element is a sum of chains of FMAs over k, each begun at zero and of fixed length, in
// order, whatever the tile around it: results do not depend on how rows and columns are grouped
// (docs/numerics.md, "the same bits").
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

// How a product multiplies and adds, `group` values of k at a time: in `parts` turns, so that a
// turn's columns fit in registers.
template <class T>
struct Plain {
  using Element = T;  // of rows and panels
  using Sum = T;
  using Columns = Vec<T>;
  static constexpr int group = 1;
  static constexpr int parts = 1;

  static FASTCELL_INLINE Vec<T> row(const T* a, int) { return Vec<T>(*a); }
  static FASTCELL_INLINE Columns columns(const T* panel, int) { return Vec<T>::load(panel); }
  static FASTCELL_INLINE Vec<T> add(Vec<T> row, Columns columns, Vec<T> sum) {
    return fma(row, columns, sum);
  }
};

template <class P>
struct TileArgs {
  using Element = typename P::Element;
  using Sum = typename P::Sum;

  // One pointer per row, whose group k lies at a[row][(a_offset + k) * group]; of rows side by side
  // one pointer for all: group k of row r at (*a)[a_offset + k * AStep + r].
  const Element* const* a;
  int64_t a_offset;
  const Element* panel;  // [k][N vectors][group]
  int64_t k;             // groups
  Sum* const* c;         // one pointer per row
  int64_t c_step;        // elements from one vector of a row of c to the next
  const Sum* init;     // what the sums are added to: [N vectors] for all rows, or null for c itself
  const char* ahead;   // what to read into cache meanwhile:
  int64_t ahead_step;  // so many bytes further for each group
};

// Tiles that have registers left for reading ahead; lower ones have no time for it.
constexpr bool reads_ahead(int rows) { return rows > 2 && rows <= 8; }

// One chain: c += a times the panel, or init + that.
template <class P, int R, int N, int AStep>
void tile(const TileArgs<P>& t) {
  using V = Vec<typename P::Sum>;
  V acc[R][N];
  const typename P::Element* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = (AStep > 1 ? t.a[0] + r : t.a[r]) + t.a_offset * P::group;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = V(0);
  }
  const typename P::Element* panel = t.panel;
  const int64_t count = t.k;
  const char* ahead = t.ahead;
  const int64_t ahead_step = t.ahead_step;
  for (int64_t k = 0; k < count; ++k, panel += N * V::lanes * P::group) {
    if constexpr (reads_ahead(R)) {
      __builtin_prefetch(ahead);
      ahead += ahead_step;
    }
#pragma GCC unroll 4
    for (int part = 0; part < P::parts; ++part) {
      typename P::Columns columns[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        columns[n] = P::columns(panel + n * V::lanes * P::group, part);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto x = P::row(a[r] + k * AStep * P::group, part);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = P::add(x, columns[n], acc[r][n]);
      }
    }
  }
  typename P::Sum* c[R];
  const typename P::Sum* from[R];
  const int64_t c_step = t.c_step, from_step = t.init ? V::lanes : c_step;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    c[r] = t.c[r];
    from[r] = t.init ? t.init : c[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      (V::load(from[r] + n * from_step) + acc[r][n]).store(c[r] + n * c_step);
    }
  }
}

// tile() for `rows` and `vectors` known at run time only.
template <class P, int AStep, int R = kMaxRows, int N = kMaxVectors>
FASTCELL_INLINE void run_tile(int rows, int vectors, const TileArgs<P>& t) {
  if constexpr (N > 1) {
    if (vectors < N) return run_tile<P, AStep, kMaxRows, N - 1>(rows, vectors, t);
  }
  constexpr int top = R < tile_rows(N) ? R : tile_rows(N);
  if constexpr (top > 1) {
    if (rows < top) return run_tile<P, AStep, top - 1, N>(rows, vectors, t);
  }
  tile<P, top, N, AStep>(t);
}

// The length of a chain, in groups of k: the rounding errors of a sum grow with it. And a panel's
// part of that length stays in the nearest cache while several tiles use it: an L2 cannot feed two
// FMA units with 4 vectors per 24 operations.
constexpr int64_t kChain = 128;

// Rows that pass over one panel together. Their sums must stay in cache between chains.
constexpr int kRowBlock = 96;

constexpr int64_t kCacheLine = 64;

// c[row] (+)= a[row] times a whole panel, for up to kRowBlock rows, chain by chain. `depth` is in
// groups. `next`: what the caller goes on with, by default what lies behind the panel.
//
// While a chain's tiles work, they read the panel's part of the next chain into the nearest cache:
// the first of its tiles would wait for it, where the weights do not fit in a core's own caches.
// (One copy for all callers: it holds all tiles, and a call is nothing beside them.)
template <class P>
FASTCELL_CALLED void multiply_panel(const typename P::Element* const* a, typename P::Sum* const* c,
                                    int rows, const typename P::Element* panel, int vectors,
                                    int64_t depth, int64_t c_step, const typename P::Sum* init,
                                    const typename P::Element* next = nullptr) {
  const int rows_each = tile_rows(vectors);
  const int tiles = (rows + rows_each - 1) / rows_each;
  // As many tiles as read it all, a line for each group of theirs.
  const int reading = (vectors * kVectorBytes + kCacheLine - 1) / kCacheLine;
  const int64_t group_size = vectors * Vec<typename P::Sum>::lanes * P::group;
  int64_t k = 0;
  do {
    const int64_t count = depth - k < kChain ? depth - k : kChain;
    const auto* const part = panel + k * group_size;
    const auto* const following = k + count < depth || !next ? part + count * group_size : next;
    const char* const ahead = reinterpret_cast<const char*>(following);
    // Tiles of nearly equal height: a low one would wait for the panel, not for its sums.
    for (int i = 0, r = 0; i < tiles; ++i) {
      const int n = (rows - r + tiles - i - 1) / (tiles - i);
      const bool reads = tiles >= reading && i < reading;
      run_tile<P, 1>(n, vectors,
                     {a + r, k, part, count, c + r, c_step, k == 0 ? init : nullptr,
                      reads ? ahead + i * count * kCacheLine : reinterpret_cast<const char*>(part),
                      reads ? kCacheLine : 0});
      r += n;
    }
    k += count;
  } while (k < depth);
}

// Panels that a single row passes over at once. One alone would keep the FMA units waiting for its
// sums, and the gates that follow them would wait, too; those of several overlap. (More of them
// leave nothing in the nearest cache for the next step.)
constexpr int kAtOnce = 3;

// Adds one row times W panels, `step` elements apart, to their sums in registers. An element's sum
// is the one that multiply_panel() makes.
template <class P, int W, int N>
FASTCELL_INLINE void add_across(const typename P::Element* a, const typename P::Element* panel,
                                int64_t step, int64_t depth, Vec<typename P::Sum> (&sums)[W][N]) {
  using V = Vec<typename P::Sum>;
  do {
    const int64_t count = depth < kChain ? depth : kChain;
    V chain[W][N];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) chain[w][n] = V(0);
    }
    for (int64_t k = 0; k < count; ++k, a += P::group, panel += N * V::lanes * P::group) {
#pragma GCC unroll 4
      for (int part = 0; part < P::parts; ++part) {
        const auto x = P::row(a, part);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            chain[w][n] = P::add(x, P::columns(panel + w * step + n * V::lanes * P::group, part),
                                 chain[w][n]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[w][n] = sums[w][n] + chain[w][n];
    }
    depth -= count;
  } while (depth > 0);
}

// The same with sums in memory, whose vectors are c_step apart: c[w] += a times the panel, or init
// + that (init: [W][N vectors]).
template <class P, int W, int N>
void tile_across(const typename P::Element* a, const typename P::Element* panel, int64_t step,
                 int64_t depth, typename P::Sum* const* c, int64_t c_step,
                 const typename P::Sum* init) {
  using V = Vec<typename P::Sum>;
  V sums[W][N];
  const int64_t init_step = init ? V::lanes : c_step;
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) {
    const auto* const from = init ? init + w * N * V::lanes : c[w];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[w][n] = V::load(from + n * init_step);
  }
  add_across<P>(a, panel, step, depth, sums);
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[w][n].store(c[w] + n * c_step);
  }
}

// multiply_panel() of one row and `panels` <= kAtOnce panels of one width that follow one another.
template <class P, int W = kAtOnce, int N = kMaxVectors>
FASTCELL_INLINE void multiply_across(const typename P::Element* a, typename P::Sum* const* c,
                                     int panels, const typename P::Element* panel, int64_t step,
                                     int vectors, int64_t depth, int64_t c_step,
                                     const typename P::Sum* init) {
  if constexpr (N > 1) {
    if (vectors < N) {
      return multiply_across<P, W, N - 1>(a, c, panels, panel, step, vectors, depth, c_step, init);
    }
  }
  if constexpr (W > 1) {
    if (panels < W) {
      return multiply_across<P, W - 1, N>(a, c, panels, panel, step, vectors, depth, c_step, init);
    }
  }
  tile_across<P, W, N>(a, panel, step, depth, c, c_step, init);
}

}  // namespace fastcell::FASTCELL_ISA
