// The backward engine: backpropagation through time for any cell.
//
// Per layer, from the last, a chunk of steps at a time: the time loop, each step a product of the
// later step's gate gradients with the recurrent weights and the cell's pointwise backward maths on
// that tile; then what the chunk adds to the gradients of the layer's input and weights, as
// products over all its rows, while its gate gradients are in cache. Nothing as long as the
// sequence is written but the gradients of the inputs.
#pragma once

#include "math.h"
#include "products.h"

namespace fastcell::FASTCELL_ISA {

// How the backward pass cuts time: chunks of blocks of steps. A block is what one chain of the
// weights' gradients sums, so it depends on the sizes alone; a chunk has enough rows for every
// thread, and no fewer steps than `least`.
struct Chunks {
  int64_t block_steps, steps, count;

  FASTCELL_INLINE Chunks(const Timeline& time, int64_t rows_per_block, int threads, int64_t least) {
    const int64_t blocks = (time.rows + rows_per_block - 1) / rows_per_block;
    block_steps = (time.steps + blocks - 1) / blocks;
    const int64_t rows = block_steps * ((time.rows + time.steps - 1) / time.steps);
    steps = block_steps * ((96 * threads + rows - 1) / rows);
    if (steps < least) steps = (least + block_steps - 1) / block_steps * block_steps;
    if (steps > time.steps) steps = time.steps;
    count = (time.steps + steps - 1) / steps;
  }

