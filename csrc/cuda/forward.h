// The forward pass: steps of one layer, both directions at once.
#pragma once

#include "../common/noise.h"
#include "block.h"
#include "scalar.h"

namespace fastcell::cuda {

// One sample and one hidden unit, for as long as the kernel runs.
template <class R>
struct Pair {
  bool exists, output_exists;  // as hidden unit, as output
  int row, unit;               // within the block's
  Index sample, index;         // within the layer's
  Index length;                // the sample's steps
  R h, c;
};

template <class Block>
FASTCELL_INLINE Pair<typename Block::R> pair_of(const Block& block, int i) {
  const Sweep& p = block.p;
  Pair<typename Block::R> pair;
  const bool inside = block.pair(i, pair.row, pair.unit);
  pair.sample = block.first_sample + pair.row;
  pair.index = block.first_unit + pair.unit;
  const bool sampled = inside && pair.sample < p.batch;
  pair.exists = sampled && pair.index < p.hidden;
  pair.output_exists = sampled && pair.index < p.output;
  pair.length = p.steps;
  if (sampled && p.lengths && p.lengths[pair.sample] < p.steps) {
    pair.length = p.lengths[pair.sample];
  }
  pair.h = pair.c = 0;
  using R = typename Block::R;
  const R* h = static_cast<const R*>(block.side.carry[0]);
  const R* c = static_cast<const R*>(block.side.carry[1]);
  if (pair.output_exists) pair.h = h[pair.sample * p.output + pair.index];
  if (pair.exists && c) pair.c = c[pair.sample * p.hidden + pair.index];
  return pair;
}

// The cell's parameters of a unit, and behind them the part of each state that zoneout keeps. (Just
// before they are used: held in registers through a step's product, they would be too many.)
template <class C, class Block, class V, int N>
FASTCELL_INLINE void load_parameters(const Block& block, Index row, Index unit, V (&to)[N]) {
  const Sweep& p = block.p;
  const auto* from = static_cast<const typename Block::R*>(block.side.parameters);
#pragma unroll
  for (int i = 0; i < C::parameters; ++i) to[i] = V(from[i * p.hidden + unit]);
#pragma unroll
  for (int i = 0; i < C::held; ++i) {
    to[C::parameters + i] = V(typename V::Number(p.options.zoneout[i]));
    if (p.seed && p.held_below[i]) {
      const auto own =
          noise::state_key(*p.seed, noise::Bits(p.layer + block.direction), noise::Bits(i));
      const auto key = noise::row_key(own, noise::Counter(row));
      to[C::parameters + i] = V(noise::draw(key, noise::Bits(unit)) < p.held_below[i] ? 1 : 0);
    }
  }
}

// Whether step t begins with zeros for a sample that has it.
FASTCELL_INLINE bool begins_anew(const Sweep& p, Index row) { return p.reset && p.reset[row]; }

// What the recurrent product takes for a sample's h, or its gradient.
template <class Block>
FASTCELL_INLINE typename Block::R factor_of(const Block& block,
                                            const Pair<typename Block::R>& pair) {
  const auto* factors = static_cast<const typename Block::R*>(block.side.factors);
  if (!factors) return 1;
  return factors[pair.sample * block.p.output + pair.index];
}

template <class Block>
FASTCELL_INLINE void keep_pair(const Block& block, const Pair<typename Block::R>& pair) {
  using R = typename Block::R;
  const Sweep& p = block.p;
  R* c = static_cast<R*>(block.side.carry[1]);
  if (pair.output_exists) {
    static_cast<R*>(block.side.carry[0])[pair.sample * p.output + pair.index] = pair.h;
  }
  if (pair.exists && c) c[pair.sample * p.hidden + pair.index] = pair.c;
}

FASTCELL_INLINE Index row_of(const Sweep& p, Index t, Index sample) {
  return (p.offsets ? p.offsets[t] : t * p.batch) + sample;
}

template <class P, template <class> class Cell, class Place>
FASTCELL_KERNEL forward(const FASTCELL_KERNEL_PARAMETER Sweep p) {
  using R = typename P::Real;
  using E = typename P::Element;
  using V = Scalar<R>;
  using C = Cell<V>;
  constexpr int kGates = C::gates, kApart = C::apart, kSaved = C::saved > 0 ? C::saved : 1;
  constexpr bool kSecond = C::second > 0;  // whose product goes the way of the projection's
  constexpr int kFirst = kGates - C::second;
  using Work = Block<P, Place, kFirst>;

  Work block(p);
  const Side& side = block.side;
  const bool projected = C::states > 1 && p.projected_width != 0;
  const Index y_stride = Index(p.directions) * p.output;
  E* const y = static_cast<E*>(p.y) + block.direction * p.output;
  R* const gates = static_cast<R*>(side.gates);
  const auto time = [&](Index s) { return block.direction ? p.steps - 1 - s : s; };

  Pair<R> pairs[kPairs];
  R ahead[kPairs][kGates];
  R apart_bias[kPairs][kApart > 0 ? kApart : 1];
  const auto look_ahead = [&](Index s) {
    const Index t = time(s);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const Pair<R>& pair = pairs[i];
      const bool alive = pair.exists && t < pair.length;
      const R* from = gates + (alive ? row_of(p, t, pair.sample) * p.gate_stride + pair.index : 0);
#pragma unroll
      for (int g = 0; g < kGates; ++g) ahead[i][g] = alive ? from[g * p.hidden] : R(0);
    }
  };

