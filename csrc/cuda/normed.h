// Layers with layer normalisation, a step in two launches: the product with the recurrent weights,
// then norms and the cell's maths, one block per sample. A norm needs the sums of all units, which
// blocks that share the units do not have. A projection is a product, and so a launch, more.
#pragma once

#include "forward.h"
#include "normed_step.h"

namespace fastcell::cuda {

// A tile of operands by a packed matrix of p.hidden columns: f(sample, column, sum).
template <class P, class F>
FASTCELL_INLINE void multiply_tile(const Sweep& p, const F& f) {
  const Block<P, Step, 1> block(p);
  block.multiply(0);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    int row, unit;
    const bool inside = block.pair(i, row, unit);
    const Index sample = block.first_sample + row, column = block.first_unit + unit;
    if (!inside || sample >= p.batch || column >= p.hidden) continue;
    typename P::Real sum[1];
    block.gather(row, unit, sum);
    f(sample, column, sum[0]);
  }
}

template <class P>
FASTCELL_KERNEL normed_product(const FASTCELL_KERNEL_PARAMETER NormedProduct p) {
  using R = typename P::Real;
  R* const to = static_cast<R*>(p.step.sums);
  multiply_tile<P>(p.product, [&](Index sample, Index column, R sum) {
    to[sample * p.product.hidden + column] = sum;
  });
}

// Whether a sample has step t, which `alive` samples may have.
FASTCELL_INLINE bool has_step(const NormedStep& p, Index sample, Index alive, Index t) {
  return sample < alive && (!p.lengths || t < p.lengths[sample]);
}

// Forward, with a projection: h of what the cell made.
template <class P>
FASTCELL_KERNEL normed_project(const FASTCELL_KERNEL_PARAMETER NormedProduct p) {
  using R = typename P::Real;
  using E = typename P::Element;
  const NormedStep& step = p.step;
  R* const h = static_cast<R*>(step.carry[0]);
  E *const y = static_cast<E*>(step.y), *const operand = static_cast<E*>(step.operand);
  multiply_tile<P>(p.product, [&](Index sample, Index k, R sum) {
    E& stored = y[(step.first + sample) * step.output + k];
    if (!has_step(step, sample, step.alive, step.t)) {
      stored = E{};
      return;
    }
    h[sample * step.output + k] = sum;
    narrow(sum, stored);
    Operand<P>::from(sum, operand[sample * step.width + k]);
  });
}

// Backward, with a projection: h's gradient, of which the step after has made its part. Steps that
// a sample does not have hand it on.
template <class P>
FASTCELL_KERNEL normed_collect(const FASTCELL_KERNEL_PARAMETER NormedProduct p) {
  using R = typename P::Real;
  using E = typename P::Element;
  const NormedStep& step = p.step;
  R* const d_h = static_cast<R*>(step.carry[0]);
  const E* const d_y = static_cast<const E*>(step.d_y);
  E *const d_output = static_cast<E*>(step.d_output), *const to = static_cast<E*>(step.projected);
  multiply_tile<P>(p.product, [&](Index sample, Index k, R sum) {
    const Index row = (step.first + sample) * step.output + k;
    R& carried = d_h[sample * step.output + k];
    R d = carried + sum;  // (0 where no step after has made one)
    E stored{}, operand{};
    if (has_step(step, sample, step.alive, step.t)) {
      if (d_y) d = d + widen(d_y[row]);
      narrow(d, stored);
      Operand<P>::from(d, operand);
      d = R(0);
    }
    carried = d;
    to[sample * step.projected_width + k] = operand;
    if (sample < step.alive) d_output[row] = stored;
  });
}

