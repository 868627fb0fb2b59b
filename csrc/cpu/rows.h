// Walking over the rows (t, b) of a sequence, and handing them out in blocks.
#pragma once

#include "../common/stack.h"
#include "panels.h"

namespace fastcell::FASTCELL_ISA {

// Elements from one row of a state to the next: whole vectors, and rows of a large power of two
// apart would all fall into the same few sets of a cache.
template <class T>
constexpr int64_t padded_row(int64_t features) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const int64_t padded = (features + lanes - 1) / lanes * lanes;
  return padded % (1024 / int64_t(sizeof(T))) == 0 ? padded + lanes : padded;
}

struct Row {
  int64_t t, b, r;  // r: index in time-major order
};

// A function of a row's index, for code that is large, and need not be compiled for each such. It
// points to the function, which must outlive it.
template <class Result>
class OfRow {
 public:
  template <class F>
  OfRow(const F& f)
      : function_(&f), call_([](const void* function, int64_t r) -> Result {
          return (*static_cast<const F*>(function))(r);
        }) {}
  Result operator()(int64_t r) const { return call_(function_, r); }

 private:
  const void* function_;
  Result (*call_)(const void*, int64_t);
};

// Calls f(rows, n) for blocks of at most kRowBlock of the rows with t in [t0, t1), b in [b0, b1).
template <class F>
FASTCELL_INLINE void for_row_blocks(const Timeline& time, int64_t t0, int64_t t1, int64_t b0,
                                    int64_t b1, F f) {
  Row rows[kRowBlock];
  int n = 0;
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t first = time.first(t);
    const int64_t alive = time.alive(t);
    const int64_t end = b1 < alive ? b1 : alive;
    for (int64_t b = b0; b < end; ++b) {
      rows[n++] = Row{t, b, first + b};
      if (n == kRowBlock) {
        f(rows, n);
        n = 0;
      }
    }
  }
  if (n > 0) f(rows, n);
}

// Zeros where a padded batch has no step of a sample; every thread of a team does its part.
template <class T>
FASTCELL_INLINE void clear_padding(const Timeline& time, const RowMap<T>& rows, int64_t features,
                                   const Team& team) {
  if (!time.order || !rows.base) return;
  for (int64_t t = team.index; t < time.padded_steps; t += team.size) {
    for (int64_t b = t < time.steps ? time.alive(t) : 0; b < time.samples; ++b) {
      std::memset(rows.at(t, b, 0), 0, features * sizeof(T));
    }
  }
}

// A thread's share of (panels x batch): contiguous in panel-major order, so that a thread meets the
// same weights at every step. Calls f(panel, b0, b1).
struct Share {
  int64_t begin, end;  // in units of (panel, batch tile)
  int64_t tiles;       // batch tiles per panel
  int64_t b0, b1;      // the batch range that is shared
  int rows_each;

  Share(int64_t panels, int64_t b0, int64_t b1, int rows_each, int index, int parts)
      : tiles((b1 - b0 + rows_each - 1) / rows_each), b0(b0), b1(b1), rows_each(rows_each) {
    const Range range = part(panels * tiles, index, parts);
    begin = range.begin;
    end = range.end;
  }

  // How often for_each() will call.
  int64_t panels() const { return begin < end ? (end - 1) / tiles - begin / tiles + 1 : 0; }

  // Every other step in the opposite order: what was used last is still in the nearest cache.
  template <class F>
  FASTCELL_INLINE void for_each(bool backwards, F f) const {
    if (begin >= end) return;
    const int64_t p0 = begin / tiles, p1 = (end - 1) / tiles;
    for (int64_t i = 0; i <= p1 - p0; ++i) {
      const int64_t p = backwards ? p1 - i : p0 + i;
      const int64_t lo = p == p0 ? begin - p * tiles : 0;
      const int64_t hi = p == p1 ? end - p * tiles : tiles;
      const int64_t last = b0 + hi * rows_each;
      f(p, b0 + lo * rows_each, last < b1 ? last : b1);
    }
  }
};

// The samples of part `index` of a batch: of a ragged one, the longest first, so that all parts
// have nearly as many rows.
inline Range batch_part(const Timeline& time, int index, int parts) {
  if (!time.offsets) return part(time.batch, index, parts);
  const auto cut = [&](int64_t wanted) {
    int64_t low = 0, high = time.batch;  // the first samples that have so many rows
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      int64_t rows = 0;
      for (int64_t t = 0; t < time.steps; ++t) {
        rows += time.alive(t) < middle ? time.alive(t) : middle;
      }
      if (rows < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const Range rows = part(time.rows, index, parts);
  return {cut(rows.begin), cut(rows.end)};
}

// One thread's place within the schedule of a layer.
struct Place {
  int direction_group, directions;  // handles directions direction_group, + directions, ...
  int layer_group, layer_groups;    // a wavefront: its part of the layers, as part() cuts them
  int64_t b0, b1;                   // its part of the batch
  int index, size;                  // within the threads that share that part
  Barrier* barrier;

  Place(const Schedule& wanted, const Team& team, Barrier* barriers, const Timeline& time) {
    Schedule s = wanted;
    // The runtime may have given another number of threads than the schedule was made for.
    if (s.threads() != team.size ||
        s.direction_groups * s.batch_groups * s.layer_groups >= kMaxBarriers) {
      s = Schedule{1, 1, team.size};
    }
    const int group = team.index / s.unit_threads;
    index = team.index % s.unit_threads;
    size = s.unit_threads;
    layer_groups = s.layer_groups;
    layer_group = group % s.layer_groups;
    direction_group = s.layer_groups > 1 ? 0 : group / s.batch_groups;
    directions = s.direction_groups;
    const Range range = batch_part(time, group % s.batch_groups, s.batch_groups);
    b0 = range.begin;
    b1 = range.end;
    barrier = barriers + 1 + group;  // barrier 0 is the whole team's
  }

  void sync() const {
    if (size > 1) wait(*barrier, size);
  }
};

}  // namespace fastcell::FASTCELL_ISA
