// Backpropagation through time for cells with layer normalisation: a block of steps at a time, the
// time loop, then what the block adds to the gradients of the input and of the weights.
//
// Gains and biases: a sum for each sample within a block, then the samples' and blocks' sums in
// their order. So the bits do not depend on the number of threads, and no chain is long.
#pragma once

#include "normed.h"

namespace fastcell::FASTCELL_ISA {

template <class T, template <class> class CellOf>
class NormedBackward : NormedPass<T, CellOf> {
  using Pass = NormedPass<T, CellOf>;
  using Pass::call, Pass::time, Pass::team, Pass::H, Pass::P, Pass::projected;
  using Pass::G, Pass::kCell, Pass::kHidden, Pass::kInput, Pass::lanes;
  using Pass::in, Pass::out, Pass::begins_anew, Pass::kept;
  using Pass::layout, Pass::zeros;
  using typename Pass::Cell;
  using typename Pass::V;
  using Product = WeightGradient<T>;

  static constexpr int N = Cell::parameters;
  // Rows of the scratch: what the cell saves, its normalised c and the gradients of that and of the
  // last gate's terms.
  static constexpr int kNormed = Cell::saved, kOfNormed = kNormed + 1, kOfGate = kNormed + 2;
  static constexpr int kScratch = kNormed + 3;

  // Of a sample: sums for the gradients of gains, biases, c's norm and the cell's vectors.
  struct Sums {
    int64_t hidden;
    int64_t gains(int which) const { return which * G * hidden; }
    // The same numbers, where both biases are added to the same terms.
    int64_t biases(int which) const { return (2 + (Cell::joined ? 0 : which)) * G * hidden; }
    int64_t cell_norm() const { return (Cell::joined ? 3 : 4) * G * hidden; }
    int64_t parameters() const { return cell_norm() + (kCell ? 2 * hidden : 0); }
    int64_t elements() const { return parameters() + N * hidden; }
    int64_t stride() const { return padded_row<T>(elements()); }
  };

  struct Buffers {
    T *x_panels, *h_panels, *r_panels;  // weights over what they multiply
    T *d_h, *d_c;                       // (B, padded)
    T* d_m;                             // (B, padded H): of what the projection takes
    T* d_output;                        // (rows of a block, P): of what it makes
    T* d_products;  // (rows of a block, 2 * G*H): of the input's product and of h's
    T* sums;        // (B, .)
    T* row;         // per thread: what goes from one loop over a row's units to the next
    T* zeros;
    int64_t stride, c_stride, widest_state, wide;
    typename Product::Buffers product;

    Buffers(const NormedCall& call, int threads, Arena& arena)
        : product(widest(call), call.output, call.time.rows, threads, arena) {
      const int64_t H = call.hidden, P = call.output, batch = call.time.batch;
      const bool projected = call.projection != nullptr;
      const int64_t most = Product::kRowsPerBlock > batch ? Product::kRowsPerBlock : batch;
      const int64_t rows = most < call.time.rows ? most : call.time.rows;
      stride = padded_row<T>(P);
      c_stride = padded_row<T>(H);
      widest_state = stride > c_stride ? stride : c_stride;
      wide = padded_row<T>(2 * G * H);
      x_panels = arena.take<T>(Panels<T>{1, call.features, G * H}.size());
      h_panels = arena.take<T>(Panels<T>{1, P, G * H}.size());
      r_panels = arena.take<T>(projected ? Panels<T>{1, H, P}.size() : 0);
      d_h = arena.take<T>(batch * stride);
      d_c = arena.take<T>(kCell ? batch * c_stride : 0);
      d_m = arena.take<T>(projected ? batch * c_stride : 0);
      d_output = arena.take<T>(projected ? rows * P : 0);
      d_products = arena.take<T>(rows * wide);
      sums = arena.take<T>(batch * Sums{H}.stride());
      row = arena.take<T>(threads * kScratch * c_stride);
      zeros = arena.take<T>(widest_state);
    }

    static int64_t widest(const NormedCall& call) {
      return call.projection && call.hidden > call.features ? call.hidden : call.features;
    }
  };

  const NormedGradients& gradients;
  const Buffers& buffers;
  const Sums sums;
  T* const scratch;

  NormedBackward(const NormedCall& call, const NormedGradients& gradients, const Buffers& buffers,
                 const Team& team)
      : Pass(call, buffers.zeros, team),
        gradients(gradients),
        buffers(buffers),
        sums{call.hidden},
        scratch(buffers.row + team.index * kScratch * buffers.c_stride) {}