// Each v summed over the threads of the block, always in the same order.
template <class R, int N>
FASTCELL_INLINE void add_across_block(R (&v)[N]) {
  static_assert(N <= kMaxSums, "");
  R* const each = reinterpret_cast<R*>(shared_memory());
  R* const rows = each + N * kThreads;
#pragma unroll
  for (int n = 0; n < N; ++n) each[n * kThreads + thread()] = v[n];
  block_barrier();
  if (thread() < N * kSumRows) {
    const R* const own = each + thread() / kSumRows * kThreads + thread() % kSumRows;
    R sum = own[0];
#pragma unroll
    for (int i = 1; i < kThreads / kSumRows; ++i) sum = sum + own[i * kSumRows];
    rows[thread()] = sum;
  }
  block_barrier();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    v[n] = rows[n * kSumRows];
#pragma unroll
    for (int i = 1; i < kSumRows; ++i) v[n] = v[n] + rows[n * kSumRows + i];
  }
}

// Which gates are normalised together.
template <class C>
struct Parts {
  int of[C::gates];     // of each gate
  int gates[C::parts];  // how many each has
};
template <class C>
constexpr FASTCELL_INLINE Parts<C> parts_of() {
  Parts<C> parts{};
  int gate = 0;
  for (int i = 0; i < C::parts; ++i) {
    parts.gates[i] = C::part_gates[i];
    for (int k = 0; k < C::part_gates[i]; ++k) parts.of[gate++] = i;
  }
  return parts;
}

// One sample at one step.
template <class P, template <class> class CellOf>
struct Normed {
  using R = typename P::Real;
  using E = typename P::Element;
  using V = Scalar<R>;
  using C = CellOf<V>;
  static constexpr int G = C::gates;
  static constexpr bool kCell = C::states > 1;
  static constexpr int kNorms = C::parts + (kCell ? 1 : 0);
  static constexpr int N = C::parameters;

  const NormedStep& p;
  const Index H, sample, row;  // `row`, as `exists`: of the step
  const bool exists, anew;

  explicit FASTCELL_INLINE Normed(const NormedStep& step)
      : p(step),
        H(step.hidden),
        sample(block(0)),
        row(step.first + sample),
        exists(has_step(step, sample, step.alive, step.t)),
        anew(exists && step.reset && step.reset[row]) {}

  // This row, or this sample's, of a tensor of `width` numbers each.
  template <class T>
  static FASTCELL_INLINE T* at(void* base, Index index, Index width) {
    return base ? static_cast<T*>(base) + index * width : nullptr;
  }
  template <class T>
  static FASTCELL_INLINE const T* at(const void* base, Index index, Index width) {
    return base ? static_cast<const T*>(base) + index * width : nullptr;
  }
  FASTCELL_INLINE R* cells() const { return at<R>(p.cells, row, H); }
  FASTCELL_INLINE R* normed_cells() const { return at<R>(p.cells, p.all_rows + row, H); }
  // What the output gate is applied to: c after its norm, gain and bias.
  FASTCELL_INLINE V cell_norm(Index unit, R normed) const {
    const R* const norm = static_cast<const R*>(p.cell_norm);
    return V(fma_of(norm[unit], normed, norm[H + unit]));
  }

  FASTCELL_INLINE void load_parameters(Index unit, V (&own)[N + 1]) const {
    const R* const from = static_cast<const R*>(p.parameters);
#pragma unroll
    for (int i = 0; i < N; ++i) own[i] = V(from[i * H + unit]);
  }

  // Every thread has the same units in every loop, and so waits for nobody's writes but its own.
  template <class F>
  FASTCELL_INLINE void for_units(const F& f) const {
#pragma unroll 1
    for (Index unit = thread(); unit < H; unit += kThreads) f(unit);
  }
  template <class T>
  static FASTCELL_INLINE void copy_or_clear(T* to, const T* from, Index width) {
#pragma unroll 1
    for (Index i = thread(); i < width; i += kThreads) to[i] = from ? from[i] : T{};
  }
  template <class T>
  static FASTCELL_INLINE void clear(T* to, Index width) {
    if (to) copy_or_clear<T>(to, nullptr, width);
  }

