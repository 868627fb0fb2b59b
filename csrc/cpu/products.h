// Whole-sequence products of the backward pass: gradients of the input and of the weights.
#pragma once

#include "rows.h"

namespace fastcell::FASTCELL_ISA {

// d_x rows = d_gates rows times W_ih: rows x (K = gates) x (N = input features), `panels` packed
// with pack_rows. With `add` the result is added to what c holds: a chain of its own, so that it
// does not matter which of two directions comes first.
//
// Blocks of rows outermost, then blocks of k: the weights stream past once per block of rows, while
// the block's part of `a` and its sums stay in a core's own cache. `scratch`: kRowBlock rows of
// panels.padded_units() for each thread, used where there is something to add to.
template <class T>
void multiply_rows(const Panels<T>& panels, const T* packed, Range rows, OfRow<const T*> a_row,
                   OfRow<T*> c_row, bool add, T* scratch, const Team& team) {
  using V = Vec<T>;
  constexpr int64_t kDepthBlock = 128;
  // Few rows: the columns are shared out instead.
  const bool by_rows = rows.end - rows.begin >= 48 * team.size;
  const Range share = part(rows.end - rows.begin, team.index, team.size);
  const Range mine = by_rows ? Range{rows.begin + share.begin, rows.begin + share.end} : rows;
  const Range columns =
      by_rows ? Range{0, panels.count()} : part(panels.count(), team.index, team.size);
  alignas(64) T zeros[kMaxVectors * V::lanes] = {};
  alignas(64) T block[kRowBlock * kMaxVectors * V::lanes];
  const int64_t stride = panels.padded_units();
  scratch += team.index * kRowBlock * stride;

  for (int64_t m0 = mine.begin; m0 < mine.end; m0 += kRowBlock) {
    const int n = int(mine.end - m0 < kRowBlock ? mine.end - m0 : kRowBlock);
    const T* a[kRowBlock];
    T* rows_of_c[kRowBlock];
    for (int i = 0; i < n; ++i) {
      a[i] = a_row(m0 + i);
      rows_of_c[i] = add ? scratch + i * stride : c_row(m0 + i);
    }
    for (int64_t k0 = 0; k0 < panels.depth; k0 += kDepthBlock) {
      const int64_t depth = panels.depth - k0 < kDepthBlock ? panels.depth - k0 : kDepthBlock;
      for (int64_t p = columns.begin; p < columns.end; ++p) {
        const int vectors = panels.vectors(p);
        const int64_t unit = panels.first_unit(p);
        const bool whole = add || panels.full(p);  // scratch has room for the padding
        const int64_t bytes = (panels.units - unit) * int64_t(sizeof(T));
        const T* a_block[kRowBlock];
        T* c[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a_block[i] = a[i] + k0;
          c[i] = whole ? rows_of_c[i] + unit : block + i * vectors * V::lanes;
          if (!whole && k0 > 0) std::memcpy(c[i], rows_of_c[i] + unit, bytes);
        }
        const auto part_of = [&](int64_t panel, int64_t k) {
          return packed + panels.offset(panel) + k * panels.vectors(panel) * V::lanes;
        };
        multiply_panel<Plain<T>>(
            a_block, c, n, part_of(p, k0), vectors, depth, V::lanes, k0 == 0 ? zeros : nullptr,
            p + 1 < columns.end
                ? part_of(p + 1, k0)
                : part_of(columns.begin, k0 + depth < panels.depth ? k0 + depth : 0));
        if (whole) continue;
        for (int i = 0; i < n; ++i) std::memcpy(rows_of_c[i] + unit, c[i], bytes);
      }
    }
    if (!add || columns.begin == columns.end) continue;
    const int64_t first = panels.first_unit(columns.begin);
    const int64_t last =
        columns.end < panels.count() ? panels.first_unit(columns.end) : panels.units;
    for (int i = 0; i < n; ++i) {
      T* const to = c_row(m0 + i);
      for (int64_t j = first; j < last; ++j) to[j] += rows_of_c[i][j];
    }
  }
}

// Up to so many rows, packing weights for one product would take longer than that.
constexpr int64_t kFewRows = 12;

// R rows of multiply_rows() and some columns, up to N vectors of them, of which the last has
// `valid` numbers.
template <class T, int R, int N>
FASTCELL_INLINE void multiply_unpacked(const T* const* a, const T* w, int64_t stride, int64_t depth,
                                       int vectors, int valid, T* const* c, bool add) {
  using V = Vec<T>;
  V sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = V(0);
  }
  const auto some = [&](const T* row, int n) {
    return n + 1 < vectors ? V::load(row + n * V::lanes)
           : n < vectors   ? load_first(row + n * V::lanes, valid)
                           : V(0);
  };
  for (int64_t k0 = 0; k0 < depth; k0 += kChain) {
    const int64_t end = depth - k0 < kChain ? depth : k0 + kChain;
    V chain[R][N];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) chain[r][n] = V(0);
    }
    const auto run = [&](const auto& columns) {
      for (int64_t k = k0; k < end; ++k) {
        V from[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) from[n] = columns(w + k * stride, n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V x(a[r][k]);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) chain[r][n] = fma(x, from[n], chain[r][n]);
        }
      }
    };
    if (vectors == N && valid == V::lanes) {
      run([](const T* row, int n) { return V::load(row + n * V::lanes); });
    } else {
      run(some);
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) sums[r][n] = sums[r][n] + chain[r][n];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N && n < vectors; ++n) {
      const int count = n + 1 < vectors ? V::lanes : valid;
      T* const to = c[r] + n * V::lanes;
      store_first(to, add ? load_first(to, count) + sums[r][n] : sums[r][n], count);
    }
  }
}

