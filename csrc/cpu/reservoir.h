// The run of a reservoir: leaky units with fixed, sparse recurrent weights, over many sequences.
//
// Samples are handed out in blocks of as many as a vector has lanes. A block of one sample keeps
// its state unit by unit, and a register holds a slice of units. A block of several keeps the state
// of a unit side by side for all of them, and a register holds one unit. Both make the same chain
// of FMAs for an element, bias, inputs, recurrent entries, so it has the same bits whatever the
// samples beside it. Where there are fewer blocks than threads, threads share a block's units, with
// one barrier per step.
#pragma once

#include "../cells/leaky.h"
#include "math.h"
#include "reservoir_call.h"
#include "rows.h"
#include "sparse.h"

namespace fastcell::FASTCELL_ISA {

template <class T>
class Reservoir {
 public:
  static int64_t workspace_bytes(const ReservoirCall& call, int threads) {
    Arena arena(nullptr);
    Buffers(call, threads, arena);
    return arena.used();
  }

  static void run(const ReservoirCall& call, const Team& team, Barrier* barriers) {
    Arena arena(call.workspace);
    const Buffers buffers(call, team.size, arena);
    const Timeline time{1, blocks(call), blocks(call), nullptr};
    const Place place(call.schedule, team, barriers, time);
    for (int64_t block = place.b0; block < place.b1; ++block) {
      Reservoir(call, buffers, team, place, block).run_steps();
    }
  }

 private:
  using V = Vec<T>;
  using Cell = cells::LeakyTanh<V>;
  static constexpr int lanes = V::lanes;

  static int64_t slices(const ReservoirCall& call) { return (call.units + lanes - 1) / lanes; }
  static int64_t blocks(const ReservoirCall& call) { return (call.samples + lanes - 1) / lanes; }

  struct Buffers {
    T* state;  // [block][2][unit][sample of the block]
    T* input;  // [thread][input][sample of the block]
    int64_t of_block, of_thread;

    Buffers(const ReservoirCall& call, int threads, Arena& arena)
        // (A last block of one sample takes less than it is given.)
        : of_block(2 * slices(call) * lanes * (call.samples > 1 ? lanes : 1)),
          of_thread(call.samples > 1 ? call.inputs * lanes : 0) {
      state = arena.take<T>(of_block * blocks(call));
      input = arena.take<T>(of_thread * threads);
    }
  };

  Reservoir(const ReservoirCall& call, const Buffers& buffers, const Team& team, const Place& place,
            int64_t block)
      : call_(call),
        place_(place),
        weights_{call.offsets, call.columns, static_cast<const T*>(call.values)},
        mine_(part(slices(call), place.index, place.size)),
        first_(block * lanes),
        samples_(int(call.samples - first_ < lanes ? call.samples - first_ : lanes)),
        before_(buffers.state + buffers.of_block * block),
        after_(before_ + buffers.of_block / 2),
        input_(buffers.input + buffers.of_thread * team.index) {}

  void run_steps() {
    for (int64_t s = mine_.begin; s < mine_.end; ++s) load_state(s);
    if (samples_ > 1) {
      for (int64_t i = 0; i < call_.inputs * lanes; ++i) input_[i] = T(0);
    }
    place_.sync();
    int running = samples_;
    for (int64_t t = 0; t < call_.lengths[first_]; ++t) {
      while (call_.lengths[first_ + running - 1] <= t) --running;
      if (samples_ == 1) {
        step_one(t);
      } else {
        step_block(t, running);
      }
      T* const next = before_;
      before_ = after_;
      after_ = next;
      place_.sync();
    }
    for (int64_t s = mine_.begin; s < mine_.end; ++s) store_state(s);
  }

  void step_one(int64_t t) {
    const T* const x = static_cast<const T*>(call_.x[first_]) + t * call_.inputs;
    for (int64_t s = mine_.begin; s < mine_.end; ++s) {
      V sum = V::load(bias() + s * lanes);
      const T* w = input_weights(s);
      for (int64_t i = 0; i < call_.inputs; ++i, w += lanes) sum = fma(V::load(w), V(x[i]), sum);
      weights_.add_product(s, before_, sum);
      const V h = step(sum, V::load(alpha() + s * lanes), V::load(before_ + s * lanes));
      h.store(after_ + s * lanes);
      if (call_.states) store_first(output(0, t, s), h, valid(s));
    }
  }

