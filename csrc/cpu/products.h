// Whole-sequence products of the backward pass: gradients of the input and of the weights.
#pragma once

#include "rows.h"

namespace fastcell::FASTCELL_ISA {

// d_x rows = d_gates rows times W_ih: rows x (K = gates) x (N = input features), `panels` packed
// with pack_rows. With `accumulate` the chains go on from what c holds.
//
// Blocks of rows outermost, then blocks of k: the weights stream past once per block of rows, while
// the block's part of `a` and its sums stay in a core's own cache.
template <class T, class ARow, class CRow>
void multiply_rows(const Panels<T>& panels, const T* packed, int64_t rows, ARow a_row, CRow c_row,
                   bool accumulate, const Team& team) {
  using V = Vec<T>;
  constexpr int64_t kDepthBlock = 128;
  // Few rows: the columns are shared out instead.
  const bool by_rows = rows >= 48 * team.size;
  const Range mine = by_rows ? part(rows, team.index, team.size) : Range{0, rows};
  const Range columns =
      by_rows ? Range{0, panels.count()} : part(panels.count(), team.index, team.size);
  alignas(64) T zeros[kMaxVectors * V::lanes] = {};
  alignas(64) T block[kRowBlock * kMaxVectors * V::lanes];

  for (int64_t m0 = mine.begin; m0 < mine.end; m0 += kRowBlock) {
    const int n = int(mine.end - m0 < kRowBlock ? mine.end - m0 : kRowBlock);
    const T* a[kRowBlock];
    T* rows_of_c[kRowBlock];
    for (int i = 0; i < n; ++i) {
      a[i] = a_row(m0 + i);
      rows_of_c[i] = c_row(m0 + i);
    }
    for (int64_t k0 = 0; k0 < panels.depth; k0 += kDepthBlock) {
      const int64_t depth = panels.depth - k0 < kDepthBlock ? panels.depth - k0 : kDepthBlock;
      const bool begin = k0 == 0 && !accumulate;
      for (int64_t p = columns.begin; p < columns.end; ++p) {
        const int vectors = panels.vectors(p);
        const int64_t unit = panels.first_unit(p);
        const bool full = panels.full(p);
        const int64_t bytes = (panels.units - unit) * int64_t(sizeof(T));
        const T* a_block[kRowBlock];
        T* c[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a_block[i] = a[i] + k0;
          c[i] = full ? rows_of_c[i] + unit : block + i * vectors * V::lanes;
          if (!full && !begin) std::memcpy(c[i], rows_of_c[i] + unit, bytes);
        }
        multiply_panel<T>(a_block, c, n, packed + panels.offset(p) + k0 * vectors * V::lanes,
                          vectors, depth, V::lanes, begin ? zeros : nullptr);
        if (full) continue;
        for (int i = 0; i < n; ++i) std::memcpy(rows_of_c[i] + unit, c[i], bytes);
      }
    }
  }
}

// d_W[m][n] = sum over rows r of a[r][m] b[r][n]: M = gates, N = features. Each block of
// kRowsPerBlock rows is a chain of its own, begun at zero; the blocks' sums are added in order: the
// error grows with the length of a block and the number of blocks, not with the number of rows, and
// the bits do not depend on the number of threads. The team shares out M.
template <class T>
class WeightGradient {
  using V = Vec<T>;
  static constexpr int64_t kRowsPerBlock = 512;
  static constexpr int kVectors = 2;  // narrow panels of b stay in the nearest cache
  static constexpr int kRows = tile_rows(kVectors);
  static constexpr int kColumns = kVectors * V::lanes;
  static constexpr int64_t kMBlock = 256;

  static int64_t panel_count(int64_t n) { return (n + kColumns - 1) / kColumns; }

 public:
  struct Buffers {
    T* b;     // shared by the team: two blocks of rows, so that one barrier per block is enough
    T* a[1];  // per thread
    int64_t a_stride;
    int64_t b_stride;

    Buffers(int64_t max_n, int64_t rows, int threads, Arena& arena) {
      const int64_t depth = rows < kRowsPerBlock ? rows : kRowsPerBlock;
      b_stride = panel_count(max_n) * kColumns * depth;
      a_stride = ((kMBlock + kRows - 1) / kRows) * kRows * depth;
      b = arena.take<T>(2 * b_stride);
      a[0] = arena.take<T>(a_stride * threads);
    }
  };

  // a: rows of `a_stride` elements; columns [a_column, a_column + m). b_row(walker) -> row pointer,
  // called with rows in order.
  template <class BRow>
  static void run(const T* a, int64_t a_stride, int64_t m, const Timeline& time, BRow b_row,
                  int64_t n, T* d_w, const Buffers& buffers, const Team& team) {
    const int64_t rows = time.rows;
    const int64_t tiles = (m + kRows - 1) / kRows;
    const Range mine = part(tiles, team.index, team.size);
    const int64_t panels = panel_count(n);
    const Range pack = part(panels, team.index, team.size);
    T* const a_pack = buffers.a[0] + team.index * buffers.a_stride;
    int half = 0;
    for (int64_t r0 = 0; r0 < rows; r0 += kRowsPerBlock, half ^= 1) {
      const int64_t depth = rows - r0 < kRowsPerBlock ? rows - r0 : kRowsPerBlock;
      T* const b_pack = buffers.b + half * buffers.b_stride;
      pack_b(time, r0, depth, b_row, n, b_pack, pack);
      team.sync();
      for (int64_t m0 = mine.begin; m0 < mine.end; m0 += kMBlock / kRows) {
        const int64_t m1 = mine.end - m0 < kMBlock / kRows ? mine.end : m0 + kMBlock / kRows;
        pack_a(a + r0 * a_stride, a_stride, m0 * kRows, m1 * kRows < m ? m1 * kRows : m, depth,
               a_pack);
        multiply(a_pack, b_pack, m0, m1, m, n, depth, d_w, r0 == 0);
      }
    }
    team.sync();
  }