// multiply_rows() of few rows, straight from the weights (depth, units) as the caller has them: the
// same chains, and so the same bits.
template <class T>
void multiply_few_rows(const T* w, int64_t units, int64_t depth, Range rows, OfRow<const T*> a_row,
                       OfRow<T*> c_row, bool add, const Team& team) {
  constexpr int64_t L = Vec<T>::lanes, kWide = 8, kNarrow = 2, kTogether = 4;
  const Range mine = part((units + kWide * L - 1) / (kWide * L), team.index, team.size);
  const int64_t last = mine.end * kWide * L < units ? mine.end * kWide * L : units;
  for (int64_t m = rows.begin; m < rows.end; m += kTogether) {
    const T* a[kTogether];
    T* c[kTogether];
    const int n = int(rows.end - m < kTogether ? rows.end - m : kTogether);
    for (int i = 0; i < n; ++i) {
      a[i] = a_row(m + i);
      c[i] = c_row(m + i);
    }
    const auto columns = [&](auto together, auto wide, int first) {
      for (int64_t unit = mine.begin * kWide * L; unit < last; unit += wide * L) {
        const int64_t left = last - unit < wide * L ? last - unit : wide * L;
        const int vectors = int((left + L - 1) / L), valid = int(left - (vectors - 1) * L);
        T* to[together];
        for (int i = 0; i < together; ++i) to[i] = c[first + i] + unit;
        multiply_unpacked<T, together, wide>(a + first, w + unit, units, depth, vectors, valid, to,
                                             add);
      }
    };
    if (n == kTogether) {
      columns(std::integral_constant<int, kTogether>{}, std::integral_constant<int, kNarrow>{}, 0);
    } else {
      for (int i = 0; i < n; ++i) {
        columns(std::integral_constant<int, 1>{}, std::integral_constant<int, kWide>{}, i);
      }
    }
  }
}

// Gradients of the weights: d_W[m][n] = sum over rows r of a[r][m] b[r][n], with M gates and N
// features, of the input's weights (b = x) and the recurrent ones (b = h_{t-1}) together, since
// they share `a`. Each block of kRowsPerBlock rows is a chain of its own, begun at zero; the
// blocks' sums are added in order: the error grows with the length of a block and the number of
// blocks, not with the number of rows, and the bits do not depend on the number of threads. The
// team shares out M.
template <class T>
class WeightGradient {
  using V = Vec<T>;
  static constexpr int kVectors = 2;  // narrow panels of b stay in the nearest cache
  static constexpr int kRows = tile_rows(kVectors);
  static constexpr int kColumns = kVectors * V::lanes;
  static constexpr int64_t kMBlock = 256;

  static int64_t panel_count(int64_t n) { return (n + kColumns - 1) / kColumns; }

 public:
  static constexpr int64_t kRowsPerBlock = 512;

  struct Buffers {
    T* b;  // shared by the team: two blocks of rows, so that one barrier per block is enough
    T* a;  // per thread
    int64_t a_stride;
    int64_t b_stride;

    // max_x, max_h: the most features of either kind of b.
    Buffers(int64_t max_x, int64_t max_h, int64_t rows, int threads, Arena& arena) {
      const int64_t depth = rows < kRowsPerBlock ? rows : kRowsPerBlock;
      b_stride = (panel_count(max_x) + panel_count(max_h)) * kColumns * depth;
      a_stride = ((kMBlock + kRows - 1) / kRows) * kRows * depth;
      b = arena.take<T>(2 * b_stride);
      a = arena.take<T>(a_stride * threads);
    }
  };

  // One kind of b: `n` features, row(t, b, r) is called with rows in order.
  template <class Row>
  struct Features {
    Row row;
    int64_t n;
  };

  // Columns [column, column + m) of `a`, and where their gradients go (null: not asked for).
  struct Part {
    int64_t column, m;
    T* d_x;
    T* d_h;
  };

