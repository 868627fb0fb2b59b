// The backward engine: backpropagation through time for any cell.
//
// Per layer, from the last: the time loop, each step a product of the later step's gate gradients
// with the recurrent weights and the cell's pointwise backward maths on that tile; after it, the
// gradients of the layer's input and weights as products over the whole sequence.
#pragma once

#include "math.h"
#include "products.h"

namespace fastcell::FASTCELL_ISA {

template <class T, template <class> class CellOf>
class Backward {
 public:
  static int64_t workspace_bytes(const BackwardCall& call, int threads) {
    Arena arena(nullptr);
    Buffers(call, threads, arena);
    return arena.used();
  }

  static void run(const BackwardCall& call, const Team& team, Barrier* barriers) {
    Arena arena(call.workspace);
    const Buffers buffers(call, team.size, arena);
    const Place place(call.schedule, team, barriers, call.time.batch);
    for (int layer = call.stack.layers - 1; layer >= 0; --layer) {
      Layer(call, buffers, team, place, layer).run();
    }
  }

 private:
  using V = Vec<T>;
  using Cell = CellOf<V>;
  static constexpr int G = Cell::gates;
  static constexpr int A = Cell::apart;
  static constexpr int joined = G - A;
  static constexpr int lanes = V::lanes;

  struct Buffers {
    T* d_gates[2];    // per direction: (rows, (G + A) hidden)
    T* d_output[2];   // per direction, projected: (rows, output), the gradient of h_t
    T* d_h[2];        // per direction: (B, padded output), carried from step to step
    T* d_c[2];        // per direction: (B, padded hidden)
    T* h_weights[2];  // W_hh as panels over h_{t-1}
    T* r_weights[2];  // W_hr as panels over m_t
    T* x_weights;     // W_ih as panels over x_t
    T* d_layer[2];    // gradient of an inner layer's output
    T* dropped;       // an inner layer's output after dropout, made anew
    T* zeros;         // a row of zeros, where no initial state was given
    int64_t d_h_stride, d_c_stride;
    typename WeightGradient<T>::Buffers product;

    Buffers(const BackwardCall& call, int threads, Arena& arena)
        : product(widest(call.stack), call.time.rows, threads, arena) {
      const Stack& s = call.stack;
      const int64_t rows = call.time.rows, batch = call.time.batch;
      d_h_stride = padded_row<T>(s.output);
      d_c_stride = padded_row<T>(s.hidden);
      for (int dir = 0; dir < s.directions; ++dir) {
        d_gates[dir] = arena.take<T>(rows * (G + A) * s.hidden);
        d_output[dir] = arena.take<T>(s.projected ? rows * s.output : 0);
        d_h[dir] = arena.take<T>(batch * d_h_stride);
        d_c[dir] = arena.take<T>((Cell::states - 1) * batch * d_c_stride);
        h_weights[dir] = arena.take<T>(Panels<T>{1, s.output, G * s.hidden}.size());
        r_weights[dir] = arena.take<T>(s.projected ? Panels<T>{1, s.hidden, s.output}.size() : 0);
      }
      x_weights = arena.take<T>(Panels<T>{1, widest(s), G * s.hidden}.size());
      const int64_t inner = s.layers > 1 ? rows * s.directions * s.output : 0;
      for (T*& p : d_layer) p = arena.take<T>(inner);
      dropped = arena.take<T>(call.masks ? inner : 0);
      zeros = arena.take<T>(s.output + lanes);
    }

    static int64_t widest(const Stack& s) {
      const int64_t inner = s.layers > 1 ? s.directions * s.output : 0;
      int64_t widest = s.input > inner ? s.input : inner;
      if (s.hidden > widest) widest = s.hidden;
      return widest;
    }
  };

