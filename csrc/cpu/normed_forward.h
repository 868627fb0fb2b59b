// The forward pass of cells with layer normalisation.
#pragma once

#include "normed.h"

namespace fastcell::FASTCELL_ISA {

template <class T, template <class> class CellOf>
class NormedForward : NormedPass<T, CellOf> {
  using Pass = NormedPass<T, CellOf>;
  using Pass::call, Pass::time, Pass::team, Pass::H, Pass::P, Pass::projected;
  using Pass::G, Pass::kCell, Pass::kHidden, Pass::kInput, Pass::lanes;
  using Pass::in, Pass::out, Pass::begins_anew;
  using Pass::layout, Pass::zeros;
  using typename Pass::Cell;
  using typename Pass::V;

  struct Buffers {
    T *x_panels, *h_panels, *r_panels;
    T *h, *c;   // (B, padded): states
    T* m;       // (B, padded H): what the projection takes
    T* sums;    // (B, padded G*H)
    T* terms;   // (rows of a chunk, G*H), where nothing is kept: the input's normalised product
    T* values;  // per thread: what the cell saves of a row
    T* zeros;
    int64_t stride, c_stride, wide, chunk_rows;

    Buffers(const NormedCall& call, int threads, Arena& arena) {
      const int64_t H = call.hidden, P = call.output, batch = call.time.batch;
      const bool projected = call.projection != nullptr;
      stride = padded_row<T>(P);
      c_stride = padded_row<T>(H);
      wide = padded_row<T>(G * H);
      // Enough rows for the product with the input's weights, few enough to stay in a core's cache.
      chunk_rows = threads * kRowBlock > 256 ? threads * kRowBlock : 256;
      const int64_t rows = chunk_rows > batch ? chunk_rows : batch;
      x_panels = arena.take<T>(Panels<T>{1, G * H, call.features}.size());
      h_panels = arena.take<T>(Panels<T>{1, G * H, P}.size());
      r_panels = arena.take<T>(projected ? Panels<T>{1, P, H}.size() : 0);
      h = arena.take<T>(batch * stride);
      c = arena.take<T>(kCell ? batch * c_stride : 0);
      m = arena.take<T>(projected ? batch * c_stride : 0);
      sums = arena.take<T>(batch * wide);
      terms =
          arena.take<T>(call.kept ? 0 : (rows < call.time.rows ? rows : call.time.rows) * G * H);
      values = arena.take<T>(kCell ? threads * Cell::saved * c_stride : 0);
      zeros = arena.take<T>(stride);
    }
  };

  const Buffers& buffers;

  NormedForward(const NormedCall& call, const Buffers& buffers, const Team& team)
      : Pass(call, buffers.zeros, team), buffers(buffers) {}

 public:
  static int64_t workspace_bytes(const NormedCall& call, int threads) {
    Arena arena(nullptr);
    Buffers(call, threads, arena);
    return arena.used();
  }

  static void run(const NormedCall& call, const Team& team) {
    Arena arena(call.workspace);
    const Buffers buffers(call, team.size, arena);
    NormedForward(call, buffers, team).run();
  }

 private:
  Panels<T> input_panels() const { return {1, G * H, call.features}; }
  Panels<T> hidden_panels() const { return {1, G * H, P}; }
  Panels<T> projection_panels() const { return {1, P, H}; }

  void run() const {
    const auto pack = [&](const Panels<T>& panels, const void* from, T* to) {
      pack_transposed(panels, in(from), to, part(panels.count(), team.index, team.size), 0);
    };
    pack(input_panels(), call.weights[kInput], buffers.x_panels);
    pack(hidden_panels(), call.weights[kHidden], buffers.h_panels);
    if (projected) pack(projection_panels(), call.projection, buffers.r_panels);
    if (team.index == 0) std::memset(buffers.zeros, 0, buffers.stride * sizeof(T));
    this->begin(call.state[0], buffers.h, buffers.stride, P);
    if (kCell) this->begin(call.state[1], buffers.c, buffers.c_stride, H);
    team.sync();
    this->for_chunks(buffers.chunk_rows, call.reverse, [&](Range steps) {
      const Range rows{time.first(steps.begin), time.first(steps.end)};
      input_terms(rows);
      this->for_steps(steps, call.reverse, [&](int64_t t) { step(t, rows.begin); });
    });
    this->end(buffers.h, buffers.stride, P, call.final_state[0]);
    if (kCell) this->end(buffers.c, buffers.c_stride, H, call.final_state[1]);
  }

  // Of row r, in a chunk whose rows begin with `first`.
  T* terms(int64_t r, int64_t first) const {
    return call.kept ? this->kept(r) + layout.x_at() : buffers.terms + (r - first) * G * H;
  }

