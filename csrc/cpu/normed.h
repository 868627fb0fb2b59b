// The engine of cells with layer normalisation.
//
// A norm needs a sample's sums of all units before any of them goes on. So a step has two parts,
// with a barrier behind each: the product, for which threads share out the weights' panels, so that
// each is read once; then norms and the cell's maths, for which they share out the samples.
#pragma once

#include "../common/normed.h"
#include "math.h"
#include "panels.h"
#include "rows.h"

namespace fastcell::FASTCELL_ISA {

// Norms of numbers in a row: (x - mean) / sqrt(variance + epsilon).
template <class T>
struct Norm {
  using V = Vec<T>;
  static constexpr double kEpsilon = 1e-5;

  // The sum of f(k, lanes there) over vectors of [0, n), in an order that n alone decides.
  template <class F>
  static FASTCELL_INLINE T sum(int64_t n, F f) {
    V total(T(0));
    for (int64_t k = 0; k < n; k += V::lanes) {
      const int there = n - k < V::lanes ? int(n - k) : V::lanes;
      total = total + f(k, there);
    }
    alignas(64) T lanes[V::lanes];
    total.store(lanes);
    T result = 0;
    for (int i = 0; i < V::lanes; ++i) result += lanes[i];
    return result;
  }

  // x to its normalised numbers; returns 1 / sqrt(variance + epsilon).
  static T forward(const T* x, int64_t n, T* to) {
    const T mean = sum(n, [&](int64_t k, int there) { return load_first(x + k, there); }) / T(n);
    const T variance = sum(n,
                           [&](int64_t k, int there) {
                             const V d = load_first(x + k, there) - load_mean(mean, there);
                             return d * d;
                           }) /
                       T(n);
    const T scale = T(1) / T(__builtin_sqrt(double(variance) + kEpsilon));
    for (int64_t k = 0; k < n; k += V::lanes) {
      const int there = n - k < V::lanes ? int(n - k) : V::lanes;
      store_first(to + k, (load_first(x + k, there) - V(mean)) * V(scale), there);
    }
    return scale;
  }

  // d(k, there): gradients of the normalised numbers; `to` gets those of x.
  template <class D>
  static void backward(const T* normed, T scale, int64_t n, D d, T* to) {
    const T mean = sum(n, [&](int64_t k, int there) { return d(k, there); }) / T(n);
    const T along =
        sum(n, [&](int64_t k, int there) { return d(k, there) * load_first(normed + k, there); }) /
        T(n);
    for (int64_t k = 0; k < n; k += V::lanes) {
      const int there = n - k < V::lanes ? int(n - k) : V::lanes;
      const V x = load_first(normed + k, there);
      store_first(to + k, (d(k, there) - V(mean) - x * V(along)) * V(scale), there);
    }
  }

 private:
  // Zero behind the end, as what is loaded there.
  static FASTCELL_INLINE V load_mean(T mean, int there) {
    if (there >= V::lanes) return V(mean);
    alignas(64) T lanes[V::lanes] = {};
    for (int i = 0; i < there; ++i) lanes[i] = mean;
    return V::load(lanes);
  }
};

template <class T, template <class> class CellOf>
struct Normed {
  using V = Vec<T>;
  using Cell = CellOf<V>;
  static constexpr int G = Cell::gates;
  static constexpr int lanes = V::lanes;
  static constexpr bool kCell = Cell::states > 1;

  // What is kept of a row: normalised sums, gates, for the LSTM c and its normalised numbers, then
  // the norms' scales.
  static int64_t gates_at(int64_t hidden) { return G * hidden; }
  static int64_t cell_at(int64_t hidden) { return gates_at(hidden) + Cell::saved * hidden; }
  static int64_t scales_at(int64_t hidden) { return cell_at(hidden) + (kCell ? 2 * hidden : 0); }
  static int64_t kept_elements(int64_t hidden) {
    return scales_at(hidden) + Cell::parts + (kCell ? 1 : 0);
  }

  struct Buffers {
    T* panels;  // of the weights, for this direction of the pass
    T *h, *c;   // (B, padded): states, or their gradients
    T* sums;    // (B, padded G*H)
    T* row;     // per thread: what is kept of a row that nobody keeps; scratch
    T* zeros;
    int64_t stride, wide;

    Buffers(const NormedCall& call, bool backward, int threads, Arena& arena) {
      const int64_t H = call.hidden;
      stride = padded_row<T>(H);
      wide = padded_row<T>(G * H);
      panels =
          arena.take<T>(backward ? Panels<T>{1, H, G * H}.size() : Panels<T>{1, G * H, H}.size());
      h = arena.take<T>(call.time.batch * stride);
      c = arena.take<T>(kCell ? call.time.batch * stride : 0);
      sums = arena.take<T>(backward ? 0 : call.time.batch * wide);
      row = arena.take<T>(threads * (kept_elements(H) + wide));
      zeros = arena.take<T>(stride);
    }
  };

