// The forward engine: a stack of layers over a sequence, for any cell.
//
// Per layer and direction: the input projection of a chunk of steps as one product, then the steps,
// each a product with the recurrent weights and the cell's pointwise maths on the tile that the
// product has just left in the nearest cache. A chunk's projections are as many as stay in cache.
#pragma once

#include "math.h"
#include "rows.h"

namespace fastcell::FASTCELL_ISA {

// The weights of one layer and direction as pack() lays them out.
template <class T, class Cell>
struct PackedDirection {
  Panels<T> x, h, r;
  T *x_weights, *h_weights, *r_weights;
  T* x_bias;  // [block][gate][lane]: b_ih, with b_hh for the gates whose two terms are joined
  T* h_bias;  // [block][apart][lane]: b_hh of the others

  PackedDirection(const Stack& s, int layer, Arena& arena)
      : x{Cell::gates, s.hidden, s.layer_input(layer)},
        h{Cell::gates, s.hidden, s.output},
        r{1, s.projected ? s.output : 0, s.hidden} {
    x_weights = arena.take<T>(x.size());
    h_weights = arena.take<T>(h.size());
    r_weights = arena.take<T>(r.size());
    x_bias = arena.take<T>(x.padded_units() * Cell::gates);
    h_bias = arena.take<T>(x.padded_units() * Cell::apart);
  }
};

template <class T, template <class> class CellOf>
struct Packing {
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Packed = PackedDirection<T, Cell>;

  static int64_t bytes(const Stack& s) {
    Arena arena(nullptr);
    for (int layer = 0; layer < s.layers; ++layer) {
      for (int dir = 0; dir < s.directions; ++dir) Packed(s, layer, arena);
    }
    return arena.used();
  }

  static void pack(const Stack& s, const void* const* weights, void* packed, const Team& team) {
    Arena arena(packed);
    for (int layer = 0; layer < s.layers; ++layer) {
      for (int dir = 0; dir < s.directions; ++dir, weights += s.weights_each()) {
        const Packed to(s, layer, arena);
        const auto share = [&](const Panels<T>& p) {
          return part(p.count(), team.index, team.size);
        };
        pack_transposed(to.x, static_cast<const T*>(weights[0]), to.x_weights, share(to.x));
        pack_transposed(to.h, static_cast<const T*>(weights[1]), to.h_weights, share(to.h));
        if (s.projected) {
          pack_transposed(to.r, static_cast<const T*>(weights[s.weights_each() - 1]), to.r_weights,
                          share(to.r));
        }
        if (team.index == 0) pack_bias(s, weights, to);
      }
    }
  }

 private:
  static void pack_bias(const Stack& s, const void* const* weights, const Packed& to) {
    const T* b_ih = s.bias ? static_cast<const T*>(weights[2]) : nullptr;
    const T* b_hh = s.bias ? static_cast<const T*>(weights[3]) : nullptr;
    constexpr int joined = Cell::gates - Cell::apart;
    for (int64_t unit = 0; unit < to.x.padded_units(); ++unit) {
      const int64_t block = unit / V::lanes, lane = unit % V::lanes;
      const bool valid = s.bias && unit < s.hidden;
      for (int g = 0; g < Cell::gates; ++g) {
        T value = valid ? b_ih[g * s.hidden + unit] : T(0);
        if (valid && g < joined) value += b_hh[g * s.hidden + unit];
        to.x_bias[(block * Cell::gates + g) * V::lanes + lane] = value;
      }
      for (int a = 0; a < Cell::apart; ++a) {
        to.h_bias[(block * Cell::apart + a) * V::lanes + lane] =
            valid ? b_hh[(joined + a) * s.hidden + unit] : T(0);
      }
    }
  }
};

template <class T, template <class> class CellOf>
class Forward {
 public:
  static int64_t workspace_bytes(const ForwardCall& call) {
    Arena arena(nullptr);
    Buffers(call, arena);
    return arena.used();
  }