  // One direction's loop through time.
  struct Direction {
    const Stack& s;
    const Timeline& time;
    const Place& place;
    const Buffers& buffers;
    const bool reverse;
    const T* saved;
    const T* kept_states;
    const T* y;  // this direction's columns of the layer's output
    int64_t y_stride;
    RowMap<const T> d_y;  // this direction's columns; base null: zero
    const T* initial[Cell::states];
    const T* d_final[Cell::states];
    T* d_initial[Cell::states];
    T* d_gates;
    T* d_output;
    T* d_h;
    T* d_c;
    const T* h_weights;
    const T* r_weights;
    Panels<T> over_h;  // columns h_{t-1}
    Panels<T> over_m;  // columns m_t, projected only

    static constexpr int64_t width(const Stack& s) { return (G + A) * s.hidden; }
    T* d_gates_row(int64_t r) const { return d_gates + r * width(s); }

    // The step whose gradients were computed just before those of t.
    int64_t later(int64_t t) const { return reverse ? t - 1 : t + 1; }
    // Samples of step t that also have that later step.
    int64_t continuing(int64_t t) const {
      const int64_t next = later(t);
      if (next < 0 || next >= time.steps) return 0;
      return reverse ? time.alive(t) : time.alive(next);
    }

    const T* h_before(int64_t t, int64_t b) const {
      const int64_t before = reverse ? t + 1 : t - 1;
      if (before >= 0 && before < time.steps && b < time.alive(before)) {
        return y + (time.first(before) + b) * y_stride;
      }
      return initial[0] ? initial[0] + b * s.output : buffers.zeros;
    }

    void run() {
      load_final_gradients();
      place.sync();
      for (int64_t i = 0; i < time.steps; ++i) {
        const int64_t t = reverse ? i : time.steps - 1 - i;
        // Samples whose run began at the later step: nothing of t reaches them.
        if (reverse && t > 0) begin_gradients(t - 1, time.alive(t), time.alive(t - 1));
        step(t, i % 2 != 0);
        place.sync();
      }
      const int64_t first = reverse ? time.steps - 1 : 0;
      begin_gradients(first, 0, time.alive(first));
      place.sync();
      store_cell_gradients();
    }

    void load_final_gradients() {
      const Range range = part(place.b1 - place.b0, place.index, place.size);
      for (int64_t b = place.b0 + range.begin; b < place.b0 + range.end; ++b) {
        for (int64_t j = 0; j < buffers.d_h_stride; ++j) {
          d_h[b * buffers.d_h_stride + j] =
              d_final[0] && j < s.output ? d_final[0][b * s.output + j] : T(0);
        }
        if constexpr (Cell::states > 1) {
          for (int64_t j = 0; j < buffers.d_c_stride; ++j) {
            d_c[b * buffers.d_c_stride + j] =
                d_final[1] && j < s.hidden ? d_final[1][b * s.hidden + j] : T(0);
          }
        }
      }
    }

    Share share(const Panels<T>& panels) const {
      return Share(panels.count(), place.b0, place.b1, panels.rows_each(), place.index, place.size);
    }

    // d_h of samples [b, b + n): what is carried directly, plus d_gates(later) W_hh.
    FASTCELL_INLINE void recurrent_product(int64_t p, int64_t later_first, int64_t b, int n,
                                           T* block) const {
      const int vectors = over_h.vectors(p);
      const int64_t unit = over_h.first_unit(p);
      const T* a[kRowBlock];
      const T* a_apart[kRowBlock];
      T* to[kRowBlock];
      for (int i = 0; i < n; ++i) {
        a[i] = d_gates_row(later_first + b + i);
        a_apart[i] = a[i] + G * s.hidden;
        to[i] = block + i * vectors * lanes;
      }
      alignas(64) T zeros[kMaxVectors * lanes] = {};
      const T* panel = h_weights + over_h.offset(p);
      multiply_panel<T>(a, to, n, panel, vectors, joined * s.hidden, lanes, zeros);
      if constexpr (A > 0) {
        multiply_panel<T>(a_apart, to, n, panel + joined * s.hidden * vectors * lanes, vectors,
                          A * s.hidden, lanes, nullptr);
      }
      if constexpr (Cell::direct) {
        // Added last: the many small terms of the product are not rounded at its size.
        for (int i = 0; i < n; ++i) {
          for (int v = 0; v < vectors; ++v) {
            const V carried = V::load(d_h + (b + i) * buffers.d_h_stride + unit + v * lanes);
            (V::load(to[i] + v * lanes) + carried).store(to[i] + v * lanes);
          }
        }
      }
    }