  void input_terms(Range rows) const {
    multiply_rows<T>(
        input_panels(), buffers.x_panels, rows,
        [&](int64_t r) { return in(call.x) + r * call.features; },
        [&](int64_t r) { return terms(r, rows.begin); }, false, nullptr, team);
    team.sync();
    const Range mine = part(rows.end - rows.begin, team.index, team.size);
    for (int64_t r = rows.begin + mine.begin; r < rows.begin + mine.end; ++r) {
      T* const x = terms(r, rows.begin);
      T* const scales = call.kept ? this->kept(r) + layout.scales_at() : nullptr;
      this->for_parts([&](int i, int64_t at, int64_t n) {
        const T scale = Norm<T>::forward(x + at, n);
        if (scales) scales[i] = scale;
      });
    }
    team.sync();
  }

  void step(int64_t t, int64_t first_of_chunk) const {
    const int64_t first = time.first(t);
    this->multiply(
        time.alive(t), hidden_panels(), buffers.h_panels,
        [&](int64_t b) { return begins_anew(first + b) ? zeros : buffers.h + b * buffers.stride; },
        [&](int64_t b, int, int64_t unit, int) { return buffers.sums + b * buffers.wide + unit; },
        [](int64_t, int64_t, int, const T*) {});
    team.sync();
    const Range mine = this->samples(t);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      row(b, first + b, terms(first + b, first_of_chunk), buffers.sums + b * buffers.wide);
    }
    team.sync();
    if (projected) project(t);
  }

  // h of all samples from what the cell has made.
  void project(int64_t t) const {
    const int64_t first = time.first(t);
    this->multiply(
        time.alive(t), projection_panels(), buffers.r_panels,
        [&](int64_t b) { return buffers.m + b * buffers.c_stride; },
        [&](int64_t b, int, int64_t unit, int) { return buffers.h + b * buffers.stride + unit; },
        [&](int64_t b, int64_t unit, int vectors, const T* h) {
          const int64_t there = P - unit < vectors * lanes ? P - unit : vectors * lanes;
          std::memcpy(out(call.y) + (first + b) * P + unit, h, there * sizeof(T));
        });
    team.sync();
  }

  void row(int64_t b, int64_t r, const T* x_terms, const T* u) const {
    T* const keep = call.kept ? this->kept(r) : nullptr;
    T* const scales = keep ? keep + layout.scales_at() : nullptr;
    typename Norm<T>::Moments moments[G];  // of each gate's part
    this->for_parts([&](int i, int64_t at, int64_t n) {
      const auto found = Norm<T>::of(u + at, n);
      for (int g = int(at / H); g < int((at + n) / H); ++g) moments[g] = found;
      if (scales) scales[Cell::parts + i] = found.scale;
    });
    // (Where the output is projected, the cell's h is not the state before: it is not read.)
    T* const h = projected ? buffers.m + b * buffers.c_stride : buffers.h + b * buffers.stride;
    T* const c = buffers.c + b * buffers.c_stride;
    T* const values = buffers.values + team.index * Cell::saved * buffers.c_stride;
    const bool anew = begins_anew(r);
    this->for_units([&](int64_t unit, int there) {
      V x[G], v[G], p[Cell::parameters + 1], state[Cell::states], saved[Cell::saved];
      this->terms_of(kInput, x_terms, unit, there, x);
      for (int g = 0; g < G; ++g) {
        const int64_t k = g * H + unit;
        const V normed = moments[g].normalise(load_first(u + k, there));
        if (keep) store_first(keep + layout.h_at() + k, normed, there);
        v[g] = this->term(kHidden, k, normed, there);
      }
      this->load_parameters(unit, there, p);
      T* const row = kCell ? c : h;
      state[kCell] = anew ? V(T(0)) : V::load(row + unit);
      Cell::forward(x, v, p, state, saved);
      if constexpr (kCell) {
        for (int i = 0; i < Cell::saved; ++i) saved[i].store(values + i * buffers.c_stride + unit);
        store_first(c + unit, state[1], there);
        if (keep) store_first(keep + layout.cell_at() + unit, state[1], there);
      } else {
        store_output(r, keep, h, unit, state[0], there);
      }
    });
    if constexpr (kCell) {
      const auto m = Norm<T>::of(c, H);
      if (scales) {
        scales[2 * Cell::parts] = m.scale;
        scales[2 * Cell::parts + 1] = m.mean;
      }
      this->for_units([&](int64_t unit, int there) {
        V saved[Cell::saved];
        for (int i = 0; i < Cell::saved; ++i) {
          saved[i] = V::load(values + i * buffers.c_stride + unit);
        }
        const V n = this->normed_cell(m.normalise(load_first(c + unit, there)), unit, there);
        store_output(r, keep, h, unit, Cell::output(saved, n), there);
      });
    }
  }

  FASTCELL_INLINE void store_output(int64_t r, T* keep, T* h, int64_t unit, V value,
                                    int there) const {
    store_first(h + unit, value, there);
    if (!projected) {
      store_first(out(call.y) + r * H + unit, value, there);
    } else if (keep) {
      store_first(keep + layout.output_at() + unit, value, there);
    }
  }
};

}  // namespace fastcell::FASTCELL_ISA