  void step_block(int64_t t, int running) {
    for (int b = 0; b < running; ++b) {
      const T* const x = static_cast<const T*>(call_.x[first_ + b]) + t * call_.inputs;
      for (int64_t i = 0; i < call_.inputs; ++i) input_[i * lanes + b] = x[i];
    }
    alignas(64) T number[lanes];
    for (int i = 0; i < lanes; ++i) number[i] = T(i);
    const auto runs = V::load(number) < V(T(running));
    for (int64_t s = mine_.begin; s < mine_.end; ++s) {
      V sum[lanes];
#pragma GCC unroll 16
      for (int u = 0; u < lanes; ++u) sum[u] = V(bias()[s * lanes + u]);
      const T* w = input_weights(s);
      for (int64_t i = 0; i < call_.inputs; ++i, w += lanes) {
        const V x = V::load(input_ + i * lanes);
#pragma GCC unroll 16
        for (int u = 0; u < lanes; ++u) sum[u] = fma(V(w[u]), x, sum[u]);
      }
      weights_.add_products(s, before_, sum);
#pragma GCC unroll 16
      for (int u = 0; u < lanes; ++u) {
        const int64_t unit = s * lanes + u;
        const V old = V::load(before_ + unit * lanes);
        sum[u] = select(runs, step(sum[u], V(alpha()[unit]), old), old);
        sum[u].store(after_ + unit * lanes);
      }
      if (!call_.states) continue;
      transpose<T>(sum);
      for (int b = 0; b < running; ++b) store_first(output(b, t, s), sum[b], valid(s));
    }
  }

  static FASTCELL_INLINE V step(V sum, V alpha, V h) {
    V unused;
    Cell::forward(CellOptions{}, &sum, &alpha, &h, &unused);
    return h;
  }

  // A slice of the caller's states, (samples, units), to and from the block's layout.
  void load_state(int64_t s) {
    V state[lanes];
    for (int b = 0; b < lanes; ++b) {
      state[b] = b < samples_ ? load_first(final_state(b, s), valid(s)) : V(T(0));
    }
    if (samples_ == 1) return state[0].store(before_ + s * lanes);
    transpose<T>(state);
    for (int u = 0; u < lanes; ++u) state[u].store(before_ + (s * lanes + u) * lanes);
  }

  void store_state(int64_t s) {
    if (samples_ == 1) {
      return store_first(final_state(0, s), V::load(before_ + s * lanes), valid(s));
    }
    V state[lanes];
    for (int u = 0; u < lanes; ++u) state[u] = V::load(before_ + (s * lanes + u) * lanes);
    transpose<T>(state);
    for (int b = 0; b < samples_; ++b) store_first(final_state(b, s), state[b], valid(s));
  }

  int valid(int64_t s) const {
    const int64_t left = call_.units - s * lanes;
    return left < lanes ? int(left) : lanes;
  }
  const T* bias() const { return static_cast<const T*>(call_.bias); }
  const T* alpha() const { return static_cast<const T*>(call_.alpha); }
  const T* input_weights(int64_t s) const {
    return static_cast<const T*>(call_.input_weights) + s * call_.inputs * lanes;
  }
  T* output(int b, int64_t t, int64_t s) const {
    return static_cast<T*>(call_.states[first_ + b]) + t * call_.units + s * lanes;
  }
  T* final_state(int b, int64_t s) const {
    return static_cast<T*>(call_.state) + (first_ + b) * call_.units + s * lanes;
  }

  const ReservoirCall& call_;
  const Place& place_;
  const SparseSlices<T> weights_;
  const Range mine_;     // slices of units
  const int64_t first_;  // sample of the block
  const int samples_;
  T *before_, *after_;  // the block's states: a step reads one and writes the other
  T* const input_;
};

}  // namespace fastcell::FASTCELL_ISA