  // For the product that takes this `operand`.
  FASTCELL_INLINE void publish(void* operand, Index width, Index k, R value) const {
    E* const to = at<E>(operand, sample, width) + k;
    if constexpr (sizeof(E) == sizeof(float)) {
      if (p.tf32) {
        Operand<Tf32>::from(value, *to);
        return;
      }
    }
    narrow(value, *to);
  }

  // From sums of the squared distances from the mean.
  static FASTCELL_INLINE R scale_of(R squares, Index count) {
    return R(1) / sqrt_of(squares / R(count) + R(1e-5));
  }

  FASTCELL_INLINE void forward() const {
    E* const y = p.projected ? nullptr : at<E>(p.y, row, H);
    R* const normed = at<R>(p.normed, row, G * H);
    if (!exists) {  // what is not there counts for nothing in the weights' gradients
      clear(y, H);
      clear(normed, G * H);
      if (kCell && p.cells) {
        clear(cells(), H);
        clear(normed_cells(), H);
      }
      return;
    }
    constexpr Parts<C> kParts = parts_of<C>();
    R* const u = at<R>(p.sums, sample, G * H);
    R* const scales = at<R>(p.scales, row, kNorms);
    const auto sum = [&](Index k) { return anew ? R(0) : u[k]; };

    R mean[C::parts] = {}, scale[C::parts] = {};
    for_units([&](Index unit) {
#pragma unroll
      for (int g = 0; g < G; ++g) mean[kParts.of[g]] = mean[kParts.of[g]] + sum(g * H + unit);
    });
    add_across_block(mean);
#pragma unroll
    for (int i = 0; i < C::parts; ++i) mean[i] = mean[i] / R(kParts.gates[i] * H);
    for_units([&](Index unit) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const R d = sum(g * H + unit) - mean[kParts.of[g]];
        scale[kParts.of[g]] = fma_of(d, d, scale[kParts.of[g]]);
      }
    });
    add_across_block(scale);