  // h as the product of step s takes it.
  const auto seen = [&](const Pair<R>& pair, Index s) {
    R h = pair.h;
    if (side.factors) h = h * factor_of(block, pair);
    if (p.reset && s < p.steps) {
      const Index t = time(s);
      if (t < pair.length && begins_anew(p, row_of(p, t, pair.sample))) h = R(0);
    }
    return h;
  };
  const auto publish_h = [&](const Pair<R>& pair, Index s) {
    Operand<P>::from(seen(pair, s), block.to_publish(int(s & 1), pair.row)[pair.index]);
  };
  // What a step leaves behind, of a sample that has it.
  const auto finish = [&](Pair<R>& pair, Index row, const V* state, const V* saved) {
    pair.c = state[1].v;
    if (p.keep) {
#pragma unroll
      for (int v = 0; v < C::saved; ++v) {
        gates[row * p.gate_stride + v * p.hidden + pair.index] = saved[v].v;
      }
      if (C::states > 1) static_cast<R*>(side.cells)[row * p.hidden + pair.index] = pair.c;
    }
    E stored;
    narrow(state[0].v, stored);
    if (projected) {
      if (side.cell_output) {
        static_cast<E*>(side.cell_output)[row * p.hidden + pair.index] = stored;
      }
    } else {
      pair.h = widen(stored);
      y[row * y_stride + pair.index] = stored;
    }
  };

  block.begin();
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    pairs[i] = pair_of(block, i);
    for (int k = 0; k < kApart; ++k) {
      const R* bias = static_cast<const R*>(side.apart_bias);
      apart_bias[i][k] = bias && pairs[i].exists ? bias[k * p.hidden + pairs[i].index] : R(0);
    }
  }
  // Cells with options have no registers left for it during a product on some GPUs.
  constexpr bool kAhead = C::held == 0;
  if (kAhead && (p.stages & kCell)) look_ahead(p.begin);

  Index s = p.begin;
