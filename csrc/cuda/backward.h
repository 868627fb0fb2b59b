// Backpropagation through time: steps of one layer, both directions at once. Gradients of inputs
// and weights are products over the whole sequence, made after it.
#pragma once

#include "forward.h"

namespace fastcell::cuda {

template <class P, template <class> class Cell, class Place>
FASTCELL_KERNEL backward(const FASTCELL_KERNEL_PARAMETER Sweep p) {
  using R = typename P::Real;
  using E = typename P::Element;
  using V = Scalar<R>;
  using C = Cell<V>;
  constexpr int kGates = C::gates, kApart = C::apart, kSaved = C::saved > 0 ? C::saved : 1;
  constexpr bool kSecond = C::second > 0;  // whose product goes the way of the projection's
  constexpr int kFirst = kGates - C::second;
  using Work = Block<P, Place, 1>;

  Work block(p);
  const Side& side = block.side;
  const bool projected = C::states > 1 && p.projected_width != 0;
  const Index y_stride = Index(p.directions) * p.output;
  const E* const y = static_cast<const E*>(p.y) + block.direction * p.output;
  const E* const d_y = p.d_y ? static_cast<const E*>(p.d_y) + block.direction * p.output : nullptr;
  const R* const gates = static_cast<const R*>(side.gates);
  const R* const cells = static_cast<const R*>(side.cells);
  const R* const d_cells = static_cast<const R*>(side.d_cells);
  E* const d_gates = static_cast<E*>(side.d_gates);
  constexpr int kColumns = kGates + kApart + C::parameters;
  const int d_stride = kColumns * p.hidden;
  const auto time = [&](Index s) { return block.direction ? s : p.steps - 1 - s; };

  struct Ahead {
    R saved[kSaved], d_y, c_before, c_after, h_before, h_after;
    bool anew;  // whether the step began with zeros
  };
  Pair<R> pairs[kPairs];  // h and c: gradients that are on their way
  Ahead ahead[kPairs];
  const auto look_ahead = [&](Index s) {
    const Index t = time(s);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const Pair<R>& pair = pairs[i];
      Ahead& to = ahead[i];
      to = Ahead{};
      if (t >= pair.length) continue;
      const bool begun = block.direction ? t + 1 < pair.length : t > 0;
      const Index row = pair.exists || pair.output_exists ? row_of(p, t, pair.sample) : 0;
      const Index before =
          begun && pair.exists ? row_of(p, block.direction ? t + 1 : t - 1, pair.sample) : 0;
      if (pair.output_exists && d_y) to.d_y = widen(d_y[row * y_stride + pair.index]);
      if (!pair.exists) continue;
      to.anew = begins_anew(p, row);
#pragma unroll
      for (int v = 0; v < C::saved; ++v) {
        to.saved[v] = gates[row * p.gate_stride + v * p.hidden + pair.index];
      }
      if (!projected) {
        to.h_after = widen(y[row * y_stride + pair.index]);
        if (to.anew) {
          to.h_before = R(0);
        } else if (begun) {
          to.h_before = widen(y[before * y_stride + pair.index]);
        } else if (side.first[0]) {
          to.h_before =
              widen(static_cast<const E*>(side.first[0])[pair.sample * p.output + pair.index]);
        }
      }
      if (C::states > 1) {
        to.c_after = cells[row * p.hidden + pair.index];
        if (to.anew) {
          to.c_before = R(0);
        } else if (begun) {
          to.c_before = cells[before * p.hidden + pair.index];
        } else if (side.first[1]) {
          to.c_before = static_cast<const R*>(side.first[1])[pair.sample * p.hidden + pair.index];
        }
      }
    }
  };

  // What the step before step s of this pass, which is later in time, adds to h's gradient.
  const auto from_later = [&](const Pair<R>& pair, Index s) {
    R sum[1] = {};
    if constexpr (C::recurrent) block.gather(pair.row, pair.unit, sum);
    if (side.factors) sum[0] = sum[0] * factor_of(block, pair);
    if (p.reset && s > 0) {
      const Index t = time(s - 1);
      if (t < pair.length && begins_anew(p, row_of(p, t, pair.sample))) sum[0] = R(0);
    }
    return sum[0];
  };