 private:
  template <class BRow>
  static void pack_b(const Timeline& time, int64_t r0, int64_t depth, BRow b_row, int64_t n, T* to,
                     Range which) {
    int64_t t = time.offsets ? 0 : r0 / (time.batch > 0 ? time.batch : 1);
    while (time.first(t) + time.alive(t) <= r0) ++t;
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t r = r0 + i;
      if (r >= time.first(t) + time.alive(t)) ++t;
      const T* from = b_row(t, r - time.first(t), r);
      for (int64_t p = which.begin; p < which.end; ++p) {
        T* row = to + (p * depth + i) * kColumns;
        for (int64_t column = p * kColumns; column < (p + 1) * kColumns; column += V::lanes) {
          const int64_t left = n - column;
          const V value =
              left > 0 ? load_first(from + column, left < V::lanes ? int(left) : V::lanes) : V(0);
          value.store(row + column - p * kColumns);
        }
      }
    }
  }

  static void pack_a(const T* a, int64_t a_stride, int64_t m0, int64_t m1, int64_t depth, T* to) {
    for (int64_t k = 0; k < depth; ++k, a += a_stride) {
      T* tile = to + k * kRows;
      int64_t m = m0;
      for (; m + kRows <= m1; m += kRows, tile += depth * kRows) {
        std::memcpy(tile, a + m, kRows * sizeof(T));
      }
      for (int i = 0; m + i < m1; ++i) tile[i] = a[m + i];
    }
  }

  static void multiply(const T* a, const T* b, int64_t m0, int64_t m1, int64_t m, int64_t n,
                       int64_t depth, T* d_w, bool begin) {
    alignas(64) T zeros[kColumns] = {};
    alignas(64) T tile_store[kRows * kColumns];
    for (int64_t p = 0; p < panel_count(n); ++p) {
      const int64_t left = n - p * kColumns;
      const bool full = left >= kColumns;
      for (int64_t tile = m0; tile < m1; ++tile) {
        const int64_t row = tile * kRows;
        const int count = int(m - row < kRows ? m - row : kRows);
        const T* a_tile = a + (tile - m0) * depth * kRows;
        const T* a_rows[kRows];
        T* c[kRows];
        for (int i = 0; i < count; ++i) {
          a_rows[i] = a_tile + i;
          T* const target = d_w + (row + i) * n + p * kColumns;
          c[i] = full && begin ? target : tile_store + i * kColumns;
          // d_w comes from afar, and is needed once the tile is done.
          for (int v = 0; v < kVectors && !begin; ++v) __builtin_prefetch(target + v * V::lanes, 1);
        }
        run_tile<T, kRows>(
            count, kVectors,
            {a_rows, 0, b + p * depth * kColumns, depth, c, V::lanes, zeros});
        if (full && begin) continue;
        for (int i = 0; i < count; ++i) {
          T* const target = d_w + (row + i) * n + p * kColumns;
          for (int v = 0; v < kVectors; ++v) {
            const int valid = int(left - v * V::lanes);
            if (valid <= 0) break;
            V sum = V::load(c[i] + v * V::lanes);
            if (!begin) sum = load_first(target + v * V::lanes, valid) + sum;
            store_first(target + v * V::lanes, sum, valid);
          }
        }
      }
    }
  }
};

// Sums over all rows of the columns [begin, end): in blocks of rows, as the weights' gradients.
template <class T>
void sum_columns(const T* a, int64_t a_stride, int64_t rows, int64_t begin, int64_t end, T* sums) {
  using V = Vec<T>;
  constexpr int kWide = 4;  // vectors side by side: a chain alone would wait for its own sums
  constexpr int64_t kRowsPerBlock = 256;
  for (int64_t column = begin; column < end; column += kWide * V::lanes) {
    int valid[kWide];
    V total[kWide];
    for (int i = 0; i < kWide; ++i) {
      const int64_t left = end - column - i * V::lanes;
      valid[i] = left > V::lanes ? V::lanes : left > 0 ? int(left) : 0;
      total[i] = V(0);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += kRowsPerBlock) {
      const int64_t r1 = rows - r0 < kRowsPerBlock ? rows : r0 + kRowsPerBlock;
      V sum[kWide] = {V(0), V(0), V(0), V(0)};
      const T* from = a + r0 * a_stride + column;
      for (int64_t r = r0; r < r1; ++r, from += a_stride) {
        for (int i = 0; i < kWide && valid[i] > 0; ++i) {
          sum[i] = sum[i] + load_first(from + i * V::lanes, valid[i]);
        }
      }
      for (int i = 0; i < kWide; ++i) total[i] = total[i] + sum[i];
    }
    for (int i = 0; i < kWide && valid[i] > 0; ++i) {
      store_first(sums + column - begin + i * V::lanes, total[i], valid[i]);
    }
  }
}

}  // namespace fastcell::FASTCELL_ISA