  static void run(const ForwardCall& call, const Team& team, Barrier* barriers) {
    Arena workspace(call.workspace);
    const Buffers buffers(call, workspace);
    const Place place(call.schedule, team, barriers, call.time.batch);
    Arena packed(const_cast<void*>(call.packed));
    for (int layer = 0; layer < call.stack.layers; ++layer) {
      const RowMap<const T> x = layer_input(call, buffers, layer, team);
      for (int dir = 0; dir < call.stack.directions; ++dir) {
        const Packed weights(call.stack, layer, packed);
        if (dir % place.directions != place.direction_group) continue;
        Forward(call, buffers, place, weights, x, layer, dir).run_direction();
      }
      team.sync();
    }
  }

 private:
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Packed = PackedDirection<T, Cell>;
  static constexpr int G = Cell::gates;
  static constexpr int A = Cell::apart;
  static constexpr int joined = G - A;
  static constexpr int lanes = V::lanes;
  // Where the saved values have room for them, the projections are written there and overwritten.
  static constexpr bool project_into_saved = Cell::saved >= G;

  struct Buffers {
    T* layer_output[2];  // inner layers when nothing is kept
    T* dropped;          // an inner layer's output after dropout
    T* gates[2];         // per direction: the projections of one chunk
    T* h[2][2];          // per direction, double-buffered: (B, padded output)
    T* c[2];             // per direction: (B, padded hidden) of the states behind h
    T* m[2];             // per direction: (B, padded hidden), before the projection
    int64_t chunk;       // steps
    int64_t h_stride, c_stride;

    Buffers(const ForwardCall& call, Arena& arena) {
      const Stack& s = call.stack;
      const Timeline& time = call.time;
      const int64_t width = s.directions * s.output;
      const bool inner = s.layers > 1;
      for (T*& p : layer_output) p = arena.take<T>(inner && !call.reserve ? time.rows * width : 0);
      dropped = arena.take<T>(call.masks ? time.rows * width : 0);
      // About half of a core's own cache, but enough rows to make the product worth its start.
      const int64_t step_bytes = time.batch * G * s.hidden * int64_t(sizeof(T));
      chunk = (int64_t(1) << 20) / (step_bytes > 0 ? step_bytes : 1);
      const int64_t least = (48 + time.batch - 1) / (time.batch > 0 ? time.batch : 1);
      if (chunk < least) chunk = least;
      if (chunk > time.steps) chunk = time.steps;
      const bool in_saved = call.reserve && project_into_saved;
      h_stride = (s.output + lanes - 1) / lanes * lanes;
      c_stride = (s.hidden + lanes - 1) / lanes * lanes;
      for (int dir = 0; dir < s.directions; ++dir) {
        gates[dir] = arena.take<T>(in_saved ? 0 : chunk * time.batch * G * s.hidden);
        for (T*& p : h[dir]) p = arena.take<T>(time.batch * h_stride);
        c[dir] = arena.take<T>((Cell::states - 1) * time.batch * c_stride);
        m[dir] = arena.take<T>(s.projected ? time.batch * c_stride : 0);
      }
    }
  };

  static T* layer_output(const ForwardCall& call, const Buffers& buffers, int layer) {
    const Stack& s = call.stack;
    if (layer == s.layers - 1) return static_cast<T*>(call.y);
    if (!call.reserve) return buffers.layer_output[layer % 2];
    const ReserveLayout layout(s, Cell::saved, Cell::states);
    return static_cast<T*>(call.reserve) + layout.layer_output_at(s, layer, call.time.rows);
  }