  // rows: of the timeline; a's row r lies at a + (r - rows.begin) * a_stride. With `begin`
  // gradients are written, else added to. `half` alternates from block to block and from call to
  // call.
  template <class XRow, class HRow, int N>
  static void run(const T* a, int64_t a_stride, const Timeline& time, Range rows,
                  const Features<XRow>& x, const Features<HRow>& h, const Part (&parts)[N],
                  bool begin, int& half, const Buffers& buffers, const Team& team) {
    bool any_x = false, any_h = false;
    for (const Part& part : parts) {
      any_x = any_x || part.d_x;
      any_h = any_h || part.d_h;
    }
    if (!any_x && !any_h) return;
    const int64_t x_panels = any_x ? panel_count(x.n) : 0;
    const int64_t h_panels = any_h ? panel_count(h.n) : 0;
    T* const a_pack = buffers.a + team.index * buffers.a_stride;
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowsPerBlock, half ^= 1, begin = false) {
      const int64_t depth = rows.end - r0 < kRowsPerBlock ? rows.end - r0 : kRowsPerBlock;
      T* const b_pack = buffers.b + half * buffers.b_stride;
      T* const h_pack = b_pack + x_panels * kColumns * depth;
      const Range share = part(x_panels + h_panels, team.index, team.size);
      const auto clip = [](int64_t i, int64_t low, int64_t high) {
        return i < low ? low : i > high ? high : i;
      };
      const Range of_x{clip(share.begin, 0, x_panels), clip(share.end, 0, x_panels)};
      const Range of_h{clip(share.begin - x_panels, 0, h_panels),
                       clip(share.end - x_panels, 0, h_panels)};
      pack_b(time, r0, depth, x.row, x.n, b_pack, of_x);
      pack_b(time, r0, depth, h.row, h.n, h_pack, of_h);
      team.sync();
      for (const Part& one : parts) {
        if (!one.d_x && !one.d_h) continue;
        const Range mine = part((one.m + kRows - 1) / kRows, team.index, team.size);
        for (int64_t m0 = mine.begin; m0 < mine.end; m0 += kMBlock / kRows) {
          const int64_t m1 = mine.end - m0 < kMBlock / kRows ? mine.end : m0 + kMBlock / kRows;
          pack_a(a + (r0 - rows.begin) * a_stride + one.column, a_stride, m0 * kRows,
                 m1 * kRows < one.m ? m1 * kRows : one.m, depth, a_pack);
          if (one.d_x) multiply(a_pack, b_pack, m0, m1, one.m, x.n, depth, one.d_x, begin);
          if (one.d_h) multiply(a_pack, h_pack, m0, m1, one.m, h.n, depth, one.d_h, begin);
        }
      }
    }
  }

 private:
  template <class Row>
  static void pack_b(const Timeline& time, int64_t r0, int64_t depth, Row b_row, int64_t n, T* to,
                     Range which) {
    if (which.begin >= which.end) return;
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
      const T* const panel = b + p * depth * kColumns;
      for (int64_t i_tile = m0; i_tile < m1; ++i_tile) {
        const int64_t row = i_tile * kRows;
        const int count = int(m - row < kRows ? m - row : kRows);
        const T* a_tile = a + (i_tile - m0) * depth * kRows;
        T* c[kRows] = {};
        for (int i = 0; i < count; ++i) {
          T* const target = d_w + (row + i) * n + p * kColumns;
          c[i] = full && begin ? target : tile_store + i * kColumns;
          // d_w comes from afar, and is needed once the tile is done.
          for (int v = 0; v < kVectors && !begin; ++v) __builtin_prefetch(target + v * V::lanes, 1);
        }
        run_tile<Plain<T>, kRows>(count, kVectors,
                                  {&a_tile, 0, panel, depth, c, V::lanes, zeros,
                                   reinterpret_cast<const char*>(panel), 0});
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
// With `add` they go on from what `sums` holds.
template <class T>
void sum_columns(const T* a, int64_t a_stride, int64_t rows, int64_t begin, int64_t end, bool add,
                 T* sums) {
  using V = Vec<T>;
  constexpr int kWide = 4;  // vectors side by side: a chain alone would wait for its own sums
  constexpr int64_t kRowsPerBlock = 256;
  for (int64_t column = begin; column < end; column += kWide * V::lanes) {
    int valid[kWide];
    V total[kWide];
    for (int i = 0; i < kWide; ++i) {
      const int64_t left = end - column - i * V::lanes;
      valid[i] = left > V::lanes ? V::lanes : left > 0 ? int(left) : 0;
      total[i] =
          add && valid[i] > 0 ? load_first(sums + column - begin + i * V::lanes, valid[i]) : V(0);
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