 public:
  static int64_t workspace_bytes(const NormedCall& call, int threads) {
    Arena arena(nullptr);
    Buffers(call, threads, arena);
    return arena.used();
  }

  static void run(const NormedCall& call, const NormedGradients& gradients, const Team& team) {
    Arena arena(call.workspace);
    const Buffers buffers(call, team.size, arena);
    NormedBackward(call, gradients, buffers, team).run();
  }

 private:
  Panels<T> input_panels() const { return {1, call.features, G * H}; }
  Panels<T> hidden_panels() const { return {1, P, G * H}; }
  Panels<T> projection_panels() const { return {1, H, P}; }

  void run() const {
    const auto pack = [&](const Panels<T>& panels, const void* from, T* to) {
      pack_rows(
          panels, [&](int64_t k) { return in(from) + k * panels.units; }, to,
          part(panels.count(), team.index, team.size));
    };
    if (gradients.d_x) pack(input_panels(), call.weights[kInput], buffers.x_panels);
    pack(hidden_panels(), call.weights[kHidden], buffers.h_panels);
    if (projected) pack(projection_panels(), call.projection, buffers.r_panels);
    if (team.index == 0) std::memset(buffers.zeros, 0, buffers.widest_state * sizeof(T));
    const Range mine = part(time.batch, team.index, team.size);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      std::memset(sums_of(b), 0, sums.stride() * sizeof(T));
    }
    this->begin(gradients.d_final[0], buffers.d_h, buffers.stride, P);
    if (kCell) this->begin(gradients.d_final[1], buffers.d_c, buffers.c_stride, H);
    team.sync();
    int half = 0;
    bool first = true;
    this->for_chunks(Product::kRowsPerBlock, !call.reverse, [&](Range steps) {
      const Range rows{time.first(steps.begin), time.first(steps.end)};
      this->for_steps(steps, !call.reverse, [&](int64_t t) { step(t, rows.begin); });
      if (gradients.d_x) gradient_of_input(rows);
      gradients_of_weights(rows, first, half);
      add_sums(first);
      first = false;
      team.sync();
    });
    this->end(buffers.d_h, buffers.stride, P, gradients.d_state[0]);
    if (kCell) this->end(buffers.d_c, buffers.c_stride, H, gradients.d_state[1]);
  }

  T* sums_of(int64_t b) const { return buffers.sums + b * sums.stride(); }
  // The gradient of a row's products, in a block whose rows begin with `first`.
  T* d_products(int64_t r, int64_t first) const {
    return buffers.d_products + (r - first) * buffers.wide;
  }