#pragma unroll
    for (int i = 0; i < C::parts; ++i) {
      scale[i] = scale_of(scale[i], kParts.gates[i] * H);
      if (scales && thread() == 0) scales[i] = scale[i];
    }

    const R* const terms = at<R>(p.terms, row, G * H);
    const R* const gain = static_cast<const R*>(p.gain);
    const R* const bias = static_cast<const R*>(p.bias);
    R *const h = at<R>(p.carry[0], sample, p.output), *const c = at<R>(p.carry[1], sample, H);
    R* const gates = at<R>(p.gates, row, C::saved * H);
    R* const kept_c = cells();
    const auto finish = [&](Index unit, V value) {
      if (kCell && p.projected) {
        publish(p.projected, p.projected_width, unit, value.v);
        return;
      }
      h[unit] = value.v;
      narrow(value.v, y[unit]);
      publish(p.operand, p.width, unit, value.v);
    };
    R cell_mean[1] = {};
    for_units([&](Index unit) {
      V x[G], v[G], own[N + 1], state[2] = {V(0), V(0)}, saved[C::saved];
      load_parameters(unit, own);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const Index k = g * H + unit;
        const R one = (sum(k) - mean[kParts.of[g]]) * scale[kParts.of[g]];
        if (normed) normed[k] = one;
        x[g] = V(terms[k]);
        v[g] = V(fma_of(gain[k], one, bias ? bias[k] : R(0)));
      }
      if (!anew) state[kCell] = V((kCell ? c : h)[unit]);
      C::forward(x, v, own, state, saved);
      if (gates) {
#pragma unroll
        for (int i = 0; i < C::saved; ++i) gates[i * H + unit] = saved[i].v;
      }
      if constexpr (kCell) {
        c[unit] = state[1].v;
        if (kept_c) kept_c[unit] = state[1].v;
        cell_mean[0] = cell_mean[0] + state[1].v;
        u[(G - 1) * H + unit] = saved[G - 1].v;  // the output gate, until c is normalised
      } else {
        finish(unit, state[0]);
      }
    });
    if constexpr (kCell) {
      R* const normed_c = normed_cells();
      add_across_block(cell_mean);
      const R middle = cell_mean[0] / R(H);
      R cell_scale[1] = {};
      for_units([&](Index unit) {
        const R d = c[unit] - middle;
        cell_scale[0] = fma_of(d, d, cell_scale[0]);
      });
      add_across_block(cell_scale);
      const R by = scale_of(cell_scale[0], H);
      if (scales && thread() == 0) scales[C::parts] = by;
      for_units([&](Index unit) {
        const R one = (c[unit] - middle) * by;
        if (normed_c) normed_c[unit] = one;
        V saved[C::saved] = {};
        saved[G - 1] = V(u[(G - 1) * H + unit]);
        finish(unit, C::output(saved, cell_norm(unit, one)));
      });
    }
  }

  FASTCELL_INLINE void backward() const {
    const bool projected = kCell && p.projected;
    R *const d_h = at<R>(p.carry[0], sample, p.output), *const d_c = at<R>(p.carry[1], sample, H);
    // What the step after this one adds to h's gradient.
    const R* const later = !projected && sample < p.fed ? at<R>(p.sums, sample, H) : nullptr;
    if (!exists) {  // a step that a sample does not have hands its gradient on
      if (later) for_units([&](Index unit) { d_h[unit] = d_h[unit] + later[unit]; });
      clear(at<E>(p.operand, sample, p.width), G * H);
      if (sample >= p.alive) return;  // nor has it a row
      clear(at<R>(p.d_terms, row, G * H), G * H);
      clear(at<R>(p.d_normed, row, G * H), G * H);
      clear(at<E>(p.d_sums, row, G * H), G * H);
      clear(at<E>(p.before, row, p.output), p.output);
      clear(at<E>(p.cell_output, row, H), H);
      if (kCell) clear(at<R>(p.d_cell, row, H), H);
      clear(at<R>(p.d_parameters, row, N * H), N * H);
      return;
    }
    constexpr Parts<C> kParts = parts_of<C>();
    const R* const normed = at<R>(p.normed, row, G * H);
    const R* const gates = at<R>(p.gates, row, C::saved * H);
    const R* const scales = at<R>(p.scales, row, kNorms);
    const R* const normed_c = normed_cells();
    const R* const gain = static_cast<const R*>(p.gain);
    const R* const cell_gain = static_cast<const R*>(p.cell_norm);
    const E* const d_y = at<E>(p.d_y, row, H);
    R* const d_terms = at<R>(p.d_terms, row, G * H);
    R* const d_normed = at<R>(p.d_normed, row, G * H);
    R* const d_n = at<R>(p.d_cell, row, H);
    R* const d_parameters = at<R>(p.d_parameters, row, N * H);
    const R* const cell = cells();
    const R* const d_cells = at<R>(p.d_cells, row, H);
    const R* const d_projected = projected ? at<R>(p.sums, sample, H) : nullptr;
    E* const cell_output = at<E>(p.cell_output, row, H);
    const auto d_output = [&](Index unit) {
      if (projected) return d_projected[unit];
      R d = d_h[unit];
      if (later) d = d + later[unit];
      return d_y ? d + widen(d_y[unit]) : d;
    };
    const auto load_saved = [&](Index unit, V(&saved)[C::saved]) {
#pragma unroll
      for (int i = 0; i < C::saved; ++i) saved[i] = V(gates[i * H + unit]);
    };

    R through[2] = {};  // c's norm: means of the gradient, and of it along the normalised numbers
    if constexpr (kCell) {
      for_units([&](Index unit) {
        V saved[C::saved], d_u[G];
        load_saved(unit, saved);
        const V n = cell_norm(unit, normed_c[unit]);
        if (projected) narrow(C::output(saved, n).v, cell_output[unit]);
        d_n[unit] = C::backward_output(saved, n, V(d_output(unit)), d_u).v;
        d_normed[(G - 1) * H + unit] = d_u[G - 1].v;
        const R d = d_n[unit] * cell_gain[unit];
        through[0] = through[0] + d;
        through[1] = fma_of(d, normed_c[unit], through[1]);
      });
      add_across_block(through);
      through[0] = through[0] / R(H);
      through[1] = through[1] / R(H);
    }

    // The states before the step.
    const bool begun = has_step(p, sample, p.past_alive, p.past_t);
    const Index past = p.past_first + sample;
    const E* past_h = begun ? at<E>(p.y, past, p.output) : at<E>(p.state[0], sample, p.output);
    const R* past_c = begun ? at<R>(p.cells, past, H) : at<R>(p.state[1], sample, H);
    if (anew) past_h = nullptr, past_c = nullptr;
    E* const before_h = at<E>(p.before, row, p.output);
    copy_or_clear(before_h, past_h, p.output);
    R sums[2 * C::parts] = {};  // of the recurrent terms' norms, likewise
    for_units([&](Index unit) {
      V saved[C::saved], before[2], d_state[2], d_x[G], d_u[G], own[N + 1], d_own[N + 1], c(0);
      load_saved(unit, saved);
      load_parameters(unit, own);
      if constexpr (kCell) {
        const R d = d_n[unit] * cell_gain[unit];
        const R d_cell = (d - through[0] - normed_c[unit] * through[1]) * scales[C::parts];
        before[0] = V(0);
        before[1] = V(past_c ? past_c[unit] : R(0));
        c = V(cell[unit]);
        d_state[0] = V(0);
        d_state[1] = V(d_c[unit] + d_cell + (d_cells ? d_cells[unit] : R(0)));
        d_u[G - 1] = V(d_normed[(G - 1) * H + unit]);
      } else {
        before[0] = V(widen(before_h[unit]));
        d_state[0] = V(d_output(unit));
      }
      C::backward(saved, own, before, c, d_state, d_x, d_u, d_own);
#pragma unroll
      for (int i = 0; i < N; ++i) d_parameters[i * H + unit] = d_own[i].v;
      if (!projected) d_h[unit] = kCell || anew ? R(0) : d_state[0].v;
      if constexpr (kCell) d_c[unit] = anew ? R(0) : d_state[1].v;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const Index k = g * H + unit;
        const int i = kParts.of[g];
        d_terms[k] = d_x[g].v;
        d_normed[k] = d_u[g].v;
        const R d = d_u[g].v * gain[k];
        sums[2 * i] = sums[2 * i] + d;
        sums[2 * i + 1] = fma_of(d, normed[k], sums[2 * i + 1]);
      }
    });
    add_across_block(sums);
#pragma unroll
    for (int i = 0; i < 2 * C::parts; ++i) sums[i] = sums[i] / R(kParts.gates[i / 2] * H);

    E* const d_sums = at<E>(p.d_sums, row, G * H);
    for_units([&](Index unit) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const Index k = g * H + unit;
        const int i = kParts.of[g];
        const R d = d_normed[k] * gain[k] - sums[2 * i] - normed[k] * sums[2 * i + 1];
        narrow(d * scales[i], d_sums[k]);
        // What was reset has no gradient.
        publish(p.operand, p.width, k, anew ? R(0) : d * scales[i]);
      }
    });
  }
};

template <class P, template <class> class CellOf>
FASTCELL_KERNEL normed_forward(const FASTCELL_KERNEL_PARAMETER NormedStep p) {
  Normed<P, CellOf>(p).forward();
}

template <class P, template <class> class CellOf>
FASTCELL_KERNEL normed_backward(const FASTCELL_KERNEL_PARAMETER NormedStep p) {
  Normed<P, CellOf>(p).backward();
}

}  // namespace fastcell::cuda