#pragma unroll 1
  for (; s < p.end; ++s) {
    const Index t = time(s);
    const int slot = int(s & 1);
    if (!block.await()) break;
    if (p.stages & kCell) {
      if constexpr (C::recurrent) block.multiply(slot);
      if (!kAhead) look_ahead(s);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Pair<R>& pair = pairs[i];
        if (!pair.exists) continue;
        const bool alive = t < pair.length;
        E operand{};
        if (alive) {
          R sum[kFirst] = {};
          if constexpr (C::recurrent) block.gather(pair.row, pair.unit, sum);
          const Index row = row_of(p, t, pair.sample);
          if constexpr (kSecond) {
            // What the second part needs of the first lies where the input terms were.
            V a[kGates];
#pragma unroll
            for (int g = 0; g < kGates; ++g) {
              a[g] = V(g < kFirst ? ahead[i][g] + sum[g < kFirst ? g : 0] : ahead[i][g]);
            }
            const V taken = C::first(p.options, a, V(seen(pair, s)));
#pragma unroll
            for (int g = 0; g < kFirst; ++g) {
              gates[row * p.gate_stride + g * p.hidden + pair.index] = a[g].v;
            }
            gates[row * p.gate_stride + kGates * p.hidden + pair.index] = taken.v;
            Operand<P>::from(taken.v, operand);
          } else {
            if (begins_anew(p, row)) pair.h = pair.c = R(0);
            V parameters[C::parameters + C::held + 1];
            load_parameters<C>(block, row, pair.index, parameters);
            V a[kGates + kApart], state[2] = {V(projected ? R(0) : pair.h), V(pair.c)};
            V saved[kSaved];
#pragma unroll
            for (int g = 0; g < kGates; ++g) {
              if (g < kGates - kApart) {
                a[g] = V(ahead[i][g] + sum[g]);
              } else {
                a[g] = V(ahead[i][g]);
                a[g + kApart] = V(sum[g] + apart_bias[i][g - (kGates - kApart)]);
              }
            }
            C::forward(p.options, a, parameters, state, saved);
            if (projected) Operand<P>::from(state[0].v, operand);
            finish(pair, row, state, saved);
          }
        } else if (!projected && !kSecond && !p.offsets) {
          y[row_of(p, t, pair.sample) * y_stride + pair.index] = E{};
        }
        if (projected || kSecond) {
          block.to_publish_projected(pair.row)[pair.index] = operand;
        } else {
          publish_h(pair, s + 1);
        }
      }
      if (projected || kSecond) {
        block.publish_projected();
      } else {
        block.publish(slot ^ 1, 1);
      }
      if (kAhead && s + 1 < p.end) look_ahead(s + 1);
    }
    if (kSecond && (p.stages & kOutput)) {
      if ((p.stages & kCell) && !block.await()) break;
      block.multiply_projected();
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Pair<R>& pair = pairs[i];
        if (!pair.exists) continue;
        const Index row = row_of(p, t, pair.sample);
        if (t < pair.length) {
          R sum[1];
          block.gather(pair.row, pair.unit, sum);
          if (begins_anew(p, row)) pair.h = R(0);
          V parameters[C::parameters + C::held + 1];
          load_parameters<C>(block, row, pair.index, parameters);
          V a[kGates + 1], state[2] = {V(pair.h), V(R(0))}, saved[kSaved];
#pragma unroll
          for (int g = 0; g <= kGates; ++g) {
            a[g] = V(gates[row * p.gate_stride + g * p.hidden + pair.index]);
          }
          a[kGates - 1] = a[kGates - 1] + V(sum[0]);
          C::forward(p.options, a, parameters, state, saved);
          finish(pair, row, state, saved);
        } else if (!p.offsets) {
          y[row * y_stride + pair.index] = E{};
        }
        publish_h(pair, s + 1);
      }
      block.publish(slot ^ 1, 1);
    }
    if (projected && (p.stages & kOutput)) {
      if ((p.stages & kCell) && !block.await()) break;
      block.multiply_projected();
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Pair<R>& pair = pairs[i];
        if (!pair.output_exists) continue;
        if (t < pair.length) {
          R sum[1];
          block.gather(pair.row, pair.unit, sum);
          E stored;
          narrow(sum[0], stored);
          pair.h = widen(stored);
          y[row_of(p, t, pair.sample) * y_stride + pair.index] = stored;
        } else if (!p.offsets) {
          y[row_of(p, t, pair.sample) * y_stride + pair.index] = E{};
        }
        publish_h(pair, s + 1);
      }
      block.publish(slot ^ 1, 1);
    }
  }

#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (s < p.end) {  // given up: what is not known must not look like a result
      pairs[i].h = pairs[i].c = R(0) / R(0);
#pragma unroll 1
      for (Index left = s; left < p.end && pairs[i].output_exists; ++left) {
        if (time(left) >= pairs[i].length) continue;
        E stored;
        narrow(pairs[i].h, stored);
        y[row_of(p, time(left), pairs[i].sample) * y_stride + pairs[i].index] = stored;
      }
    }
    keep_pair(block, pairs[i]);
  }
  if (p.end < p.steps) block.hand_over(int(p.end & 1), 1);
  block.end();
}

}  // namespace fastcell::cuda