  static int64_t workspace_bytes(const NormedCall& call, bool backward, int threads) {
    Arena arena(nullptr);
    Buffers(call, backward, threads, arena);
    return arena.used();
  }

  static void run(const NormedCall& call, const NormedGradients* gradients, const Team& team) {
    Arena arena(call.workspace);
    const Buffers buffers(call, gradients != nullptr, team.size, arena);
    const T* w = static_cast<const T*>(call.weights);
    const int64_t H = call.hidden;
    if (gradients) {
      const Panels<T> panels{1, H, G * H};
      pack_rows(
          panels, [&](int64_t k) { return w + k * H; }, buffers.panels,
          part(panels.count(), team.index, team.size));
    } else {
      const Panels<T> panels{1, G * H, H};
      pack_transposed(panels, w, buffers.panels, part(panels.count(), team.index, team.size), 0);
    }
    if (team.index == 0) std::memset(buffers.zeros, 0, buffers.stride * sizeof(T));
    team.sync();
    Normed one(call, gradients, buffers, team);
    if (gradients) {
      one.run_backward();
    } else {
      one.run_forward();
    }
  }

 private:
  const NormedCall& call;
  const NormedGradients* const gradients;
  const Buffers& buffers;
  const Timeline& time;
  const int64_t H;
  const Team& team;
  const Range samples;  // of this thread, in the second part of a step
  T* const scratch;
  const int64_t kept_stride;

  Normed(const NormedCall& call, const NormedGradients* gradients, const Buffers& buffers,
         const Team& team)
      : call(call),
        gradients(gradients),
        buffers(buffers),
        time(call.time),
        H(call.hidden),
        team(team),
        samples(part(call.time.batch, team.index, team.size)),
        scratch(buffers.row + team.index * (kept_elements(call.hidden) + buffers.wide)),
        kept_stride(kept_elements(call.hidden)) {}

  static const T* in(const void* p) { return static_cast<const T*>(p); }
  static T* out(void* p) { return static_cast<T*>(p); }
  bool begins_anew(int64_t r) const { return call.reset && call.reset[r]; }
  T* kept(int64_t r) const { return call.kept ? out(call.kept) + r * kept_stride : scratch; }
  int64_t alive(int64_t t) const {
    return time.alive(t) < samples.end ? time.alive(t) : samples.end;
  }

  // to(b) = row(b) times this thread's panels, for the samples [0, count); `then(b, unit, vectors,
  // sums)` for each of them.
  template <class Row, class To, class Then>
  void multiply(int64_t count, const Panels<T>& panels, Row row, To to, Then then) const {
    alignas(64) T zeros[kMaxVectors * lanes] = {};
    const Range mine = part(panels.count(), team.index, team.size);
    for (int64_t b = 0; b < count; b += kRowBlock) {
      const int n = int(count - b < kRowBlock ? count - b : kRowBlock);
      const T* a[kRowBlock];
      T* c[kRowBlock];
      for (int i = 0; i < n; ++i) a[i] = row(b + i);
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        const int64_t unit = panels.first_unit(p);
        const int vectors = panels.vectors(p);
        for (int i = 0; i < n; ++i) c[i] = to(b + i, i, unit, vectors);
        multiply_panel<Plain<T>>(a, c, n, buffers.panels + panels.offset(p), vectors, panels.depth,
                                 lanes, zeros);
        for (int i = 0; i < n; ++i) then(b + i, unit, vectors, c[i]);
      }
    }
  }

  template <class F>
  FASTCELL_INLINE void for_units(F f) const {
    for (int64_t unit = 0; unit < H; unit += lanes) {
      f(unit, H - unit < lanes ? int(H - unit) : lanes);
    }
  }

  // A state's row, from what the caller gave or zero, and back.
  void begin(const void* const (&given)[kMaxStates]) const {
    for (int64_t b = samples.begin; b < samples.end; ++b) {
      load(given[0], b, buffers.h);
      if (kCell) load(given[1], b, buffers.c);
    }
  }
  void load(const void* given, int64_t b, T* rows) const {
    T* const to = rows + b * buffers.stride;
    std::memset(to, 0, buffers.stride * sizeof(T));
    if (given) std::memcpy(to, in(given) + b * H, H * sizeof(T));
  }
  void end(void* const (&to)[kMaxStates]) const {
    for (int64_t b = samples.begin; b < samples.end; ++b) {
      if (to[0]) std::memcpy(out(to[0]) + b * H, buffers.h + b * buffers.stride, H * sizeof(T));
      if (kCell && to[1]) {
        std::memcpy(out(to[1]) + b * H, buffers.c + b * buffers.stride, H * sizeof(T));
      }
    }
  }