    void step(int64_t t, bool backwards) {
      const int64_t alive = time.alive(t), first = time.first(t);
      const int64_t next = continuing(t);
      const int64_t later_first = next > 0 ? time.first(later(t)) : 0;
      share(over_h).for_each(backwards, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b1 > alive) b1 = alive;
        const int vectors = over_h.vectors(p);
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        int n = 0;
        for (int64_t b = b0; b < b1; b += n) {
          const int64_t end = b < next && next < b1 ? next : b1;
          n = int(end - b < kRowBlock ? end - b : kRowBlock);
          if (b < next) {
            recurrent_product(p, later_first, b, n, block);
          } else {
            for (int i = 0; i < n; ++i) {
              std::memcpy(block + i * vectors * lanes,
                          d_h + (b + i) * buffers.d_h_stride + over_h.first_unit(p),
                          vectors * lanes * sizeof(T));
            }
          }
          for (int i = 0; i < n; ++i) {
            T* const d_h_row = block + i * vectors * lanes;
            add_output_gradient(p, t, b + i, first + b + i, d_h_row);
            if (s.projected) {
              const int64_t unit = over_h.first_unit(p), left = s.output - unit;
              std::memcpy(d_output + (first + b + i) * s.output + unit, d_h_row,
                          (left < vectors * lanes ? left : vectors * lanes) * sizeof(T));
            } else {
              finish_row(over_h, p, d_h_row, t, b + i, first + b + i);
            }
          }
        }
      });
      if (!s.projected) return;
      place.sync();
      alignas(64) T zeros[kMaxVectors * lanes] = {};
      share(over_m).for_each(backwards, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b1 > alive) b1 = alive;
        const int vectors = over_m.vectors(p);
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        for (int64_t b = b0; b < b1; b += kRowBlock) {
          const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
          const T* a[kRowBlock];
          T* to[kRowBlock];
          for (int i = 0; i < n; ++i) {
            a[i] = d_output + (first + b + i) * s.output;
            to[i] = block + i * vectors * lanes;
          }
          multiply_panel<T>(a, to, n, r_weights + over_m.offset(p), vectors, over_m.depth, lanes,
                            zeros);
          for (int i = 0; i < n; ++i) finish_row(over_m, p, to[i], t, b + i, first + b + i);
        }
      });
    }

    FASTCELL_INLINE void add_output_gradient(int64_t p, int64_t t, int64_t b, int64_t r,
                                             T* d_h_row) const {
      if (!d_y.base) return;
      const int64_t unit = over_h.first_unit(p);
      const T* from = d_y.at(t, b, r) + unit;
      for (int v = 0; v < over_h.vectors(p); ++v) {
        const int64_t left = s.output - unit - v * lanes;
        const V sum = V::load(d_h_row + v * lanes) +
                      load_first(from + v * lanes, left < lanes ? int(left) : lanes);
        sum.store(d_h_row + v * lanes);
      }
    }

    // The cell's backward maths for one sample and one panel of hidden units.
    FASTCELL_INLINE void finish_row(const Panels<T>& panels, int64_t p, const T* d_h_row, int64_t t,
                                    int64_t b, int64_t r) {
      for (int v = 0; v < panels.vectors(p); ++v) {
        const int64_t unit = panels.first_unit(p) + v * lanes;
        const int valid = s.hidden - unit < lanes ? int(s.hidden - unit) : lanes;
        V keep[Cell::saved + 1], before[Cell::states], after[Cell::states], d_state[Cell::states],
            d_a[G + A];
        for (int i = 0; i < Cell::saved; ++i) {
          keep[i] = load_first(saved + (r * Cell::saved + i) * s.hidden + unit, valid);
        }
        d_state[0] = V::load(d_h_row + v * lanes);
        if (s.projected) {
          before[0] = after[0] = V(0);  // a projected cell sees h through the product alone
        } else {
          before[0] = load_first(h_before(t, b) + unit, valid);
          after[0] = load_first(y + r * y_stride + unit, valid);
        }
        if constexpr (Cell::states > 1) {
          before[1] = cell_before(t, b, unit, valid);
          after[1] = load_first(kept_states + r * s.hidden + unit, valid);
          d_state[1] = V::load(d_c + b * buffers.d_c_stride + unit);
        }
        Cell::backward(keep, before, after, d_state, d_a);
        for (int g = 0; g < G + A; ++g) {
          store_first(d_gates_row(r) + g * s.hidden + unit, d_a[g], valid);
        }
        if constexpr (Cell::direct) d_state[0].store(d_h + b * buffers.d_h_stride + unit);
        if constexpr (Cell::states > 1) d_state[1].store(d_c + b * buffers.d_c_stride + unit);
      }
    }

    FASTCELL_INLINE V cell_before(int64_t t, int64_t b, int64_t unit, int valid) const {
      const int64_t before = reverse ? t + 1 : t - 1;
      if (before >= 0 && before < time.steps && b < time.alive(before)) {
        return load_first(kept_states + (time.first(before) + b) * s.hidden + unit, valid);
      }
      return initial[1] ? load_first(initial[1] + b * s.hidden + unit, valid) : V(0);
    }

    // Gradients of the initial h of samples [b0, b1), whose first step was t.
    void begin_gradients(int64_t t, int64_t begin, int64_t end) {
      if (!d_initial[0] || begin >= end) return;
      share(over_h).for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b0 < begin) b0 = begin;
        if (b1 > end) b1 = end;
        const int vectors = over_h.vectors(p);
        const int64_t unit = over_h.first_unit(p), left = s.output - unit;
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        for (int64_t b = b0; b < b1; b += kRowBlock) {
          const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
          recurrent_product(p, time.first(t), b, n, block);
          for (int i = 0; i < n; ++i) {
            std::memcpy(d_initial[0] + (b + i) * s.output + unit, block + i * vectors * lanes,
                        (left < vectors * lanes ? left : vectors * lanes) * sizeof(T));
          }
        }
      });
    }

    void store_cell_gradients() {
      if constexpr (Cell::states > 1) {
        if (!d_initial[1]) return;
        const Range range = part(place.b1 - place.b0, place.index, place.size);
        for (int64_t b = place.b0 + range.begin; b < place.b0 + range.end; ++b) {
          std::memcpy(d_initial[1] + b * s.hidden, d_c + b * buffers.d_c_stride,
                      s.hidden * sizeof(T));
        }
      }
    }
  };

  struct Layer {
    const BackwardCall& call;
    const Buffers& buffers;
    const Team& team;
    const Place& place;
    const Stack& s;
    const Timeline& time;
    const int layer;
    const int64_t out_width;
    const ReserveLayout layout;
    const T* const reserve;

    Layer(const BackwardCall& call, const Buffers& buffers, const Team& team, const Place& place,
          int layer)
        : call(call),
          buffers(buffers),
          team(team),
          place(place),
          s(call.stack),
          time(call.time),
          layer(layer),
          out_width(call.stack.directions * call.stack.output),
          layout(call.stack, Cell::saved, Cell::states),
          reserve(static_cast<const T*>(call.reserve)) {}

    int flat(int dir) const { return layer * s.directions + dir; }
    const T* weight(int dir, int i) const {
      return static_cast<const T*>(call.weights[flat(dir) * s.weights_each() + i]);
    }
    T* d_weight(int dir, int i) const {
      return static_cast<T*>(call.d_weights[flat(dir) * s.weights_each() + i]);
    }
    const T* output(int which) const {
      return which == s.layers - 1 ? static_cast<const T*>(call.y)
                                   : reserve + layout.layer_output_at(s, which, time.rows);
    }
    // Gradients of this layer's input are wanted by the caller, or by a layer below that has
    // anything left to compute.
    bool input_gradient() const {
      if (layer == 0) return call.d_x.base != nullptr;
      if (call.d_x.base) return true;
      for (int i = 0; i < layer * s.directions * s.weights_each(); ++i) {
        if (call.d_weights[i]) return true;
      }
      return call.d_state[0] || call.d_state[1];
    }

    void run() {
      if (!input_gradient() && !anything_here()) return;
      pack();
      team.sync();
      for (int dir = 0; dir < s.directions; ++dir) {
        if (dir % place.directions == place.direction_group) direction(dir).run();
      }
      team.sync();
      if (input_gradient()) gradient_of_input();
      const RowMap<const T> x = layer_input();
      for (int dir = 0; dir < s.directions; ++dir) gradients_of_weights(dir, x);
      team.sync();
    }

    bool anything_here() const {
      for (int i = 0; i < s.directions * s.weights_each(); ++i) {
        if (call.d_weights[layer * s.directions * s.weights_each() + i]) return true;
      }
      return call.d_state[0] || call.d_state[1];
    }

    void pack() const {
      for (int dir = 0; dir < s.directions; ++dir) {
        const Panels<T> over_h{1, s.output, G * s.hidden};
        const T* w_hh = weight(dir, 1);
        // A single step has no later one; only its initial state's gradient would need W_hh.
        if (time.steps > 1 || call.d_state[0]) {
          pack_rows(
              over_h, [&](int64_t k) { return w_hh + k * s.output; }, buffers.h_weights[dir],
              part(over_h.count(), team.index, team.size));
        }
        if (s.projected) {
          const Panels<T> over_m{1, s.hidden, s.output};
          const T* w_hr = weight(dir, s.weights_each() - 1);
          pack_rows(
              over_m, [&](int64_t k) { return w_hr + k * s.hidden; }, buffers.r_weights[dir],
              part(over_m.count(), team.index, team.size));
        }
      }
      if (team.index == 0) std::memset(buffers.zeros, 0, (s.output + lanes) * sizeof(T));
    }

    Direction direction(int dir) const {
      Direction d{s,
                  time,
                  place,
                  buffers,
                  dir == 1,
                  reserve + layout.saved_at(s, layer, dir, time.rows),
                  reserve + layout.states_at(s, layer, dir, time.rows),
                  output(layer) + dir * s.output,
                  out_width,
                  output_gradient(dir),
                  {},
                  {},
                  {},
                  buffers.d_gates[dir],
                  buffers.d_output[dir],
                  buffers.d_h[dir],
                  buffers.d_c[dir],
                  buffers.h_weights[dir],
                  buffers.r_weights[dir],
                  Panels<T>{1, s.output, G * s.hidden},
                  Panels<T>{1, s.projected ? s.hidden : 0, s.output}};
      for (int i = 0; i < Cell::states; ++i) {
        const int64_t at = int64_t(flat(dir)) * time.batch * s.state_size(i);
        d.initial[i] = call.state[i] ? static_cast<const T*>(call.state[i]) + at : nullptr;
        d.d_final[i] = call.d_final[i] ? static_cast<const T*>(call.d_final[i]) + at : nullptr;
        d.d_initial[i] = call.d_state[i] ? static_cast<T*>(call.d_state[i]) + at : nullptr;
      }
      return d;
    }

    RowMap<const T> output_gradient(int dir) const {
      if (layer == s.layers - 1) {
        const T* base = reinterpret_cast<const T*>(call.d_y.base);
        return {base ? base + dir * s.output : nullptr, call.d_y.step, call.d_y.row,
                call.d_y.packed};
      }
      return {buffers.d_layer[layer % 2] + dir * s.output, 0, out_width, true};
    }

    RowMap<T> input_gradient_rows() const {
      if (layer == 0) {
        return {reinterpret_cast<T*>(call.d_x.base), call.d_x.step, call.d_x.row, call.d_x.packed};
      }
      return {buffers.d_layer[(layer - 1) % 2], 0, out_width, true};
    }

    const T* mask() const {
      if (!call.masks || layer == 0) return nullptr;
      return static_cast<const T*>(call.masks) + (layer - 1) * time.rows * out_width;
    }

    void gradient_of_input() const {
      const RowMap<T> to = input_gradient_rows();
      const Panels<T> panels{1, s.layer_input(layer), G * s.hidden};
      const int64_t batch = time.batch;
      for (int dir = 0; dir < s.directions; ++dir) {
        const T* w_ih = weight(dir, 0);
        if (dir > 0) team.sync();
        pack_rows(
            panels, [&](int64_t k) { return w_ih + k * panels.units; }, buffers.x_weights,
            part(panels.count(), team.index, team.size));
        team.sync();
        const T* d_gates = buffers.d_gates[dir];
        multiply_rows(
            panels, buffers.x_weights, time.rows,
            [&](int64_t r) { return d_gates + r * Direction::width(s); },
            [&](int64_t r) { return to.packed ? to.at(0, 0, r) : to.at(r / batch, r % batch, r); },
            dir > 0, team);
      }
      const T* m = mask();
      if (!m) return;
      team.sync();
      const Range range = part(time.rows * out_width, team.index, team.size);
      for (int64_t i = range.begin; i < range.end; ++i) to.base[i] *= m[i];
    }

    RowMap<const T> layer_input() const {
      if (layer == 0) {
        return {reinterpret_cast<const T*>(call.x.base), call.x.step, call.x.row, call.x.packed};
      }
      const T* input = output(layer - 1);
      if (const T* m = mask()) {
        const Range range = part(time.rows * out_width, team.index, team.size);
        for (int64_t i = range.begin; i < range.end; ++i) buffers.dropped[i] = input[i] * m[i];
        team.sync();
        input = buffers.dropped;
      }
      return {input, 0, out_width, true};
    }

    void gradients_of_weights(int dir, const RowMap<const T>& x) const {
      const Direction d = direction(dir);
      const int64_t width = Direction::width(s);
      const int64_t n_x = s.layer_input(layer);
      if (T* to = d_weight(dir, 0)) {
        WeightGradient<T>::run(
            d.d_gates, width, G * s.hidden, time,
            [&](int64_t t, int64_t b, int64_t r) { return x.at(t, b, r); }, n_x, to,
            buffers.product, team);
      }
      if (T* to = d_weight(dir, 1)) {
        const auto h_before = [&](int64_t t, int64_t b, int64_t) { return d.h_before(t, b); };
        WeightGradient<T>::run(d.d_gates, width, joined * s.hidden, time, h_before, s.output, to,
                               buffers.product, team);
        if constexpr (A > 0) {
          WeightGradient<T>::run(d.d_gates + G * s.hidden, width, A * s.hidden, time, h_before,
                                 s.output, to + joined * s.hidden * s.output, buffers.product,
                                 team);
        }
      }
      if (s.projected) {
        if (T* to = d_weight(dir, s.weights_each() - 1)) {
          const T* m = reserve + layout.cell_output_at(s, layer, dir, time.rows);
          WeightGradient<T>::run(
              d.d_output, s.output, s.output, time,
              [&](int64_t, int64_t, int64_t r) { return m + r * s.hidden; }, s.hidden, to,
              buffers.product, team);
        }
      }
      if (s.bias) bias_gradients(dir, d);
    }

    void bias_gradients(int dir, const Direction& d) const {
      T* const d_b_ih = d_weight(dir, 2);
      T* const d_b_hh = d_weight(dir, 3);
      const int64_t width = Direction::width(s), H = s.hidden;
      const Range all = part(G * H, team.index, team.size);
      if (d_b_ih) {
        sum_columns(d.d_gates, width, time.rows, all.begin, all.end, d_b_ih + all.begin);
      }
      if (d_b_hh) {
        const Range shared = part(joined * H, team.index, team.size);
        sum_columns(d.d_gates, width, time.rows, shared.begin, shared.end, d_b_hh + shared.begin);
        const Range apart = part(A * H, team.index, team.size);
        sum_columns(d.d_gates, width, time.rows, G * H + apart.begin, G * H + apart.end,
                    d_b_hh + joined * H + apart.begin);
      }
    }
  };
};

}  // namespace fastcell::FASTCELL_ISA