  FASTCELL_INLINE Range steps_of(const Timeline& time, int64_t chunk) const {
    const int64_t end = (chunk + 1) * steps;
    return {chunk * steps, end < time.steps ? end : time.steps};
  }
  // The most rows of a chunk: the first one's, since no step has more samples than the one before.
  FASTCELL_INLINE int64_t rows(const Timeline& time) const { return time.first(steps); }
};

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
    clear_padding(call.time, call.d_x.as<T>(), call.stack.input, team);
    const Place place(call.schedule, team, barriers, call.time);
    for (int layer = call.stack.layers - 1; layer >= 0; --layer) {
      Layer(call, buffers, team, place, layer).run();
    }
  }

 private:
  using V = Vec<T>;
  using Cell = CellOf<V>;
  static constexpr int G = Cell::gates;
  static constexpr int A = Cell::apart;
  static constexpr int N = Cell::parameters;
  static constexpr int joined = G - A;
  static constexpr int S = Cell::second;
  static constexpr int lanes = V::lanes;

  struct Buffers {
    Chunks chunks;
    // Per direction, of two chunks in turn, since a chunk's last step is the next one's later step:
    T* d_gates[2][2];    // (rows, (G + A + N) hidden)
    T* d_output[2][2];   // projected: (rows, output), the gradient of h_t
    T* d_h[2];           // per direction: (B, padded output), carried from step to step
    T* d_c[2];           // per direction: (B, padded hidden)
    T* h_weights[2];     // W_hh as panels over h_{t-1}
    T* r_weights[2];     // W_hr as panels over m_t
    T* x_weights[2];     // W_ih as panels over x_t
    T* skip_weights[2];  // W_skip as panels over h of the delayed link
    T* d_layer[2];       // gradient of an inner layer's output
    T* dropped;          // an inner layer's output after dropout, made anew
    T* masked;           // of a block of rows, h_{t-1} after recurrent dropout
    T* zeros;            // a row of zeros, where no initial state was given
    T* rows;             // scratch of multiply_rows
    int64_t d_h_stride, d_c_stride;
    typename WeightGradient<T>::Buffers product;

    Buffers(const BackwardCall& call, int threads, Arena& arena)
        : chunks(call.time, WeightGradient<T>::kRowsPerBlock, threads, call.stack.delay),
          product(widest(call.stack), call.stack.output, call.time.rows, threads, arena) {
      const Stack& s = call.stack;
      const int64_t rows = call.time.rows, batch = call.time.batch;
      const int64_t chunk_rows = chunks.rows(call.time);
      d_h_stride = padded_row<T>(s.output);
      d_c_stride = padded_row<T>(s.hidden);
      for (int dir = 0; dir < s.directions; ++dir) {
        for (int i = 0; i < 2; ++i) {
          const int64_t kept = i < chunks.count ? chunk_rows : 0;
          d_gates[dir][i] = arena.take<T>(kept * (G + A + N) * s.hidden);
          d_output[dir][i] = arena.take<T>(s.projected ? kept * s.output : 0);
        }
        d_h[dir] = arena.take<T>(batch * d_h_stride);
        d_c[dir] = arena.take<T>((Cell::states - 1) * batch * d_c_stride);
        h_weights[dir] =
            arena.take<T>(Cell::recurrent ? Panels<T>{1, s.output, G * s.hidden}.size() : 0);
        r_weights[dir] = arena.take<T>(s.projected ? Panels<T>{1, s.hidden, s.output}.size() : 0);
        x_weights[dir] = arena.take<T>(Panels<T>{1, widest_input(s), G * s.hidden}.size());
        skip_weights[dir] =
            arena.take<T>(s.delay > 0 ? Panels<T>{1, s.output, G * s.hidden}.size() : 0);
      }
      const Panels<T> over_x{1, widest_input(s), 0};
      this->rows =
          arena.take<T>(s.directions > 1 ? threads * kRowBlock * over_x.padded_units() : 0);
      const int64_t inner = s.layers > 1 ? rows * s.directions * s.output : 0;
      for (T*& p : d_layer) p = arena.take<T>(inner);
      dropped = arena.take<T>(call.extras.masks ? inner : 0);
      const int64_t block_rows = chunks.block_steps * batch;
      masked = arena.take<T>(call.extras.recurrent ? block_rows * s.output : 0);
      zeros = arena.take<T>(s.output + lanes);
    }

    static int64_t widest_input(const Stack& s) {
      const int64_t inner = s.layers > 1 ? s.directions * s.output : 0;
      return s.input > inner ? s.input : inner;
    }
    static int64_t widest(const Stack& s) {
      const int64_t input = widest_input(s);
      return (s.projected || S > 0) && s.hidden > input ? s.hidden : input;
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
    T* const (&d_gates)[2];
    T* const (&d_output)[2];
    T* d_h;
    T* d_c;
    const T* h_weights;
    const T* r_weights;
    const T* skip_weights;
    const T* parameters;                   // (N, hidden)
    const uint8_t* reset;                  // or null
    const uint64_t* seed;                  // or null
    const T* factors;                      // of h in the recurrent product, (B, output), or null
    noise::Bits state_keys[Cell::states];  // of what zoneout draws
    const T* d_cells;                      // this direction's columns, or null
    int64_t d_cells_stride;
    Panels<T> over_h;  // columns h_{t-1}
    Panels<T> over_m;  // columns m_t, projected only
    Share share_h;     // what this thread does of each step's panels
    Share share_m;

    static constexpr int64_t width(const Stack& s) { return (G + A + N) * s.hidden; }
    // The rows of step t, in the buffer of its chunk.
    T* of_step(T* const (&chunks)[2], int64_t t, int64_t width) const {
      const int64_t chunk = t / buffers.chunks.steps;
      const int64_t rows = time.first(t) - time.first(chunk * buffers.chunks.steps);
      return chunks[chunk % 2] + rows * width;
    }
    T* d_gates_of(int64_t t) const { return of_step(d_gates, t, width(s)); }
    T* d_output_of(int64_t t) const { return of_step(d_output, t, s.output); }

    // The step whose gradients were computed just before those of t.
    int64_t later(int64_t t) const { return reverse ? t - 1 : t + 1; }
    // Samples of step t that also have that later step.
    int64_t continuing(int64_t t) const {
      const int64_t next = later(t);
      if (next < 0 || next >= time.steps) return 0;
      return reverse ? time.alive(t) : time.alive(next);
    }

    // The step that sees h of step t through the delayed link, and the one whose h step t sees.
    int64_t delayed(int64_t t) const { return reverse ? t - s.delay : t + s.delay; }
    int64_t seen(int64_t t) const { return reverse ? t + s.delay : t - s.delay; }
    // Whether a reset at step t of sample b, or since the step that it sees, hides that one.
    FASTCELL_INLINE bool hidden_from(int64_t t, int64_t b) const {
      for (int64_t k = 0; reset && k < s.delay; ++k) {
        const int64_t at = reverse ? t + k : t - k;
        if (at < 0 || at >= time.steps || b >= time.alive(at)) break;
        if (begins_anew(at, b)) return true;
      }
      return false;
    }
    // Steps of sample b in this direction behind step t, unless there are `delay` or more.
    int64_t steps_behind(int64_t t, int64_t b) const {
      if (reverse) return t;
      const bool many = t + s.delay < time.steps && b < time.alive(t + s.delay);
      return many ? s.delay : time.length(b) - 1 - t;
    }

    // A caller's h, or its gradient, of the k-th step before the first, or before the end.
    template <class P>
    FASTCELL_INLINE P* remembered(P* states, int64_t k, int64_t b) const {
      return states + (s.remembered_at(k, reverse) * time.all() + time.sample(b)) * s.output;
    }

    // What the delayed link of step t began with for sample b.
    const T* h_delayed(int64_t t, int64_t b) const {
      if (hidden_from(t, b)) return buffers.zeros;
      const int64_t at = seen(t);
      if (at >= 0 && at < time.steps && b < time.alive(at)) {
        return y + (time.first(at) + b) * y_stride;
      }
      if (!initial[0]) return buffers.zeros;
      return remembered(initial[0], reverse ? at - time.length(b) : -1 - at, b);
    }

    // Whether step t of sample b begins with zeros.
    FASTCELL_INLINE bool begins_anew(int64_t t, int64_t b) const {
      return reset && reset[time.first(t) + b];
    }

    const T* h_before(int64_t t, int64_t b) const {
      if (begins_anew(t, b)) return buffers.zeros;
      const int64_t before = reverse ? t + 1 : t - 1;
      if (before >= 0 && before < time.steps && b < time.alive(before)) {
        return y + (time.first(before) + b) * y_stride;
      }
      return initial[0] ? remembered(initial[0], 0, b) : buffers.zeros;
    }

    void begin() {
      load_final_gradients();
      place.sync();
    }

    void run_steps(Range steps) {
      for (int64_t i = 0; i < steps.end - steps.begin; ++i) {
        const int64_t t = reverse ? steps.begin + i : steps.end - 1 - i;
        // Samples whose run began at the later step: nothing of t reaches them.
        if (reverse && t > 0 && time.alive(t) < time.alive(t - 1)) {
          begin_gradients(t - 1, time.alive(t), time.alive(t - 1));
        }
        step(t, i % 2 != 0);
        place.sync();
      }
    }

    void end() {
      const int64_t first = reverse ? time.steps - 1 : 0;
      begin_gradients(first, 0, time.alive(first));
      place.sync();
      store_cell_gradients();
      pass_on_gradients();
    }

    void load_final_gradients() {
      const Range range = part(place.b1 - place.b0, place.index, place.size);
      for (int64_t b = place.b0 + range.begin; b < place.b0 + range.end; ++b) {
        const int64_t own = time.sample(b);
        const T* const last = d_final[0] ? remembered(d_final[0], 0, b) : nullptr;
        for (int64_t j = 0; j < buffers.d_h_stride; ++j) {
          d_h[b * buffers.d_h_stride + j] = last && j < s.output ? last[j] : T(0);
        }
        if constexpr (Cell::states > 1) {
          for (int64_t j = 0; j < buffers.d_c_stride; ++j) {
            d_c[b * buffers.d_c_stride + j] =
                d_final[1] && j < s.hidden ? d_final[1][own * s.hidden + j] : T(0);
          }
        }
      }
    }

    // d_h of samples [b, b + n): what is carried directly, plus d_gates(later) W_hh.
    // `t`: the later step.
    FASTCELL_INLINE void recurrent_product(int64_t p, int64_t t, int64_t b, int n, T* block) const {
      const T* const d_gates_later = d_gates_of(t);
      const int vectors = over_h.vectors(p);
      const int64_t unit = over_h.first_unit(p);
      const T* a[kRowBlock];
      const T* a_apart[kRowBlock];
      T* to[kRowBlock];
      for (int i = 0; i < n; ++i) {
        a[i] = d_gates_later + (b + i) * width(s);
        a_apart[i] = a[i] + G * s.hidden;
        to[i] = block + i * vectors * lanes;
      }
      alignas(64) T zeros[kMaxVectors * lanes] = {};
      const T* panel = h_weights + over_h.offset(p);
      if constexpr (Cell::recurrent) {
        multiply_panel<Plain<T>>(a, to, n, panel, vectors, (joined - S) * s.hidden, lanes, zeros);
      } else {
        for (int i = 0; i < n; ++i) std::memcpy(to[i], zeros, vectors * lanes * sizeof(T));
      }
      if constexpr (A > 0) {
        multiply_panel<Plain<T>>(a_apart, to, n, panel + joined * s.hidden * vectors * lanes,
                                 vectors, A * s.hidden, lanes, nullptr);
      }
      for (int i = 0; i < n; ++i) {
        if (factors) multiply_factors(unit, vectors, b + i, to[i]);
        if (begins_anew(t, b + i)) std::memcpy(to[i], zeros, vectors * lanes * sizeof(T));
      }
      if (s.delay > 0) add_delayed(p, delayed(reverse ? t + 1 : t - 1), b, n, to);
      if (Cell::direct && !s.projected) {
        // Added last: the many small terms of the product are not rounded at its size.
        for (int i = 0; i < n; ++i) {
          for (int v = 0; v < vectors; ++v) {
            const V carried = V::load(d_h + (b + i) * buffers.d_h_stride + unit + v * lanes);
            (V::load(to[i] + v * lanes) + carried).store(to[i] + v * lanes);
          }
        }
      }
    }

    // Adds what step t gives to the h that it sees through the delayed link.
    void add_delayed(int64_t p, int64_t t, int64_t b, int n, T* const* to) const {
      if (t < 0 || t >= time.steps) return;
      const T* const d_gates_there = d_gates_of(t);
      const T* a[kRowBlock];
      T* sums[kRowBlock];
      int count = 0;
      for (int i = 0; i < n && b + i < time.alive(t); ++i) {
        if (hidden_from(t, b + i)) continue;
        a[count] = d_gates_there + (b + i) * width(s);
        sums[count++] = to[i];
      }
      if (count == 0) return;
      multiply_panel<Plain<T>>(a, sums, count, skip_weights + over_h.offset(p), over_h.vectors(p),
                               G * s.hidden, lanes, nullptr);
    }

    // With a delay the caller has more than the last h: adds their gradient, k steps before it.
    FASTCELL_INLINE void add_remembered(int64_t p, int64_t k, int64_t b, T* d_h_row) const {
      if (!d_final[0] || k >= s.delay) return;
      const int64_t unit = over_h.first_unit(p);
      const T* const from = remembered(d_final[0], k, b) + unit;
      for (int64_t j = 0; j < over_h.vectors(p) * lanes && unit + j < s.output; ++j) {
        d_h_row[j] += from[j];
      }
    }

    FASTCELL_INLINE void multiply_factors(int64_t unit, int vectors, int64_t b, T* row) const {
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = unit + v * lanes, left = s.output - at;
        const V by =
            load_first(factors + time.sample(b) * s.output + at, left < lanes ? int(left) : lanes);
        (V::load(row + v * lanes) * by).store(row + v * lanes);
      }
    }

    void step(int64_t t, bool backwards) {
      const int64_t alive = time.alive(t), first = time.first(t);
      const int64_t next = continuing(t);
      T* const d_gates_now = d_gates_of(t);
      T* const d_output_now = s.projected ? d_output_of(t) : nullptr;
      share_h.for_each(backwards, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b1 > alive) b1 = alive;
        const int vectors = over_h.vectors(p);
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        int n = 0;
        for (int64_t b = b0; b < b1; b += n) {
          const int64_t end = b < next && next < b1 ? next : b1;
          n = int(end - b < kRowBlock ? end - b : kRowBlock);
          if (b < next) {
            recurrent_product(p, later(t), b, n, block);
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
            // (The last step's is in d_h.)
            if (s.delay > 0 && d_final[0]) {
              const int64_t k = steps_behind(t, b + i);
              if (k > 0) add_remembered(p, k, b + i, d_h_row);
            }
            if (s.projected) {
              const int64_t unit = over_h.first_unit(p), left = s.output - unit;
              std::memcpy(d_output_now + (b + i) * s.output + unit, d_h_row,
                          (left < vectors * lanes ? left : vectors * lanes) * sizeof(T));
            } else {
              finish_row(over_h, p, d_h_row, t, b + i, first + b + i, d_gates_now);
            }
          }
        }
      });
      if constexpr (S > 0) {
        place.sync();
        step_first(t, backwards);
      }
      if (!s.projected) return;
      place.sync();
      alignas(64) T zeros[kMaxVectors * lanes] = {};
      share_m.for_each(backwards, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b1 > alive) b1 = alive;
        const int vectors = over_m.vectors(p);
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        for (int64_t b = b0; b < b1; b += kRowBlock) {
          const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
          const T* a[kRowBlock];
          T* to[kRowBlock];
          for (int i = 0; i < n; ++i) {
            a[i] = d_output_now + (b + i) * s.output;
            to[i] = block + i * vectors * lanes;
          }
          multiply_panel<Plain<T>>(a, to, n, r_weights + over_m.offset(p), vectors, over_m.depth,
                                   lanes, zeros);
          for (int i = 0; i < n; ++i) {
            finish_row(over_m, p, to[i], t, b + i, first + b + i, d_gates_now);
          }
        }
      });
    }

    // Of a step with a second product, what goes back through that: to the gates of the first part,
    // and to h.
    void step_first(int64_t t, bool backwards) {
      const int64_t alive = time.alive(t), first = time.first(t);
      T* const d_gates_now = d_gates_of(t);
      alignas(64) T zeros[kMaxVectors * lanes] = {};
      share_h.for_each(backwards, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b1 > alive) b1 = alive;
        const int vectors = over_h.vectors(p);
        const T* panel = h_weights + over_h.offset(p) + (G - S) * s.hidden * vectors * lanes;
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        for (int64_t b = b0; b < b1; b += kRowBlock) {
          const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
          const T* a[kRowBlock];
          T* to[kRowBlock];
          for (int i = 0; i < n; ++i) {
            a[i] = d_gates_now + (b + i) * width(s) + (G - S) * s.hidden;
            to[i] = block + i * vectors * lanes;
          }
          multiply_panel<Plain<T>>(a, to, n, panel, vectors, S * s.hidden, lanes, zeros);
          for (int i = 0; i < n; ++i) {
            for (int v = 0; v < vectors; ++v) {
              finish_first(over_h.first_unit(p) + v * lanes, V::load(to[i] + v * lanes), t, b + i,
                           first + b + i, d_gates_now);
            }
          }
        }
      });
    }

    FASTCELL_INLINE void finish_first(int64_t unit, V d, int64_t t, int64_t b, int64_t r,
                                      T* d_gates_now) {
      const int valid = s.hidden - unit < lanes ? int(s.hidden - unit) : lanes;
      V keep[Cell::saved], d_a[G], by(T(1));
      for (V& one : d_a) one = V(0);
      for (int i = 0; i < Cell::saved; ++i) {
        keep[i] = load_first(saved + (r * Cell::saved + i) * s.hidden + unit, valid);
      }
      if (factors) by = load_first(factors + time.sample(b) * s.output + unit, valid);
      const V h = load_first(h_before(t, b) + unit, valid) * by;
      const V d_h_part = Cell::backward_first(keep, h, d, d_a) * by;
      for (int g = 0; g < G - S; ++g) {
        T* const at = d_gates_now + b * width(s) + g * s.hidden + unit;
        store_first(at, load_first(at, valid) + d_a[g], valid);
      }
      if (begins_anew(t, b)) return;
      T* const carried = d_h + b * buffers.d_h_stride + unit;
      (V::load(carried) + d_h_part).store(carried);
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
                                    int64_t b, int64_t r, T* d_gates_now) {
      for (int v = 0; v < panels.vectors(p); ++v) {
        const int64_t unit = panels.first_unit(p) + v * lanes;
        const int valid = s.hidden - unit < lanes ? int(s.hidden - unit) : lanes;
        V keep[Cell::saved + 1], before[Cell::states], after[Cell::states], d_state[Cell::states],
            p_unit[N + Cell::held + 1], d_a[G + A + N];
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
          if (d_cells)
            d_state[1] = d_state[1] + load_first(d_cells + r * d_cells_stride + unit, valid);
        }
        for (int i = 0; i < N; ++i) {
          p_unit[i] = load_first(parameters + i * s.hidden + unit, valid);
        }
        for (int i = 0; i < Cell::held; ++i) {
          const noise::Bits key = seed ? noise::row_key(state_keys[i], time.row(t, b)) : 0;
          p_unit[N + i] = hold<T>(s.options.zoneout[i], seed ? &key : nullptr, unit);
        }
        Cell::backward(s.options, keep, p_unit, before, after, d_state, d_a);
        if (__builtin_expect(begins_anew(t, b), 0)) {
          for (V& one : d_state) one = V(0);
        }
        for (int g = 0; g < G + A + N; ++g) {
          store_first(d_gates_now + b * width(s) + g * s.hidden + unit, d_a[g], valid);
        }
        if (Cell::direct && !s.projected) d_state[0].store(d_h + b * buffers.d_h_stride + unit);
        if constexpr (Cell::states > 1) d_state[1].store(d_c + b * buffers.d_c_stride + unit);
      }
    }

    FASTCELL_INLINE V cell_before(int64_t t, int64_t b, int64_t unit, int valid) const {
      if (begins_anew(t, b)) return V(0);
      const int64_t before = reverse ? t + 1 : t - 1;
      if (before >= 0 && before < time.steps && b < time.alive(before)) {
        return load_first(kept_states + (time.first(before) + b) * s.hidden + unit, valid);
      }
      return initial[1] ? load_first(initial[1] + time.sample(b) * s.hidden + unit, valid) : V(0);
    }

    // Gradients of the initial h of samples [begin, end), whose first step was t.
    void begin_gradients(int64_t t, int64_t begin, int64_t end) {
      if (!d_initial[0] || begin >= end) return;
      if (s.delay > 0) remembered_gradients(t, begin, end);
      share_h.for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b0 < begin) b0 = begin;
        if (b1 > end) b1 = end;
        const int vectors = over_h.vectors(p);
        const int64_t unit = over_h.first_unit(p), left = s.output - unit;
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        for (int64_t b = b0; b < b1; b += kRowBlock) {
          const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
          recurrent_product(p, t, b, n, block);
          for (int i = 0; i < n; ++i) {
            if (s.delay > 0)
              add_remembered(p, time.length(b + i), b + i, block + i * vectors * lanes);
            std::memcpy(remembered(d_initial[0], 0, b + i) + unit, block + i * vectors * lanes,
                        (left < vectors * lanes ? left : vectors * lanes) * sizeof(T));
          }
        }
      });
    }

    // With a delay, of the h before that.
    void remembered_gradients(int64_t t, int64_t begin, int64_t end) {
      share_h.for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
        if (b0 < begin) b0 = begin;
        if (b1 > end) b1 = end;
        const int vectors = over_h.vectors(p);
        const int64_t unit = over_h.first_unit(p), left = s.output - unit;
        alignas(64) T block[kRowBlock * kMaxVectors * lanes];
        T* sums[kRowBlock];
        for (int i = 0; i < kRowBlock; ++i) sums[i] = block + i * vectors * lanes;
        for (int64_t b = b0; b < b1; b += kRowBlock) {
          const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
          for (int64_t k = 1; k < s.delay; ++k) {
            std::memset(block, 0, n * vectors * lanes * sizeof(T));
            add_delayed(p, delayed(reverse ? t + 1 + k : t - 1 - k), b, n, sums);
            for (int i = 0; i < n; ++i) {
              add_remembered(p, time.length(b + i) + k, b + i, sums[i]);
              std::memcpy(remembered(d_initial[0], k, b + i) + unit, sums[i],
                          (left < vectors * lanes ? left : vectors * lanes) * sizeof(T));
            }
          }
        }
      });
    }

    // Of samples without steps, whose final states are the initial ones.
    void pass_on_gradients() {
      const bool last = place.index == 0 && place.b0 < time.batch && place.b1 == time.batch;
      for (int64_t b = time.batch; last && b < time.all(); ++b) {
        for (int i = 0; i < Cell::states; ++i) {
          if (!d_initial[i]) continue;
          const int64_t size = s.state_size(i);
          for (int64_t k = 0; k < (i == 0 ? s.remembered() : 1); ++k) {
            const int64_t at = (k * time.all() + time.sample(b)) * size;
            for (int64_t j = at; j < at + size; ++j) {
              d_initial[i][j] = d_final[i] ? d_final[i][j] : T(0);
            }
          }
        }
      }
    }

    void store_cell_gradients() {
      if constexpr (Cell::states > 1) {
        if (!d_initial[1]) return;
        const Range range = part(place.b1 - place.b0, place.index, place.size);
        for (int64_t b = place.b0 + range.begin; b < place.b0 + range.end; ++b) {
          std::memcpy(d_initial[1] + time.sample(b) * s.hidden, d_c + b * buffers.d_c_stride,
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
    int half = 0;  // of WeightGradient's buffer

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
      return reserve + layout.layer_output_at(s, which, time.rows);
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
      const RowMap<const T> x = layer_input();
      team.sync();
      Direction directions[] = {direction(0), direction(s.directions - 1)};
      const auto mine = [&](int dir) { return dir % place.directions == place.direction_group; };
      for (int dir = 0; dir < s.directions; ++dir) {
        if (mine(dir)) directions[dir].begin();
      }
      const int64_t count = buffers.chunks.count;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t chunk_of[] = {count - 1 - i, i};
        for (int dir = 0; dir < s.directions; ++dir) {
          if (mine(dir)) directions[dir].run_steps(buffers.chunks.steps_of(time, chunk_of[dir]));
        }
        team.sync();
        for (int dir = 0; dir < s.directions; ++dir) {
          if (input_gradient()) gradient_of_input(dir, directions[dir], chunk_of[dir]);
          gradients_of_weights(dir, directions[dir], chunk_of[dir], x, i == 0 && !call.accumulate);
        }
      }
      for (int dir = 0; dir < s.directions; ++dir) {
        if (mine(dir)) directions[dir].end();
      }
      team.sync();
      if (input_gradient()) mask_input_gradient();
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
        if (Cell::recurrent && (time.steps > 1 || call.d_state[0] || S > 0)) {
          pack_rows(
              over_h, [&](int64_t k) { return w_hh + k * s.output; }, buffers.h_weights[dir],
              part(over_h.count(), team.index, team.size));
        }
        if (input_gradient() && time.rows > kFewRows) {
          const Panels<T> over_x{1, s.layer_input(layer), G * s.hidden};
          const T* w_ih = weight(dir, 0);
          pack_rows(
              over_x, [&](int64_t k) { return w_ih + k * over_x.units; }, buffers.x_weights[dir],
              part(over_x.count(), team.index, team.size));
        }
        if (s.delay > 0) {
          const T* w_skip = weight(dir, s.skip_at());
          pack_rows(
              over_h, [&](int64_t k) { return w_skip + k * s.output; }, buffers.skip_weights[dir],
              part(over_h.count(), team.index, team.size));
        }
        if (s.projected) {
          const Panels<T> over_m{1, s.hidden, s.output};
          const T* w_hr = weight(dir, s.projection_at());
          pack_rows(
              over_m, [&](int64_t k) { return w_hr + k * s.hidden; }, buffers.r_weights[dir],
              part(over_m.count(), team.index, team.size));
        }
      }
      if (team.index == 0) std::memset(buffers.zeros, 0, (s.output + lanes) * sizeof(T));
    }

    Direction direction(int dir) const {
      const Panels<T> over_h{1, s.output, G * s.hidden};
      const Panels<T> over_m{1, s.projected ? s.hidden : 0, s.output};
      const auto share = [&](const Panels<T>& panels) {
        return Share(panels.count(), place.b0, place.b1, panels.rows_each(), place.index,
                     place.size);
      };
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
                  buffers.skip_weights[dir],
                  N > 0 ? weight(dir, s.parameters_at()) : nullptr,
                  call.extras.reset,
                  call.extras.seed,
                  call.extras.recurrent ? static_cast<const T*>(call.extras.recurrent) +
                                              flat(dir) * time.all() * s.output
                                        : nullptr,
                  {},
                  call.d_cells ? static_cast<const T*>(call.d_cells) + dir * s.hidden : nullptr,
                  s.directions * s.hidden,
                  over_h,
                  over_m,
                  share(over_h),
                  share(over_m)};
      for (int i = 0; i < Cell::states; ++i) {
        const int64_t at = flat(dir) * s.state_elements(i, time.all());
        d.initial[i] = call.state[i] ? static_cast<const T*>(call.state[i]) + at : nullptr;
        d.d_final[i] = call.d_final[i] ? static_cast<const T*>(call.d_final[i]) + at : nullptr;
        d.d_initial[i] = call.d_state[i] ? static_cast<T*>(call.d_state[i]) + at : nullptr;
        const auto layer_and_direction = noise::Bits(flat(dir));
        d.state_keys[i] =
            d.seed ? noise::state_key(*d.seed, layer_and_direction, noise::Bits(i)) : 0;
      }
      return d;
    }

    RowMap<const T> output_gradient(int dir) const {
      if (layer == s.layers - 1) {
        RowMap<const T> rows = call.d_y.as<const T>();
        if (rows.base) rows.base += dir * s.output;
        return rows;
      }
      return {buffers.d_layer[layer % 2] + dir * s.output, 0, out_width, true};
    }

    RowMap<T> input_gradient_rows() const {
      if (layer == 0) return call.d_x.as<T>();
      return {buffers.d_layer[(layer - 1) % 2], 0, out_width, true};
    }

    const T* mask() const {
      if (!call.extras.masks || layer == 0) return nullptr;
      return static_cast<const T*>(call.extras.masks) + (layer - 1) * time.rows * out_width;
    }

    void gradient_of_input(int dir, const Direction& d, int64_t chunk) const {
      const Range steps = buffers.chunks.steps_of(time, chunk);
      const Range rows{time.first(steps.begin), time.first(steps.end)};
      const RowMap<T> to = input_gradient_rows();
      const int64_t width = Direction::width(s);
      const T* d_gates = d.d_gates_of(steps.begin);
      // The other direction comes through the chunks the other way round: who comes second, adds.
      const int64_t last = buffers.chunks.count - 1;
      const bool add =
          s.directions > 1 && (dir == 0 ? chunk < last - chunk : chunk >= last - chunk);
      const auto a_row = [&](int64_t r) { return d_gates + (r - rows.begin) * width; };
      const auto c_row = [&](int64_t r) {
        const int64_t t = to.packed ? 0 : time.step_of(r);
        return to.at(t, r - (to.packed ? 0 : time.first(t)), r);
      };
      const Panels<T> over_x{1, s.layer_input(layer), G * s.hidden};
      if (time.rows <= kFewRows) {
        multiply_few_rows<T>(weight(dir, 0), over_x.units, over_x.depth, rows, a_row, c_row, add,
                             team);
      } else {
        multiply_rows<T>(over_x, buffers.x_weights[dir], rows, a_row, c_row, add, buffers.rows,
                         team);
      }
    }

    void mask_input_gradient() const {
      const T* m = mask();
      if (!m) return;
      const RowMap<T> to = input_gradient_rows();
      const Range range = part(time.rows * out_width, team.index, team.size);
      for (int64_t i = range.begin; i < range.end; ++i) to.base[i] *= m[i];
      team.sync();
    }

    RowMap<const T> layer_input() const {
      if (layer == 0) return call.x.as<const T>();
      const T* input = output(layer - 1);
      if (const T* m = mask()) {
        const Range range = part(time.rows * out_width, team.index, team.size);
        for (int64_t i = range.begin; i < range.end; ++i) buffers.dropped[i] = input[i] * m[i];
        team.sync();
        input = buffers.dropped;
      }
      return {input, 0, out_width, true};
    }

    // What one chunk adds, block by block, in the order of the time loop.
    void gradients_of_weights(int dir, const Direction& d, int64_t chunk, const RowMap<const T>& x,
                              bool begin) {
      const Range steps = buffers.chunks.steps_of(time, chunk);
      const int64_t each = buffers.chunks.block_steps;
      const int64_t count = (steps.end - steps.begin + each - 1) / each;
      for (int64_t i = 0; i < count; ++i, begin = false) {
        const int64_t t0 = steps.begin + (d.reverse ? i : count - 1 - i) * each;
        const int64_t t1 = t0 + each < steps.end ? t0 + each : steps.end;
        block_gradients(dir, d, {t0, t1}, x, begin);
      }
    }

    void block_gradients(int dir, const Direction& d, Range steps, const RowMap<const T>& x,
                         bool begin) {
      using Gradient = WeightGradient<T>;
      const Range rows{time.first(steps.begin), time.first(steps.end)};
      const int64_t width = Direction::width(s), H = s.hidden;
      const T* d_gates = d.d_gates_of(steps.begin);
      const auto x_row = [&](int64_t t, int64_t b, int64_t r) { return x.at(t, b, r); };
      if (d.factors) mask_h(d, steps);
      const auto h_row = [&](int64_t t, int64_t b, int64_t r) {
        return d.factors ? buffers.masked + (r - rows.begin) * s.output : d.h_before(t, b);
      };
      const typename Gradient::template Features<decltype(x_row)> of_x{x_row, s.layer_input(layer)};
      const typename Gradient::template Features<decltype(h_row)> of_h{h_row, s.output};
      T* const d_ih = d_weight(dir, 0);
      T* const d_hh = Cell::recurrent ? d_weight(dir, 1) : nullptr;
      if constexpr (S > 0) {
        const typename Gradient::Part parts[] = {
            {0, (G - S) * H, d_ih, d_hh},
            {(G - S) * H, S * H, d_ih ? d_ih + (G - S) * H * of_x.n : nullptr, nullptr}};
        Gradient::run(d_gates, width, time, rows, of_x, of_h, parts, begin, half, buffers.product,
                      team);
        // What the second product took was saved last.
        const auto m_row = [&](int64_t, int64_t, int64_t r) {
          return d.saved + (r * Cell::saved + Cell::saved - 1) * H;
        };
        const typename Gradient::template Features<decltype(m_row)> of_m{m_row, H};
        const typename Gradient::Part second[] = {
            {(G - S) * H, S * H, d_hh ? d_hh + (G - S) * H * H : nullptr, nullptr}};
        Gradient::run(d_gates, width, time, rows, of_m, of_h, second, begin, half, buffers.product,
                      team);
      } else if constexpr (A == 0) {
        const typename Gradient::Part parts[] = {{0, G * H, d_ih, d_hh}};
        Gradient::run(d_gates, width, time, rows, of_x, of_h, parts, begin, half, buffers.product,
                      team);
      } else {
        const typename Gradient::Part parts[] = {
            {0, joined * H, d_ih, d_hh},
            {joined * H, A * H, d_ih ? d_ih + joined * H * of_x.n : nullptr, nullptr},
            {G * H, A * H, nullptr, d_hh ? d_hh + joined * H * of_h.n : nullptr}};
        Gradient::run(d_gates, width, time, rows, of_x, of_h, parts, begin, half, buffers.product,
                      team);
      }
      if (s.projected) {
        const T* m = reserve + layout.cell_output_at(s, layer, dir, time.rows);
        const auto m_row = [&](int64_t, int64_t, int64_t r) { return m + r * H; };
        const typename Gradient::template Features<decltype(m_row)> of_m{m_row, H};
        const typename Gradient::Part parts[] = {
            {0, s.output, d_weight(dir, s.projection_at()), nullptr}};
        Gradient::run(d.d_output_of(steps.begin), s.output, time, rows, of_m, of_h, parts, begin,
                      half, buffers.product, team);
      }
      if (s.delay > 0) {
        const auto delayed_row = [&](int64_t t, int64_t b, int64_t) { return d.h_delayed(t, b); };
        const typename Gradient::template Features<decltype(delayed_row)> of_skip{delayed_row,
                                                                                  s.output};
        const typename Gradient::Part parts[] = {{0, G * H, d_weight(dir, s.skip_at()), nullptr}};
        Gradient::run(d_gates, width, time, rows, of_skip, of_h, parts, begin, half,
                      buffers.product, team);
      }
      sum_gradients(dir, d_gates, rows.end - rows.begin, begin);
    }

    // Of some steps, h_{t-1} as the recurrent product took it.
    void mask_h(const Direction& d, Range steps) const {
      const Range rows{time.first(steps.begin), time.first(steps.end)};
      const Range mine = part(rows.end - rows.begin, team.index, team.size);
      int64_t t = steps.begin;
      for (int64_t r = rows.begin + mine.begin; r < rows.begin + mine.end; ++r) {
        while (r >= time.first(t + 1)) ++t;
        const int64_t b = r - time.first(t);
        const T *from = d.h_before(t, b), *by = d.factors + time.sample(b) * s.output;
        T* const to = buffers.masked + (r - rows.begin) * s.output;
        for (int64_t k = 0; k < s.output; ++k) to[k] = from[k] * by[k];
      }
      team.sync();
    }

    // Of biases and the cell's parameters: sums over the rows.
    void sum_gradients(int dir, const T* d_gates, int64_t rows, bool begin) const {
      T* const d_b_ih = s.bias ? d_weight(dir, 2) : nullptr;
      T* const d_b_hh = s.bias ? d_weight(dir, 3) : nullptr;
      const int64_t width = Direction::width(s), H = s.hidden;
      const auto sum = [&](int64_t column, int64_t count, T* to) {
        const Range mine = part(count, team.index, team.size);
        sum_columns(d_gates, width, rows, column + mine.begin, column + mine.end, !begin,
                    to + mine.begin);
      };
      if (d_b_ih) sum(0, G * H, d_b_ih);
      if (d_b_hh) {
        sum(0, joined * H, d_b_hh);
        if (A > 0) sum(G * H, A * H, d_b_hh + joined * H);
      }
      if constexpr (N > 0) {
        T* const d_parameters = d_weight(dir, s.parameters_at());
        if (d_parameters) sum((G + A) * H, N * H, d_parameters);
      }
    }
  };
};

}  // namespace fastcell::FASTCELL_ISA