  void run_forward() const {
    begin(call.state);
    team.sync();
    const Panels<T> panels{1, G * H, H};
    for (int64_t i = 0; i < time.steps; ++i) {
      const int64_t t = call.reverse ? time.steps - 1 - i : i, first = time.first(t);
      multiply(
          time.alive(t), panels,
          [&](int64_t b) {
            return begins_anew(first + b) ? buffers.zeros : buffers.h + b * buffers.stride;
          },
          [&](int64_t b, int, int64_t unit, int) { return buffers.sums + b * buffers.wide + unit; },
          [](int64_t, int64_t, int, const T*) {});
      team.sync();
      for (int64_t b = samples.begin; b < alive(t); ++b) {
        forward_row(b, first + b, buffers.sums + b * buffers.wide);
      }
      team.sync();
    }
    end(call.final_state);
  }

  void forward_row(int64_t b, int64_t r, const T* u) const {
    T* const keep = kept(r);
    T *const gates = keep + gates_at(H), *const scales = keep + scales_at(H);
    int64_t at = 0;
    for (int i = 0; i < Cell::parts; ++i) {
      const int64_t n = Cell::part_gates[i] * H;
      scales[i] = Norm<T>::forward(u + at, n, keep + at);
      at += n;
    }
    const T *terms = in(call.terms) + r * G * H, *gain = in(call.gain), *bias = in(call.bias);
    T *const h = buffers.h + b * buffers.stride, *const c = buffers.c + b * buffers.stride;
    T* const cell = keep + cell_at(H);
    const bool anew = begins_anew(r);
    for_units([&](int64_t unit, int there) {
      V x[G], v[G], state[Cell::states], saved[Cell::saved];
      for (int g = 0; g < G; ++g) {
        x[g] = load_first(terms + g * H + unit, there);
        v[g] = fma(load_first(gain + g * H + unit, there), load_first(keep + g * H + unit, there),
                   bias ? load_first(bias + g * H + unit, there) : V(T(0)));
      }
      state[0] = anew ? V(T(0)) : V::load(h + unit);
      if constexpr (kCell) state[1] = anew ? V(T(0)) : V::load(c + unit);
      Cell::forward(x, v, state, saved);
      for (int i = 0; i < Cell::saved; ++i) store_first(gates + i * H + unit, saved[i], there);
      if constexpr (kCell) {
        store_first(c + unit, state[1], there);
        store_first(cell + unit, state[1], there);
      } else {
        store_output(r, h, unit, state[0], there);
      }
    });
    if constexpr (kCell) {
      scales[Cell::parts] = Norm<T>::forward(cell, H, cell + H);
      for_units([&](int64_t unit, int there) {
        V saved[Cell::saved];
        for (int i = 0; i < Cell::saved; ++i) saved[i] = load_first(gates + i * H + unit, there);
        store_output(r, h, unit, Cell::output(saved, normed_cell(cell, unit, there)), there);
      });
    }
  }

  FASTCELL_INLINE void store_output(int64_t r, T* h, int64_t unit, V value, int there) const {
    store_first(h + unit, value, there);
    store_first(out(call.y) + r * H + unit, value, there);
  }

  // What the output gate is applied to: c after its norm, gain and bias.
  FASTCELL_INLINE V normed_cell(const T* cell, int64_t unit, int there) const {
    const T* const norm = in(call.cell_norm);
    return fma(load_first(norm + unit, there), load_first(cell + H + unit, there),
               load_first(norm + H + unit, there));
  }

  // --- backward
  // -----------------------------------------------------------------------------------

  int64_t step_before(int64_t t) const { return call.reverse ? t + 1 : t - 1; }
  // The row of a sample's state before step t, in a (rows, .) of what came out of each step.
  int64_t row_before(int64_t t, int64_t b) const {
    const int64_t before = step_before(t);
    if (before < 0 || before >= time.steps || b >= time.alive(before)) return -1;
    return time.first(before) + b;
  }

