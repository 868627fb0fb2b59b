// Weights as panels: the columns that one register tile covers, contiguous for each k.
//
// A panel interleaves the gates of one block of hidden units, so that the thread that computes a
// panel holds every gate of those units and finishes their state while it is in cache.
//
// For the last panel few units may be left. Then its gates follow one another closely, in fewer
// vectors, instead of having a vector each.
#pragma once

#include "team.h"
#include "tile.h"

namespace fastcell::FASTCELL_ISA {

// Unit blocks whose gates fit a panel.
constexpr int blocks_fitting(int gates) { return gates == 1 ? kMaxVectors : gates == 2 ? 2 : 1; }

template <class T>
struct Panels {
  static constexpr int lanes = Vec<T>::lanes;
  int gates;      // columns per unit
  int64_t units;  // e.g. hidden units
  int64_t depth;  // k
  int most_blocks = kMaxVectors;
  int64_t compact_above = INT64_MAX;  // units above which the last panel may be made so

  // Unit blocks (of `lanes` units) per full panel.
  int blocks_each() const {
    const int fitting = blocks_fitting(gates);
    return fitting < most_blocks ? fitting : most_blocks;
  }
  int64_t units_each() const { return int64_t(blocks_each()) * lanes; }
  int64_t count() const { return (units + units_each() - 1) / units_each(); }
  int64_t first_unit(int64_t p) const { return p * units_each(); }
  int blocks(int64_t p) const {
    const int64_t left = (units - first_unit(p) + lanes - 1) / lanes;
    return left < blocks_each() ? int(left) : blocks_each();
  }
  // Whether p's gates follow one another closely, which saves a vector at least.
  bool close(int64_t p) const {
    const int64_t left = units - first_unit(p);
    return units > compact_above && blocks_each() == 1 && left < lanes &&
           gates * left <= (gates - 1) * lanes;
  }
  // Columns from one gate of a block to the next.
  int gate_width(int64_t p) const { return close(p) ? int(units - first_unit(p)) : lanes; }
  int vectors(int64_t p) const {
    return close(p) ? (gates * gate_width(p) + lanes - 1) / lanes : gates * blocks(p);
  }
  int rows_each() const { return tile_rows(gates * blocks_each()); }
  bool full(int64_t p) const { return first_unit(p) + int64_t(blocks(p)) * lanes <= units; }
  int64_t offset(int64_t p) const { return p * units_each() * gates * depth; }
  int64_t padded_units() const { return (units + lanes - 1) / lanes * lanes; }
  int64_t size() const { return padded_units() * gates * depth; }
};

// v[i][j] <-> v[j][i] for a square of registers.
template <class T>
FASTCELL_INLINE void transpose(Vec<T> (&v)[Vec<T>::lanes]) {
  constexpr int L = Vec<T>::lanes;
#if defined(__GNUC__) && !defined(__clang__)
  typename Vec<T>::Bits low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + (i % 2) * L;
    high[i] = low[i] + L / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i].v = __builtin_shuffle(v[i].v, v[i + L / 2].v, low);
      next[2 * i + 1].v = __builtin_shuffle(v[i].v, v[i + L / 2].v, high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = next[i];
  }
#else
  T square[L][L];
  for (int i = 0; i < L; ++i) v[i].store(square[i]);
  for (int i = 0; i < L; ++i) {
    for (int j = 0; j < L; ++j) v[j].v[i] = square[i][j];
  }
#endif
}

// From a weight matrix as torch stores it: source[gate * units + unit][k]. A panel's gates begin
// with `first_gate` and go round.
template <class T>
void pack_transposed(const Panels<T>& panels, const T* source, T* packed, Range which,
                     int first_gate) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t depth = panels.depth;
  for (int64_t p = which.begin; p < which.end; ++p) {
    const int64_t width = int64_t(panels.vectors(p)) * L, gate_width = panels.gate_width(p);
    const int stored = int(gate_width);  // padding behind a gate, but not over the next one
    if (panels.close(p)) std::memset(packed + panels.offset(p), 0, width * depth * sizeof(T));
    for (int block = 0; block < panels.blocks(p); ++block) {
      const int64_t unit = panels.first_unit(p) + block * L;
      const int valid = int(panels.units - unit < L ? panels.units - unit : L);
      for (int slot = 0; slot < panels.gates; ++slot) {
        const int gate = (first_gate + slot) % panels.gates;
        const T* rows = source + (gate * panels.units + unit) * depth;
        T* to = packed + panels.offset(p) + (block * panels.gates + slot) * gate_width;
        for (int64_t k = 0; k < depth; k += L) {
          const int count = int(depth - k < L ? depth - k : L);
          V square[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            square[i] = i < valid ? load_first(rows + i * depth + k, count) : V(0);
          }
          transpose<T>(square);
          for (int i = 0; i < count; ++i) store_first(to + (k + i) * width, square[i], stored);
        }
      }
    }
  }
}

// From rows that already lie along the columns: row(k)[column], for k in [0, depth).
template <class T, class RowOf>
FASTCELL_INLINE void pack_rows(const Panels<T>& panels, RowOf row, T* packed, Range which) {
  using V = Vec<T>;
  for (int64_t p = which.begin; p < which.end; ++p) {
    const int64_t width = int64_t(panels.vectors(p)) * V::lanes;
    const int64_t unit = panels.first_unit(p);
    T* to = packed + panels.offset(p);
    for (int64_t k = 0; k < panels.depth; ++k, to += width) {
      const T* from = row(k) + unit;
      for (int64_t n = 0; n < width; n += V::lanes) {
        load_first(from + n, int(panels.units - unit - n)).store(to + n);
      }
    }
  }
}

}  // namespace fastcell::FASTCELL_ISA