  static RowMap<const T> layer_input(const ForwardCall& call, const Buffers& buffers, int layer,
                                     const Team& team) {
    if (layer == 0) {
      return {reinterpret_cast<const T*>(call.x.base), call.x.step, call.x.row, call.x.packed};
    }
    const int64_t width = call.stack.directions * call.stack.output;
    const T* input = layer_output(call, buffers, layer - 1);
    if (call.masks) {
      const int64_t count = call.time.rows * width;
      const T* mask = static_cast<const T*>(call.masks) + (layer - 1) * count;
      const Range range = part(count, team.index, team.size);
      for (int64_t i = range.begin; i < range.end; ++i) buffers.dropped[i] = input[i] * mask[i];
      team.sync();
      input = buffers.dropped;
    }
    return {input, call.time.batch * width, width, true};
  }

  const Stack& s;
  const Timeline& time;
  const Place& place;
  const Packed& w;
  const RowMap<const T> x;
  const bool reverse;
  T* const y;  // this direction's columns
  const int64_t y_stride;
  T* gates;  // row r of the chunk at gates + (r - gates_first) * gates_stride
  int64_t gates_first;
  int64_t gates_stride;
  T* saved;             // or null
  T* kept_states;       // or null
  T* kept_cell_output;  // or null
  T* h[2];
  T* c;
  T* m;
  const int64_t h_stride, c_stride, chunk;
  const bool in_saved;
  const T* initial[Cell::states];
  T* final_state[Cell::states];

  Forward(const ForwardCall& call, const Buffers& buffers, const Place& place, const Packed& w,
          RowMap<const T> x, int layer, int dir)
      : s(call.stack),
        time(call.time),
        place(place),
        w(w),
        x(x),
        reverse(dir == 1),
        y(layer_output(call, buffers, layer) + dir * call.stack.output),
        y_stride(call.stack.directions * call.stack.output),
        h{buffers.h[dir][0], buffers.h[dir][1]},
        c(buffers.c[dir]),
        m(buffers.m[dir]),
        h_stride(buffers.h_stride),
        c_stride(buffers.c_stride),
        chunk(buffers.chunk),
        in_saved(call.reserve && project_into_saved) {
    T* reserve = static_cast<T*>(call.reserve);
    const ReserveLayout layout(s, Cell::saved, Cell::states);
    saved = reserve ? reserve + layout.saved_at(s, layer, dir, time.rows) : nullptr;
    kept_states = reserve ? reserve + layout.states_at(s, layer, dir, time.rows) : nullptr;
    kept_cell_output = reserve && s.projected
                           ? reserve + layout.cell_output_at(s, layer, dir, time.rows)
                           : nullptr;
    gates = in_saved ? saved : buffers.gates[dir];
    gates_stride = in_saved ? Cell::saved * s.hidden : G * s.hidden;
    gates_first = 0;
    for (int i = 0; i < Cell::states; ++i) {
      const int64_t at = (int64_t(layer) * s.directions + dir) * time.batch * s.state_size(i);
      initial[i] = call.state[i] ? static_cast<const T*>(call.state[i]) + at : nullptr;
      final_state[i] = static_cast<T*>(call.final_state[i]) + at;
    }
  }

  void run_direction() {
    load_initial_states();
    place.sync();
    int current = 0;
    for (int64_t done = 0; done < time.steps; done += chunk) {
      const int64_t end = done + chunk < time.steps ? done + chunk : time.steps;
      const int64_t t0 = reverse ? time.steps - end : done;
      const int64_t t1 = reverse ? time.steps - done : end;
      if (!in_saved) gates_first = time.first(t0);
      // No barrier: a thread projects what it will itself read in the steps.
      project(t0, t1);
      for (int64_t i = done; i < end; ++i) {
        const int64_t t = reverse ? time.steps - 1 - i : i;
        step(t, h[current], h[current ^ 1], i % 2 != 0);
        place.sync();
        if (s.projected) {
          project_output(t, h[current ^ 1]);
          place.sync();
        }
        current ^= 1;
      }
    }
  }