  block.begin();
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    pairs[i] = pair_of(block, i);
  }
  if (p.begin < p.end) look_ahead(p.begin);

  bool right = true;
  Index s = p.begin;
#pragma unroll 1
  for (; s < p.end; ++s) {
    const Index t = time(s);
    const int slot = int(s & 1);
    if (!(right = block.await())) break;
    if (kSecond && (p.stages & kOutput)) {
      // All but what comes back through the second product.
      block.multiply(slot);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Pair<R>& pair = pairs[i];
        if (!pair.exists) continue;
        E operand{};
        pair.h = pair.h + from_later(pair, s);
        V d_a[kColumns];
#pragma unroll
        for (int g = 0; g < kColumns; ++g) d_a[g] = V(0);
        if (t < pair.length) {
          const Ahead& given = ahead[i];
          V saved[kSaved];
          for (int v = 0; v < kSaved; ++v) saved[v] = V(given.saved[v]);
          const V before[2] = {V(given.h_before), V(R(0))};
          V d_state[2] = {V(pair.h + given.d_y), V(R(0))};
          V parameters[C::parameters + C::held + 1];
          load_parameters<C>(block, row_of(p, t, pair.sample), pair.index, parameters);
          C::backward(p.options, saved, parameters, before, before, d_state, d_a);
          pair.h = given.anew ? R(0) : d_state[0].v;
          Operand<P>::from(d_a[kGates - 1].v, operand);
        }
        if (t < pair.length || !p.offsets) {
          E* to = d_gates + row_of(p, t, pair.sample) * d_stride + pair.index;
#pragma unroll
          for (int g = 0; g < kColumns; ++g) narrow(d_a[g].v, to[g * p.hidden]);
        }
        block.to_publish_projected(pair.row)[pair.index] = operand;
      }
      block.publish_projected();
    }
    if constexpr (kSecond) {
      if (p.stages & kCell) {
        if ((p.stages & kOutput) && !(right = block.await())) break;
        block.multiply_projected();
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          Pair<R>& pair = pairs[i];
          if (!pair.exists) continue;
          V d_a[kGates];
#pragma unroll
          for (int g = 0; g < kGates; ++g) d_a[g] = V(0);
          if (t < pair.length) {
            const Ahead& given = ahead[i];
            R sum[1];
            block.gather(pair.row, pair.unit, sum);
            V saved[kSaved];
            for (int v = 0; v < kSaved; ++v) saved[v] = V(given.saved[v]);
            const R by = factor_of(block, pair);
            const V part = C::backward_first(saved, V(given.h_before * by), V(sum[0]), d_a);
            E* at = d_gates + row_of(p, t, pair.sample) * d_stride + pair.index;
            narrow(d_a[0].v, at[0]);
#pragma unroll
            for (int g = 1; g < kFirst; ++g) d_a[g] = V(widen(at[g * p.hidden]));
            if (!given.anew) pair.h = pair.h + part.v * by;
          }
          E* to = block.to_publish(slot ^ 1, pair.row) + pair.index / kGroup * (kGroup * kFirst) +
                  pair.index % kGroup;
#pragma unroll
          for (int g = 0; g < kFirst; ++g) Operand<P>::from(d_a[g].v, to[g * kGroup]);
        }
        block.publish(slot ^ 1, kFirst);
        if (s + 1 < p.end) look_ahead(s + 1);
      }
      continue;
    }
    if (projected && (p.stages & kOutput)) {
      if constexpr (C::recurrent) block.multiply(slot);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Pair<R>& pair = pairs[i];
        if (!pair.output_exists) continue;
        E stored{}, operand{};
        // Steps that a sample does not have hand its gradient on.
        pair.h = pair.h + from_later(pair, s);
        if (t < pair.length) {
          const R d_h = pair.h + ahead[i].d_y;
          pair.h = R(0);
          narrow(d_h, stored);
          Operand<P>::from(d_h, operand);
        }
        if (t < pair.length || !p.offsets) {
          const Index row = row_of(p, t, pair.sample);
          static_cast<E*>(side.d_output)[row * p.output + pair.index] = stored;
        }
        block.to_publish_projected(pair.row)[pair.index] = operand;
      }
      block.publish_projected();
    }
    if (p.stages & kCell) {
      if (projected) {
        if ((p.stages & kOutput) && !(right = block.await())) break;
        block.multiply_projected();
      } else if constexpr (C::recurrent) {
        block.multiply(slot);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Pair<R>& pair = pairs[i];
        if (!pair.exists) continue;
        const bool alive = t < pair.length;
        V d_a[kColumns];
#pragma unroll
        for (int g = 0; g < kColumns; ++g) d_a[g] = V(0);
        R sum[1] = {};
        // Steps that a sample does not have hand its gradient on.
        if (projected) {
          block.gather(pair.row, pair.unit, sum);
        } else {
          pair.h = pair.h + from_later(pair, s);
        }
        if (alive) {
          const Ahead& given = ahead[i];
          const R d_h = projected ? sum[0] : pair.h + given.d_y;
          V saved[kSaved];
          for (int v = 0; v < kSaved; ++v) saved[v] = V(given.saved[v]);
          const V before[2] = {V(given.h_before), V(given.c_before)};
          const V after[2] = {V(given.h_after), V(given.c_after)};
          V d_state[2] = {V(d_h), V(pair.c)};
          if (C::states > 1 && side.d_cells) {
            const Index row = row_of(p, t, pair.sample);
            d_state[1] = d_state[1] + V(d_cells[row * p.directions * p.hidden + pair.index]);
          }
          V parameters[C::parameters + C::held + 1];
          load_parameters<C>(block, row_of(p, t, pair.sample), pair.index, parameters);
          C::backward(p.options, saved, parameters, before, after, d_state, d_a);
          if (!projected) pair.h = C::direct && !given.anew ? d_state[0].v : R(0);
          pair.c = given.anew ? R(0) : d_state[1].v;
        }
        if (alive || !p.offsets) {
          E* to = d_gates + row_of(p, t, pair.sample) * d_stride + pair.index;
#pragma unroll
          for (int g = 0; g < kColumns; ++g) narrow(d_a[g].v, to[g * p.hidden]);
        }
        E* to = block.to_publish(slot ^ 1, pair.row) + pair.index / kGroup * (kGroup * kGates) +
                pair.index % kGroup;
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          const V d = d_a[g < kGates - kApart ? g : g + kApart];
          Operand<P>::from(d.v, to[g * kGroup]);
        }
      }
      block.publish(slot ^ 1, kGates);
      if (s + 1 < p.end) look_ahead(s + 1);
    }
  }

  if (right && p.finish) {
    right = p.begin == p.end || block.await();
    if (right) {
      if constexpr (C::recurrent) block.multiply(int(p.end & 1));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (pairs[i].output_exists) pairs[i].h = pairs[i].h + from_later(pairs[i], p.end);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (!right) {  // given up: what is not known must not look like a result
      pairs[i].h = pairs[i].c = R(0) / R(0);
#pragma unroll 1
      for (Index left = s; left < p.end && pairs[i].exists; ++left) {
        if (time(left) >= pairs[i].length) continue;
        const Index row = row_of(p, time(left), pairs[i].sample);
        for (int g = 0; g < kColumns; ++g) {
          narrow(pairs[i].h, d_gates[row * d_stride + g * p.hidden + pairs[i].index]);
        }
        if (projected && pairs[i].output_exists) {
          E* to = static_cast<E*>(side.d_output) + row * p.output + pairs[i].index;
          narrow(pairs[i].h, *to);
        }
      }
    }
    keep_pair(block, pairs[i]);
  }
  if (p.end < p.steps) block.hand_over(int(p.end & 1), kFirst);
  block.end();
}

}  // namespace fastcell::cuda