  void step(int64_t t, int64_t first_of_block) const {
    const int64_t first = time.first(t);
    const Range mine = this->samples(t);
    for (int64_t b = mine.begin; b < mine.end; ++b) add_output(b, first + b, first_of_block);
    if (projected) {
      team.sync();
      through_projection(t, first_of_block);
      team.sync();
    }
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      row(t, b, first + b, d_products(first + b, first_of_block));
    }
    team.sync();
    // On to the state before: what goes through the product.
    alignas(64) T block[kRowBlock * kMaxVectors * lanes];
    this->multiply(
        time.alive(t), hidden_panels(), buffers.h_panels,
        [&](int64_t b) { return d_products(first + b, first_of_block) + G * H; },
        [&](int64_t, int i, int64_t, int vectors) { return block + i * vectors * lanes; },
        [&](int64_t b, int64_t unit, int vectors, const T* found) {
          if (begins_anew(first + b)) return;
          T* const d_h = buffers.d_h + b * buffers.stride + unit;
          for (int v = 0; v < vectors; ++v) {
            (V::load(d_h + v * lanes) + V::load(found + v * lanes)).store(d_h + v * lanes);
          }
        });
    team.sync();
  }

  // The gradient of the output joins that of the state. Where the output is projected, the sum is
  // set aside: the state's begins anew, with what the product leaves.
  void add_output(int64_t b, int64_t r, int64_t first_of_block) const {
    T* const d_h = buffers.d_h + b * buffers.stride;
    T* const aside = buffers.d_output + (r - first_of_block) * P;
    for (int64_t k = 0; k < P; k += lanes) {
      const int there = P - k < lanes ? int(P - k) : lanes;
      V d = V::load(d_h + k);
      if (gradients.d_y) d = d + load_first(in(gradients.d_y) + r * P + k, there);
      if (projected) store_first(aside + k, d, there);
      (projected ? V(T(0)) : d).store(d_h + k);
    }
  }

  void through_projection(int64_t t, int64_t first_of_block) const {
    const int64_t first = time.first(t) - first_of_block;
    this->multiply(
        time.alive(t), projection_panels(), buffers.r_panels,
        [&](int64_t b) { return buffers.d_output + (first + b) * P; },
        [&](int64_t b, int, int64_t unit, int) {
          return buffers.d_m + b * buffers.c_stride + unit;
        },
        [](int64_t, int64_t, int, const T*) {});
  }

  void row(int64_t t, int64_t b, int64_t r, T* to) const {
    const T* const keep = kept(r);
    const T *const x_terms = keep + layout.x_at(), *const h_terms = keep + layout.h_at();
    const T *const cell = keep + layout.cell_at(), *const scales = keep + layout.scales_at();
    T* const d_h =
        projected ? buffers.d_m + b * buffers.c_stride : buffers.d_h + b * buffers.stride;
    T* const d_c = buffers.d_c + b * buffers.c_stride;
    T* const total = sums_of(b);
    const bool anew = begins_anew(r);
    const T* const before = state_before(kCell ? 1 : 0, t, b, r);  // of what the cell reads
    typename Norm<T>::Slope slope{};
    if constexpr (kCell) slope = through_output(keep, before, d_h, total);
    this->for_units([&](int64_t unit, int there) {
      V saved[Cell::saved], p[N + 1], d_p[N + 1], c(T(0));
      V was[Cell::states], d_state[Cell::states], d_x[G], d_u[G];
      this->load_parameters(unit, there, p);
      was[kCell] = load_first(before + unit, there);
      if constexpr (kCell) {
        for (int i = 0; i < Cell::saved; ++i) saved[i] = V::load(scratch_row(i) + unit);
        c = load_first(cell + unit, there);
        const V d_normed = V::load(scratch_row(kOfNormed) + unit);
        d_state[1] =
            V::load(d_c + unit) + slope.to_x(d_normed, V::load(scratch_row(kNormed) + unit));
        if (gradients.d_cells) {
          d_state[1] = d_state[1] + load_first(in(gradients.d_cells) + r * H + unit, there);
        }
        d_u[G - 1] = V::load(scratch_row(kOfGate) + unit);
      } else {
        gates(keep, unit, there, p, was[0], saved);
        d_state[0] = V::load(d_h + unit);
      }
      Cell::backward(saved, p, was, c, d_state, d_x, d_u, d_p);
      for (int i = 0; i < N; ++i) {
        add_to(total + sums.parameters() + i * H + unit, d_p[i], there);
      }
      for (int g = 0; g < G; ++g) {
        const int64_t k = g * H + unit;
        through_gain(kInput, k, d_x[g], x_terms, total, there, to);
        through_gain(kHidden, k, d_u[g], h_terms, total, there, to + G * H);
      }
      if constexpr (kCell) {
        store_first(d_c + unit, anew ? V(T(0)) : d_state[1], there);
        if (!projected) V(T(0)).store(d_h + unit);
      } else {
        store_first(d_h + unit, anew ? V(T(0)) : d_state[0], there);
      }
    });
    this->for_parts([&](int i, int64_t at, int64_t n) {
      Norm<T>::backward(to + at, x_terms + at, scales[i], n, to + at);
      T* const d_products_h = to + G * H + at;
      Norm<T>::backward(d_products_h, h_terms + at, scales[Cell::parts + i], n, d_products_h);
    });
  }

  T* scratch_row(int i) const { return scratch + i * buffers.c_stride; }

  // What the cell saved of some units, made again.
  FASTCELL_INLINE void gates(const T* keep, int64_t unit, int there, const V* p, V before,
                             V* saved) const {
    V x[G], u[G], state[Cell::states];
    this->terms_of(kInput, keep + layout.x_at(), unit, there, x);
    this->terms_of(kHidden, keep + layout.h_at(), unit, there, u);
    state[kCell] = before;
    Cell::forward(x, u, p, state, saved);
  }

  // Through the output gate and c's norm.
  FASTCELL_INLINE typename Norm<T>::Slope through_output(const T* keep, const T* before,
                                                         const T* d_h, T* total) const {
    const T *const cell = keep + layout.cell_at(), *const gain = in(call.cell_norm);
    const T* const of_c = keep + layout.scales_at() + 2 * Cell::parts;
    const typename Norm<T>::Moments moments{of_c[1], of_c[0]};
    T* const d_gain = total + sums.cell_norm();
    this->for_units([&](int64_t unit, int there) {
      V saved[Cell::saved], p[N + 1], d_u[G];
      this->load_parameters(unit, there, p);
      gates(keep, unit, there, p, load_first(before + unit, there), saved);
      for (int i = 0; i < Cell::saved; ++i) saved[i].store(scratch_row(i) + unit);
      const V normed = moments.normalise(load_first(cell + unit, there));
      const V d_n = Cell::backward_output(saved, this->normed_cell(normed, unit, there),
                                          V::load(d_h + unit), d_u);
      d_u[G - 1].store(scratch_row(kOfGate) + unit);
      normed.store(scratch_row(kNormed) + unit);
      (d_n * load_first(gain + unit, there)).store(scratch_row(kOfNormed) + unit);
      add_to(d_gain + unit, d_n * normed, there);
      add_to(d_gain + H + unit, d_n, there);
    });
    return Norm<T>::slope(scratch_row(kOfNormed), scratch_row(kNormed), of_c[0], H);
  }

  // d: of the gate's term at k. Leaves that of its normalised product in `to`.
  FASTCELL_INLINE void through_gain(int which, int64_t k, V d, const T* normed, T* total, int there,
                                    T* to) const {
    add_to(total + sums.gains(which) + k, d * load_first(normed + k, there), there);
    if (which == kInput || !Cell::joined) add_to(total + sums.biases(which) + k, d, there);
    store_first(to + k, d * load_first(in(call.gains[which]) + k, there), there);
  }

  static FASTCELL_INLINE void add_to(T* to, V value, int there) {
    store_first(to, load_first(to, there) + value, there);
  }

  // What came out of the step before, of a sample's state.
  const T* state_before(int state, int64_t t, int64_t b, int64_t r) const {
    if (begins_anew(r)) return zeros;
    const int64_t past = call.reverse ? t + 1 : t - 1;
    if (past >= 0 && past < time.steps && b < time.alive(past)) {
      const int64_t row = time.first(past) + b;
      return state == 0 ? in(call.y) + row * P : kept(row) + layout.cell_at();
    }
    return call.state[state] ? in(call.state[state]) + b * (state == 0 ? P : H) : zeros;
  }

  void gradient_of_input(Range rows) const {
    multiply_rows<T>(
        input_panels(), buffers.x_panels, rows,
        [&](int64_t r) { return d_products(r, rows.begin); },
        [&](int64_t r) { return out(gradients.d_x) + r * call.features; }, false, nullptr, team);
  }

  void gradients_of_weights(Range rows, bool begin, int& half) const {
    const auto x_row = [&](int64_t, int64_t, int64_t r) { return in(call.x) + r * call.features; };
    const auto h_row = [&](int64_t t, int64_t b, int64_t r) { return state_before(0, t, b, r); };
    const typename Product::template Features<decltype(x_row)> of_x{x_row, call.features};
    const typename Product::template Features<decltype(h_row)> of_h{h_row, P};
    const typename Product::Part parts[] = {
        {0, G * H, out(gradients.d_weights[kInput]), nullptr},
        {G * H, G * H, nullptr, out(gradients.d_weights[kHidden])}};
    Product::run(buffers.d_products, buffers.wide, time, rows, of_x, of_h, parts, begin, half,
                 buffers.product, team);
    if (!projected) return;
    const auto m_row = [&](int64_t, int64_t, int64_t r) { return kept(r) + layout.output_at(); };
    const typename Product::template Features<decltype(m_row)> of_m{m_row, H};
    const typename Product::Part projection[] = {{0, P, out(gradients.d_projection), nullptr}};
    Product::run(buffers.d_output, P, time, rows, of_m, of_h, projection, begin, half,
                 buffers.product, team);
  }

  // The samples' sums of a block to those of all, and back to zero.
  void add_sums(bool begin) const {
    const auto add = [&](int64_t at, int64_t count, void* to) {
      if (!to) return;
      const Range mine = part(count, team.index, team.size);
      for (int64_t k = mine.begin; k < mine.end; k += lanes) {
        const int there = mine.end - k < lanes ? int(mine.end - k) : lanes;
        V sum = begin ? V(T(0)) : load_first(out(to) + k, there);
        for (int64_t b = 0; b < time.batch; ++b) {
          sum = sum + load_first(sums_of(b) + at + k, there);
        }
        store_first(out(to) + k, sum, there);
      }
    };
    for (int which = 0; which < 2; ++which) {
      add(sums.gains(which), G * H, gradients.d_gains[which]);
      add(sums.biases(which), G * H, gradients.d_biases[which]);
    }
    if (kCell) add(sums.cell_norm(), 2 * H, gradients.d_cell_norm);
    if (N > 0) add(sums.parameters(), N * H, gradients.d_parameters);
    team.sync();
    const Range mine = part(time.batch, team.index, team.size);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      std::memset(sums_of(b), 0, sums.stride() * sizeof(T));
    }
  }
};

}  // namespace fastcell::FASTCELL_ISA