  void load_initial_states() {
    const Range range = part(place.b1 - place.b0, place.index, place.size);
    for (int64_t b = place.b0 + range.begin; b < place.b0 + range.end; ++b) {
      for (int64_t j = 0; j < h_stride; ++j) {
        const T value = initial[0] && j < s.output ? initial[0][b * s.output + j] : T(0);
        h[0][b * h_stride + j] = h[1][b * h_stride + j] = value;
      }
      if constexpr (Cell::states > 1) {
        for (int64_t j = 0; j < c_stride; ++j) {
          c[b * c_stride + j] = initial[1] && j < s.hidden ? initial[1][b * s.hidden + j] : T(0);
        }
      }
    }
  }

  Share share() const {
    return Share(w.h.count(), place.b0, place.b1, w.h.rows_each(), place.index, place.size);
  }

  // Input projections of the steps [t0, t1) into the gates buffer.
  void project(int64_t t0, int64_t t1) {
    share().for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
      const int vectors = w.x.vectors(p);
      const int64_t unit = w.x.first_unit(p);
      const bool full = w.x.full(p);
      alignas(64) T block[kRowBlock * kMaxVectors * lanes];
      for_row_blocks(time, t0, t1, b0, b1, [&](const Row* rows, int n) {
        const T* a[kRowBlock];
        T* to[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a[i] = x.at(rows[i].t, rows[i].b, rows[i].r);
          to[i] = full ? gates_row(rows[i].r) + unit : block + i * vectors * lanes;
        }
        // A full panel's vectors lie apart by gate, or side by side where there is one gate.
        static_assert(G == 1 || G > 2, "a panel of several blocks of several gates needs a copy");
        multiply_panel<T>(a, to, n, w.x_weights + w.x.offset(p), vectors, w.x.depth,
                          full && G > 1 ? s.hidden : lanes, w.x_bias + unit * G);
        if (full) return;
        for (int i = 0; i < n; ++i) scatter(p, block + i * vectors * lanes, gates_row(rows[i].r));
      });
    });
  }

  T* gates_row(int64_t r) const { return gates + (r - gates_first) * gates_stride; }

  // Calls f(first unit, valid units, vector index of gate 0) for each unit block of a panel.
  template <class F>
  FASTCELL_INLINE void for_blocks(int64_t p, F f) const {
    for (int block = 0; block < w.h.blocks(p); ++block) {
      const int64_t unit = w.h.first_unit(p) + block * lanes;
      const int64_t left = s.hidden - unit;
      f(unit, left < lanes ? int(left) : lanes, block * G);
    }
  }

  FASTCELL_INLINE void scatter(int64_t p, const T* tile_row, T* gates_row) const {
    for_blocks(p, [&](int64_t unit, int valid, int v) {
      for (int g = 0; g < G; ++g) {
        store_first(gates_row + g * s.hidden + unit, V::load(tile_row + (v + g) * lanes), valid);
      }
    });
  }

  void step(int64_t t, const T* h_before, T* h_after, bool backwards) {
    const int64_t alive = time.alive(t), first = time.first(t);
    const int64_t alive_next =
        reverse ? (t > 0 ? time.batch : 0) : (t + 1 < time.steps ? time.alive(t + 1) : 0);
    share().for_each(backwards, [&](int64_t p, int64_t b0, int64_t b1) {
      if (b1 > alive) b1 = alive;
      const int vectors = w.h.vectors(p);
      alignas(64) T block[kRowBlock * kMaxVectors * lanes];
      for (int64_t b = b0; b < b1; b += kRowBlock) {
        const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
        const T* a[kRowBlock];
        T* to[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a[i] = h_before + (b + i) * h_stride;
          to[i] = block + i * vectors * lanes;
          begin_sums(p, gates_row(first + b + i), to[i]);
        }
        multiply_panel<T>(a, to, n, w.h_weights + w.h.offset(p), vectors, w.h.depth, lanes,
                          nullptr);
        for (int i = 0; i < n; ++i) {
          finish_row(p, to[i], b + i, first + b + i, b + i >= alive_next, h_before, h_after);
        }
      }
    });
  }

  // The sums begin with the projection, or with the recurrent bias where the terms stay apart.
  FASTCELL_INLINE void begin_sums(int64_t p, const T* from, T* sums) const {
    for_blocks(p, [&](int64_t unit, int valid, int v) {
      for (int g = 0; g < joined; ++g) {
        load_first(from + g * s.hidden + unit, valid).store(sums + (v + g) * lanes);
      }
      for (int g = joined; g < G; ++g) {
        V::load(w.h_bias + unit * A + (g - joined) * lanes).store(sums + (v + g) * lanes);
      }
    });
  }

  // The cell's maths for one sample and one panel of units.
  FASTCELL_INLINE void finish_row(int64_t p, const T* sums, int64_t b, int64_t r, bool last,
                                  const T* h_before, T* h_after) {
    for_blocks(p, [&](int64_t unit, int valid, int v) {
      V a[G + A], state[Cell::states], keep[Cell::saved + 1];
      for (int g = 0; g < joined; ++g) a[g] = V::load(sums + (v + g) * lanes);
      for (int g = joined; g < G; ++g) {
        a[g] = load_first(gates_row(r) + g * s.hidden + unit, valid);
        a[g + A] = V::load(sums + (v + g) * lanes);
      }
      T* const c_row = c + b * c_stride + unit;
      state[0] = s.projected ? V(0) : V::load(h_before + b * h_stride + unit);
      if constexpr (Cell::states > 1) state[1] = V::load(c_row);
      Cell::forward(a, state, keep);

      if (saved) {
        for (int i = 0; i < Cell::saved; ++i) {
          store_first(saved + (r * Cell::saved + i) * s.hidden + unit, keep[i], valid);
        }
      }
      if constexpr (Cell::states > 1) {
        state[1].store(c_row);
        if (kept_states) store_first(kept_states + r * s.hidden + unit, state[1], valid);
        if (last) store_first(final_state[1] + b * s.hidden + unit, state[1], valid);
      }
      if (s.projected) {
        state[0].store(m + b * c_stride + unit);
        if (kept_cell_output) store_first(kept_cell_output + r * s.hidden + unit, state[0], valid);
      } else {
        state[0].store(h_after + b * h_stride + unit);
        store_first(y + r * y_stride + unit, state[0], valid);
        if (last) store_first(final_state[0] + b * s.hidden + unit, state[0], valid);
      }
    });
  }

  // h_t = W_hr m_t.
  void project_output(int64_t t, T* h_after) {
    const int64_t alive = time.alive(t), first = time.first(t);
    const int64_t alive_next =
        reverse ? (t > 0 ? time.batch : 0) : (t + 1 < time.steps ? time.alive(t + 1) : 0);
    const Share share(w.r.count(), place.b0, place.b1, w.r.rows_each(), place.index, place.size);
    alignas(64) T zeros[kMaxVectors * lanes] = {};
    share.for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
      if (b1 > alive) b1 = alive;
      const int vectors = w.r.vectors(p);
      const int64_t unit = w.r.first_unit(p);
      const int64_t valid = w.r.units - unit;
      for (int64_t b = b0; b < b1; b += kRowBlock) {
        const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
        const T* a[kRowBlock];
        T* to[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a[i] = m + (b + i) * c_stride;
          to[i] = h_after + (b + i) * h_stride + unit;
        }
        multiply_panel<T>(a, to, n, w.r_weights + w.r.offset(p), vectors, w.r.depth, lanes, zeros);
        for (int i = 0; i < n; ++i) {
          const int64_t count = valid < vectors * lanes ? valid : vectors * lanes;
          std::memcpy(y + (first + b + i) * y_stride + unit, to[i], count * sizeof(T));
          if (b + i >= alive_next) {
            std::memcpy(final_state[0] + (b + i) * s.output + unit, to[i], count * sizeof(T));
          }
        }
      }
    });
  }
};

}  // namespace fastcell::FASTCELL_ISA
