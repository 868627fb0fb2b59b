// The engine of cells with layer normalisation.
//
// A norm needs a sample's sums of all units before any of them goes on. So a step has two parts,
// with a barrier behind each: the product, for which threads share out the weights' panels, so that
// each is read once; then norms and the cell's maths, for which they share out the samples. The
// input's product and its norm are those of many steps at once, before them.
#pragma once

#include "../common/normed.h"
#include "norm.h"
#include "products.h"

namespace fastcell::FASTCELL_ISA {

// What is kept of a row: normalised products of the input and of h, for the LSTM c, what a
// projection takes, then the norms' scales and the mean of c. Whole vectors, so that rows begin
// where vectors do. Gates are made again from these: that takes less time than their way to memory
// and back.
template <class Cell, int lanes>
struct NormedLayout {
  static constexpr bool kCell = Cell::states > 1;
  int64_t hidden;
  bool projected;

  static constexpr int64_t x_at() { return 0; }
  int64_t h_at() const { return Cell::gates * hidden; }
  int64_t cell_at() const { return 2 * Cell::gates * hidden; }
  int64_t output_at() const { return cell_at() + (kCell ? hidden : 0); }
  int64_t scales_at() const { return output_at() + (projected ? hidden : 0); }
  int64_t elements() const {
    return (scales_at() + 2 * Cell::parts + (kCell ? 2 : 0) + lanes - 1) / lanes * lanes;
  }
};

// What both passes share: one thread's view of a call.
template <class T, template <class> class CellOf>
struct NormedPass {
  using V = Vec<T>;
  using Cell = CellOf<V>;
  static constexpr int G = Cell::gates;
  static constexpr int lanes = V::lanes;
  static constexpr bool kCell = Cell::states > 1;
  static constexpr int kInput = 0, kHidden = 1;  // of weights, gains and biases
  using Layout = NormedLayout<Cell, lanes>;

  const NormedCall& call;
  const Timeline& time;
  const Team& team;
  const int64_t H, P;
  const bool projected;
  const Layout layout;
  const T* const zeros;

  NormedPass(const NormedCall& call, const T* zeros, const Team& team)
      : call(call),
        time(call.time),
        team(team),
        H(call.hidden),
        P(call.output),
        projected(call.projection != nullptr),
        layout{call.hidden, call.projection != nullptr},
        zeros(zeros) {}

  static const T* in(const void* p) { return static_cast<const T*>(p); }
  static T* out(void* p) { return static_cast<T*>(p); }
  bool begins_anew(int64_t r) const { return call.reset && call.reset[r]; }
  T* kept(int64_t r) const { return out(call.kept) + r * layout.elements(); }

  // Calls f(steps) for pieces of the sequence of about `rows` rows, in their order or backwards.
  template <class F>
  FASTCELL_INLINE void for_chunks(int64_t rows, bool from_the_end, F f) const {
    const int64_t each = time.batch < rows ? rows / (time.batch > 0 ? time.batch : 1) : 1;
    const int64_t count = (time.steps + each - 1) / each;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (from_the_end ? count - 1 - i : i) * each;
      f(Range{t, t + each < time.steps ? t + each : time.steps});
    }
  }

  // Calls f(t) for the steps in their order or backwards.
  template <class F>
  FASTCELL_INLINE static void for_steps(Range steps, bool from_the_end, F f) {
    for (int64_t i = 0; i < steps.end - steps.begin; ++i) {
      f(from_the_end ? steps.end - 1 - i : steps.begin + i);
    }
  }

  // Calls f(unit, lanes there) for vectors of units.
  template <class F>
  FASTCELL_INLINE void for_units(F f) const {
    for (int64_t unit = 0; unit < H; unit += lanes) {
      f(unit, H - unit < lanes ? int(H - unit) : lanes);
    }
  }

  // Calls f(part, first element, elements) for the parts that are normalised apart.
  template <class F>
  FASTCELL_INLINE void for_parts(F f) const {
    int64_t at = 0;
    for (int i = 0; i < Cell::parts; ++i) {
      f(i, at, Cell::part_gates[i] * H);
      at += Cell::part_gates[i] * H;
    }
  }

  // Which samples of step t are this thread's, in the second part of a step.
  Range samples(int64_t t) const { return part(time.alive(t), team.index, team.size); }

  // to(b) = row(b) times this thread's panels, for the samples [0, count); `then(b, unit, vectors,
  // sums)` for each of them.
  template <class Row, class To, class Then>
  void multiply(int64_t count, const Panels<T>& panels, const T* packed, Row row, To to,
                Then then) const {
    alignas(64) T nothing[kMaxVectors * lanes] = {};
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
        multiply_panel<Plain<T>>(a, c, n, packed + panels.offset(p), vectors, panels.depth, lanes,
                                 nothing);
        for (int i = 0; i < n; ++i) then(b + i, unit, vectors, c[i]);
      }
    }
  }

  // Rows of a state, from what the caller gave or zero, and back.
  void begin(const void* given, T* rows, int64_t stride, int64_t width) const {
    const Range mine = part(time.batch, team.index, team.size);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      std::memset(rows + b * stride, 0, stride * sizeof(T));
      if (given) std::memcpy(rows + b * stride, in(given) + b * width, width * sizeof(T));
    }
  }
  void end(const T* rows, int64_t stride, int64_t width, void* to) const {
    if (!to) return;
    const Range mine = part(time.batch, team.index, team.size);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      std::memcpy(out(to) + b * width, rows + b * stride, width * sizeof(T));
    }
  }

  // The cell's vectors, of these units.
  FASTCELL_INLINE void load_parameters(int64_t unit, int there, V* p) const {
    for (int i = 0; i < Cell::parameters; ++i) {
      p[i] = load_first(in(call.parameters) + i * H + unit, there);
    }
  }

  // What the output gate is applied to: c after its norm, gain and bias.
  FASTCELL_INLINE V normed_cell(V normed, int64_t unit, int there) const {
    const T* const norm = in(call.cell_norm);
    return fma(load_first(norm + unit, there), normed, load_first(norm + H + unit, there));
  }

  // The gates' terms of some units: their normalised products with gains and biases.
  FASTCELL_INLINE void terms_of(int which, const T* normed, int64_t unit, int there, V* to) const {
    for (int g = 0; g < G; ++g) {
      to[g] = term(which, g * H + unit, load_first(normed + g * H + unit, there), there);
    }
  }
  FASTCELL_INLINE V term(int which, int64_t k, V normed, int there) const {
    const T *const gain = in(call.gains[which]), *const bias = in(call.biases[which]);
    return fma(load_first(gain + k, there), normed, bias ? load_first(bias + k, there) : V(T(0)));
  }
};

}  // namespace fastcell::FASTCELL_ISA