  void run_backward() const {
    begin(gradients->d_final);
    const Panels<T> panels{1, H, G * H};
    for (int64_t i = 0; i < time.steps; ++i) {
      const int64_t t = call.reverse ? i : time.steps - 1 - i, first = time.first(t);
      for (int64_t b = samples.begin; b < alive(t); ++b) backward_row(t, b, first + b);
      team.sync();
      // On to the state before: what goes through the product.
      alignas(64) T block[kRowBlock * kMaxVectors * lanes];
      multiply(
          time.alive(t), panels,
          [&](int64_t b) { return in(gradients->d_sums) + (first + b) * G * H; },
          [&](int64_t, int i, int64_t, int vectors) { return block + i * vectors * lanes; },
          [&](int64_t b, int64_t unit, int vectors, const T* sums) {
            if (begins_anew(first + b)) return;
            T* const d_h = buffers.h + b * buffers.stride + unit;
            for (int v = 0; v < vectors; ++v) {
              (V::load(d_h + v * lanes) + V::load(sums + v * lanes)).store(d_h + v * lanes);
            }
          });
      team.sync();
    }
    end(gradients->d_state);
  }

  void backward_row(int64_t t, int64_t b, int64_t r) const {
    const T* const keep = kept(r);
    const T *const gates = keep + gates_at(H), *const scales = keep + scales_at(H);
    const T* const cell = keep + cell_at(H);
    T *const d_h = buffers.h + b * buffers.stride, *const d_c = buffers.c + b * buffers.stride;
    T* const d_terms = out(gradients->d_terms) + r * G * H;
    T* const d_normed = out(gradients->d_normed) + r * G * H;
    const bool anew = begins_anew(r);
    const int64_t past = row_before(t, b);
    const T* const h_before = state_before(0, anew, past < 0 ? nullptr : in(call.y) + past * H, b);
    const T* c_before = nullptr;
    if constexpr (kCell) {
      c_before = state_before(1, anew, past < 0 ? nullptr : kept(past) + cell_at(H), b);
    }
    std::memcpy(out(gradients->before) + r * H, h_before, H * sizeof(T));
    for_units([&](int64_t unit, int there) {
      V d = V::load(d_h + unit);
      if (gradients->d_y) d = d + load_first(in(gradients->d_y) + r * H + unit, there);
      d.store(d_h + unit);
      if constexpr (kCell) {
        V saved[Cell::saved], d_u[G];
        for (int i = 0; i < Cell::saved; ++i) saved[i] = load_first(gates + i * H + unit, there);
        const V d_n = Cell::backward_output(saved, normed_cell(cell, unit, there), d, d_u);
        store_first(out(gradients->d_cell) + r * H + unit, d_n, there);
        store_first(d_normed + (G - 1) * H + unit, d_u[G - 1], there);
      }
    });
    if constexpr (kCell) {  // through c's norm
      const T *d_n = in(gradients->d_cell) + r * H, *gain = in(call.cell_norm);
      Norm<T>::backward(
          cell + H, scales[Cell::parts], H,
          [&](int64_t k, int there) {
            return load_first(d_n + k, there) * load_first(gain + k, there);
          },
          scratch);
    }
    for_units([&](int64_t unit, int there) {
      V saved[Cell::saved], before[Cell::states], d_state[Cell::states], d_x[G], d_u[G];
      for (int i = 0; i < Cell::saved; ++i) saved[i] = load_first(gates + i * H + unit, there);
      before[0] = load_first(h_before + unit, there);
      d_state[0] = V::load(d_h + unit);
      if constexpr (kCell) {
        before[1] = load_first(c_before + unit, there);
        d_state[1] = V::load(d_c + unit) + load_first(scratch + unit, there);
        d_u[G - 1] = load_first(d_normed + (G - 1) * H + unit, there);
      }
      Cell::backward(saved, before, d_state, d_x, d_u);
      for (int g = 0; g < G; ++g) {
        store_first(d_terms + g * H + unit, d_x[g], there);
        store_first(d_normed + g * H + unit, d_u[g], there);
      }
      if constexpr (kCell) {
        (anew ? V(T(0)) : d_state[1]).store(d_c + unit);
        V(T(0)).store(d_h + unit);
      } else {
        (anew ? V(T(0)) : d_state[0]).store(d_h + unit);
      }
    });
    // Through the norms of the recurrent terms.
    T* const d_sums = out(gradients->d_sums) + r * G * H;
    const T* const gain = in(call.gain);
    int64_t at = 0;
    for (int i = 0; i < Cell::parts; ++i) {
      const int64_t n = Cell::part_gates[i] * H;
      Norm<T>::backward(
          keep + at, scales[i], n,
          [&](int64_t k, int there) {
            return load_first(d_normed + at + k, there) * load_first(gain + at + k, there);
          },
          d_sums + at);
      at += n;
    }
  }

  const T* state_before(int state, bool anew, const T* past, int64_t b) const {
    if (anew) return buffers.zeros;
    if (past) return past;
    return call.state[state] ? in(call.state[state]) + b * H : buffers.zeros;
  }
};

}  // namespace fastcell::FASTCELL_ISA
