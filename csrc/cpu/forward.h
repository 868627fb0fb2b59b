// The forward engine: a stack of layers over a sequence, for any cell.
//
// Per layer and direction, each step is a product with the recurrent weights and the cell's
// pointwise maths on the sums that the product has just left in the nearest cache. Those sums begin
// with the input projection. Few samples: the projection of a chunk of steps is one product before
// them, so that its weights are read once for many rows. Many: each step begins its own sums, which
// then never leave the nearest cache. One sample of few features: its steps add the input's terms
// in registers. In any way an element is the same sum of chains, and has the same bits.
#pragma once

#include "math.h"
#include "precision.h"
#include "rows.h"

namespace fastcell::FASTCELL_ISA {

// The weights of one layer and direction as pack() lays them out.
template <class T, class Cell, class Precision>
struct PackedDirection {
  using Element = typename Precision::Element;

  Panels<T> x, h, second, r, skip;  // depths in groups
  Element *x_weights, *h_weights, *second_weights, *r_weights, *skip_weights;
  T* x_bias;  // [panel][column]: b_ih, with b_hh for the gates whose two terms are joined
  T* h_bias;  // [block][apart][lane]: b_hh of the others
  T *x_scales, *h_scales, *r_scales;  // [block][slot][lane], where the precision has them
  T* parameters;                      // [block][parameter][lane]

  PackedDirection(const Stack& s, int layer, Arena& arena)
      : x{Cell::gates, s.hidden, groups(s.layer_input(layer)), kMaxVectors, compact_above(s)},
        h{Cell::gates - Cell::second, s.hidden, Cell::recurrent ? groups(s.output) : 0,
          x.blocks_each(), compact_above(s)},
        second{1, Cell::second > 0 ? s.hidden : 0, groups(s.output)},
        r{1, s.projected ? s.output : 0, groups(s.hidden)},
        skip{Cell::gates, s.hidden, s.delay > 0 ? groups(s.output) : 0, kMaxVectors,
             compact_above(s)} {
    x_weights = arena.take<Element>(x.size() * Precision::group);
    h_weights = arena.take<Element>(h.size() * Precision::group);
    second_weights = arena.take<Element>(second.size() * Precision::group);
    r_weights = arena.take<Element>(r.size() * Precision::group);
    skip_weights = arena.take<Element>(skip.size() * Precision::group);
    x_bias = arena.take<T>(x.padded_units() * Cell::gates);
    h_bias = arena.take<T>(x.padded_units() * Cell::apart);
    const int64_t scaled = Precision::scaled;
    x_scales = arena.take<T>(scaled * x.padded_units() * Cell::gates);
    h_scales = arena.take<T>(scaled * h.padded_units() * Cell::gates);
    r_scales = arena.take<T>(scaled * r.padded_units());
    parameters = arena.take<T>(x.padded_units() * Cell::parameters);
  }

  // Not of few units: there a step of one sample takes longer over a panel by itself than it would
  // over the padding. Only where all products cover the same gates, column by column. And
  // not where a third product's padding would add its zeros, times an h that may be infinite, to a
  // gate that is kept apart.
  static constexpr int64_t compact_above(const Stack& s) {
    constexpr bool aligned = Precision::group == 1 && Cell::second == 0;
    if (!aligned || (Cell::apart > 0 && s.delay > 0)) return INT64_MAX;
    return (Cell::apart > 0 ? 6 : kAtOnce) * Panels<T>::lanes;
  }

  static constexpr int64_t groups(int64_t depth) {
    return (depth + Precision::group - 1) / Precision::group;
  }

  // What multiplying by one panel takes.
  static const Element* panel(const Panels<T>& panels, const Element* weights, int64_t p) {
    return weights + panels.offset(p) * Precision::group;
  }
};

// The sums of one row and unit block: [input terms of the gates apart][joined gates][recurrent
// terms of the gates apart], each a vector, or `gate_width` columns of a panel whose gates are
// close. The input product fills the first `gates` of them, the recurrent product adds to the last
// `gates`. So the input weights' slots hold the gates apart first.
template <class Cell>
struct Slots {
  static constexpr int apart = Cell::apart;
  static constexpr int joined = Cell::gates - Cell::apart;
  static constexpr int count = Cell::gates + Cell::apart;
  static_assert(count <= kMaxVectors, "the sums of a unit block are one tile wide at most");
  static_assert(apart == 0 || Cell::gates > 2, "one unit block per panel where gates are apart");
  static_assert(Cell::second == 0 || (Cell::second == 1 && apart == 0 && Cell::states == 1),
                "what a second product has been written for");

  static constexpr int gate_of(int input_slot) {
    return input_slot < apart ? joined + input_slot : input_slot - apart;
  }
};

template <class T, template <class> class CellOf, class Precision>
struct Packing {
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Element = typename Precision::Element;
  using Packed = PackedDirection<T, Cell, Precision>;

  static int64_t bytes(const Stack& s) {
    Arena arena(nullptr);
    for (int layer = 0; layer < s.layers; ++layer) {
      for (int dir = 0; dir < s.directions; ++dir) Packed(s, layer, arena);
    }
    return arena.used();
  }

  static void pack(const Stack& s, const void* const* weights, void* packed, const Team& team) {
    Arena arena(packed);
    for (int layer = 0; layer < s.layers; ++layer) {
      for (int dir = 0; dir < s.directions; ++dir, weights += s.weights_each()) {
        const Packed to(s, layer, arena);
        const auto pack = [&](const Panels<T>& panels, const void* from, int64_t depth, Element* to,
                              int first_gate) {
          Precision::pack(panels, static_cast<const Element*>(from), depth, to,
                          part(panels.count(), team.index, team.size), first_gate);
        };
        const int first = Slots<Cell>::gate_of(0);
        pack(to.x, weights[0], s.layer_input(layer), to.x_weights, first);
        if constexpr (Cell::recurrent) pack(to.h, weights[1], s.output, to.h_weights, 0);
        if constexpr (Cell::second > 0) {
          const auto* own =
              static_cast<const Element*>(weights[1]) + to.h.gates * s.hidden * s.output;
          pack(to.second, own, s.output, to.second_weights, 0);
        }
        if (s.projected) pack(to.r, weights[s.projection_at()], s.hidden, to.r_weights, 0);
        if (s.delay > 0) pack(to.skip, weights[s.skip_at()], s.output, to.skip_weights, first);
        if (team.index > 0) continue;
        pack_bias(s, weights, to);
        if constexpr (Cell::parameters > 0) pack_parameters(s, weights[s.parameters_at()], to);
        if constexpr (Precision::scaled) {
          const void* const* scales = weights + s.scales_at();
          pack_scales(to.x, scales[0], to.x_scales, first);
          if constexpr (Cell::recurrent) pack_scales(to.h, scales[1], to.h_scales, 0);
          if (s.projected) pack_scales(to.r, scales[2], to.r_scales, 0);
        }
      }
    }
  }

 private:
  // One value per row of a weight matrix, in the order of the panels' columns.
  static void pack_scales(const Panels<T>& panels, const void* from, T* to, int first_gate) {
    const T* const scales = static_cast<const T*>(from);
    for (int64_t unit = 0; unit < panels.padded_units(); ++unit) {
      for (int slot = 0; slot < panels.gates; ++slot) {
        const int gate = (first_gate + slot) % panels.gates;
        to[(unit / V::lanes * panels.gates + slot) * V::lanes + unit % V::lanes] =
            unit < panels.units ? scales[gate * panels.units + unit] : T(0);
      }
    }
  }

  static void pack_parameters(const Stack& s, const void* from, const Packed& to) {
    for (int64_t unit = 0; unit < to.x.padded_units(); ++unit) {
      for (int i = 0; i < Cell::parameters; ++i) {
        to.parameters[(unit / V::lanes * Cell::parameters + i) * V::lanes + unit % V::lanes] =
            unit < s.hidden ? static_cast<const T*>(from)[i * s.hidden + unit] : T(0);
      }
    }
  }

  static void pack_bias(const Stack& s, const void* const* weights, const Packed& to) {
    const T* b_ih = s.bias ? static_cast<const T*>(weights[2]) : nullptr;
    const T* b_hh = s.bias ? static_cast<const T*>(weights[3]) : nullptr;
    constexpr int joined = Slots<Cell>::joined;
    std::memset(to.x_bias, 0, to.x.padded_units() * Cell::gates * sizeof(T));
    std::memset(to.h_bias, 0, to.x.padded_units() * Cell::apart * sizeof(T));
    for (int64_t unit = 0; s.bias && unit < s.hidden; ++unit) {
      const int64_t block = unit / V::lanes, lane = unit % V::lanes;
      const int gate_width = to.x.gate_width(unit / to.x.units_each());
      for (int slot = 0; slot < Cell::gates; ++slot) {
        const int g = Slots<Cell>::gate_of(slot);
        T value = b_ih[g * s.hidden + unit];
        if (g < joined) value += b_hh[g * s.hidden + unit];
        to.x_bias[block * Cell::gates * V::lanes + slot * gate_width + lane] = value;
      }
      for (int a = 0; a < Cell::apart; ++a) {
        to.h_bias[(block * Cell::apart + a) * V::lanes + lane] =
            b_hh[(joined + a) * s.hidden + unit];
      }
    }
  }
};

template <class T, template <class> class CellOf, class Precision>
class Forward {
 public:
  static int64_t workspace_bytes(const ForwardCall& call, int threads) {
    Arena arena(nullptr);
    Buffers(call, threads, arena);
    return arena.used();
  }

  static void run(const ForwardCall& call, const Team& team, Barrier* barriers) {
    Arena workspace(call.workspace);
    const Buffers buffers(call, team.size, workspace);
    if (call.extras.reset) {
      if (team.index == 0) std::memset(buffers.zeros, 0, buffers.h_stride * sizeof(T));
      team.sync();
    }
    const int64_t width = call.stack.directions * call.stack.output * output_item(call);
    const RowMap<char> y{static_cast<char*>(call.y), call.time.samples * width, width, false,
                         call.time.order};
    clear_padding(call.time, y, width, team);
    const Place place(call.schedule, team, barriers, call.time);
    if (place.layer_groups > 1) return run_wavefront(call, buffers, team, place, barriers);
    Arena packed(const_cast<void*>(call.packed));
    for (int layer = 0; layer < call.stack.layers; ++layer) {
      const Input x = layer_input(call, buffers, layer, team);
      for (int dir = 0; dir < call.stack.directions; ++dir) {
        const Packed weights(call.stack, layer, packed);
        if (dir % place.directions != place.direction_group) continue;
        Forward one(call, buffers, team, place, weights, x, layer, dir);
        one.load_initial_states();
        one.run_steps(0, call.time.steps);
        one.store_remembered();
      }
      team.sync();
    }
  }

 private:
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Element = typename Precision::Element;
  using Packed = PackedDirection<T, Cell, Precision>;
  static constexpr int G = Cell::gates;
  static constexpr int A = Cell::apart;
  static constexpr int joined = G - A;
  static constexpr int lanes = V::lanes;
  // Elements of one row of a full panel's sums.
  static int64_t sums_width(const Panels<T>& h) { return h.blocks_each() * (G + A) * lanes; }

  // Rows of a layer's input, as the caller or the layer below stored them.
  struct Input {
    RowMap<const char> map;  // in elements
    Storage storage;
    int64_t item() const { return storage == Storage::kSame ? int64_t(sizeof(T)) : 2; }
    FASTCELL_INLINE const char* at(int64_t t, int64_t b, int64_t r) const {
      return map.base + map.offset(t, b, r) * item();
    }
  };
  // Whether rows of x must be copied before a product takes them.
  static bool prepares(Storage storage) { return Precision::prepared || storage != Storage::kSame; }

  struct Buffers {
    T* layer_output[2];  // inner layers when nothing is kept
    T* dropped;          // an inner layer's output after dropout
    // One for each that may run at the same time: for each direction, or for each layer.
    T* sums;        // [panel][row]: begun with the projections of one chunk
    T* h;           // of two steps in turn, or of as many as are remembered: (B, padded output)
    T* c;           // (B, padded hidden) of the states behind h
    T* m;           // (B, padded hidden): what the projection, or the second product, takes
    T* first_part;  // (B, gates, padded hidden): what the second part of a step needs of the first
    int64_t sums_size, h_size, ring, c_size, m_size, first_size;
    char* x_rows;   // per thread: rows made ready for the product, of one chunk or step
    char* h_rows;   // per thread: (B, .) of h or m
    T* masked;      // per thread: (B, padded output) of h after recurrent dropout
    T* zeros;       // a row of h after a reset
    int64_t chunk;  // steps
    int64_t h_stride, c_stride, x_bytes, h_bytes;

    Buffers(const ForwardCall& call, int threads, Arena& arena) {
      const Stack& s = call.stack;
      const Timeline& time = call.time;
      const int64_t width = s.directions * s.output;
      const bool inner = s.layers > 1;
      for (T*& p : layer_output) p = arena.take<T>(inner && !call.reserve ? time.rows * width : 0);
      dropped = arena.take<T>(call.extras.masks ? time.rows * width : 0);
      const Panels<T> panels{G, s.hidden, 0};
      // About half of a core's own cache, but enough rows to make the product worth its start.
      const int64_t step = time.batch * panels.count() * sums_width(panels);
      chunk = (int64_t(1) << 20) / int64_t(sizeof(T)) / (step > 0 ? step : 1);
      const int64_t least = (48 + time.batch - 1) / (time.batch > 0 ? time.batch : 1);
      if (chunk < least) chunk = least;
      if (chunk > time.steps) chunk = time.steps;
      h_stride = padded_row<T>(s.output);
      c_stride = padded_row<T>(s.hidden);
      // The sizes must not depend on the schedule.
      const int64_t runs = s.directions > 1 ? s.directions : s.layers;
      const int64_t at_once = runs < threads || s.directions > 1 ? runs : threads;
      sums_size = chunk * step;
      h_size = time.batch * h_stride;
      c_size = (Cell::states - 1) * time.batch * c_stride;
      m_size = s.projected || Cell::second > 0 ? time.batch * c_stride : 0;
      first_size = Cell::second > 0 ? time.batch * G * c_stride : 0;
      sums = arena.take<T>(at_once * sums_size);
      ring = s.remembered() + 1;
      h = arena.take<T>(runs * ring * h_size);
      c = arena.take<T>(runs * c_size);
      m = arena.take<T>(runs * m_size);
      first_part = arena.take<T>(runs * first_size);
      const int64_t features = s.layers > 1 && width > s.input ? width : s.input;
      x_bytes = Precision::row_bytes(features);
      h_bytes = Precision::row_bytes(s.projected ? s.hidden : s.output);
      const int64_t x_count = prepares(call.x_storage) ? chunk * time.batch : 0;
      const int64_t h_count = Precision::prepared ? time.batch : 0;
      x_rows = arena.take<char>(threads * x_count * x_bytes);
      h_rows = arena.take<char>(threads * h_count * h_bytes);
      masked = arena.take<T>(call.extras.recurrent ? threads * h_size : 0);
      zeros = arena.take<T>(h_stride);
    }
  };

  // Where a layer's output is kept for the next layer or for the backward pass, in T; null for a
  // last layer of which nothing is kept.
  static T* layer_output(const ForwardCall& call, const Buffers& buffers, int layer) {
    const Stack& s = call.stack;
    if (call.reserve) {
      const ReserveLayout layout(s, Cell::saved, Cell::states);
      return static_cast<T*>(call.reserve) + layout.layer_output_at(s, layer, call.time.rows);
    }
    return layer == s.layers - 1 ? nullptr : buffers.layer_output[layer % 2];
  }

  static Input layer_input(const ForwardCall& call, const Buffers& buffers, int layer,
                           const Team& team) {
    if (layer == 0) return {call.x, call.x_storage};
    const int64_t width = call.stack.directions * call.stack.output;
    const T* input = layer_output(call, buffers, layer - 1);
    if (call.extras.masks) {
      const int64_t count = call.time.rows * width;
      const T* mask = static_cast<const T*>(call.extras.masks) + (layer - 1) * count;
      const Range range = part(count, team.index, team.size);
      for (int64_t i = range.begin; i < range.end; ++i) buffers.dropped[i] = input[i] * mask[i];
      team.sync();
      input = buffers.dropped;
    }
    return {{reinterpret_cast<const char*>(input), call.time.batch * width, width, true},
            Storage::kSame};
  }

  // Layers that follow one another through time: each takes some steps once the one below it has
  // done them. Of one direction and without masks.
  static void run_wavefront(const ForwardCall& call, const Buffers& buffers, const Team& team,
                            const Place& place, Barrier* barriers) {
    const Range layers = part(call.stack.layers, place.layer_group, place.layer_groups);
    Barrier* const counters = barriers + 1 + place.layer_groups;  // of the groups' steps
    const int64_t steps = call.time.steps;
    const int64_t each = wavefront_steps(steps, place.layer_groups);
    for (int64_t done = 0, end; done < steps; done = end) {
      end = done + each < steps ? done + each : steps;
      if (place.layer_group > 0) wait_until(counters[place.layer_group - 1], int(end));
      Arena packed(const_cast<void*>(call.packed));
      for (int layer = 0; layer < layers.end; ++layer) {
        const Packed weights(call.stack, layer, packed);
        if (layer < layers.begin) continue;
        const Input x = layer_input(call, buffers, layer, team);
        Forward one(call, buffers, team, place, weights, x, layer, 0);
        if (done == 0) one.load_initial_states();
        one.run_steps(done, end);
        if (end == steps) one.store_remembered();
        place.sync();
      }
      if (place.index == 0) advance_to(counters[place.layer_group], int(end));
    }
  }

  // How a thread goes over its panels where a step is one sample: some at a time. A last panel that
  // is narrower comes first, since it comes alone, and its gates then overlap the other panels'
  // sums. (Worked out once: divisions take longer than a small step has time for.)
  struct Turns {
    bool narrow;
    int64_t end, count, each;  // panels behind those of full width; these; of them at a time

    Turns(const Share& share, const Panels<T>& panels) {
      // One tile of rows: a unit of the share is a panel.
      const bool some = share.begin < share.end;
      narrow = some && panels.vectors(share.end - 1) < panels.vectors(0);
      end = share.end - narrow;
      count = some ? end - share.begin : 0;
      // As many each, nearly: the last ones would be alone.
      const int64_t turns = (count + kAtOnce - 1) / kAtOnce;
      each = turns > 1 ? (count + turns - 1) / turns : count;
    }
  };

  const Stack& s;
  const Timeline& time;
  const Place& place;
  const Packed& w;
  const Input x;
  const int64_t features;  // of x
  const bool reverse;
  T* const y;          // this direction's columns of what is kept, or null
  char* const output;  // the same of the caller's, or null
  const Storage output_storage;
  const bool reordered;  // rows of the caller's output
  const int64_t y_stride;
  T* const sums;  // of the rows from sums_first on
  int64_t sums_first;
  T* saved;             // or null
  T* kept_states;       // or null
  int64_t kept_stride;  // of its rows
  T* kept_cell_output;  // or null
  T* const h;
  const int64_t h_size, ring;
  T* c;
  T* m;
  T* first_part;
  const int64_t h_stride, c_stride, chunk;
  const bool x_prepared;  // rows of x are copied first, to x_rows
  char* const x_rows;
  char* const h_rows;
  const int64_t x_bytes, h_bytes;
  const uint8_t* const reset;  // or null
  const uint64_t* const seed;  // or null
  const T* const factors;      // of h in the product, (B, output), or null
  T* const masked;
  const T* const zeros;
  const bool brief;  // input so small that a step of one sample adds its terms to sums in registers
  const bool hoisted;  // else, of few samples: the projections of a chunk of steps before the steps
  const Share share;   // what this thread does of each step
  const Turns turns;   // the same, of steps of one sample
  const T* initial[Cell::states];
  T* final_state[Cell::states];
  noise::Bits state_keys[Cell::states];  // of what zoneout draws

  Forward(const ForwardCall& call, const Buffers& buffers, const Team& team, const Place& place,
          const Packed& w, const Input& x, int layer, int dir)
      : s(call.stack),
        time(call.time),
        place(place),
        w(w),
        x(x),
        features(call.stack.layer_input(layer)),
        reverse(dir == 1),
        y(layer_output(call, buffers, layer)
              ? layer_output(call, buffers, layer) + dir * call.stack.output
              : nullptr),
        output(layer == call.stack.layers - 1
                   ? static_cast<char*>(call.y) + dir * call.stack.output * output_item(call)
                   : nullptr),
        output_storage(call.y_storage),
        reordered(call.time.order != nullptr),
        y_stride(call.stack.directions * call.stack.output),
        sums(buffers.sums + (place.layer_groups > 1 ? place.layer_group : dir) * buffers.sums_size),
        sums_first(0),
        h(buffers.h + buffers.ring * run(call, layer, dir) * buffers.h_size),
        h_size(buffers.h_size),
        ring(buffers.ring),
        c(buffers.c + run(call, layer, dir) * buffers.c_size),
        m(buffers.m + run(call, layer, dir) * buffers.m_size),
        first_part(buffers.first_part + run(call, layer, dir) * buffers.first_size),
        h_stride(buffers.h_stride),
        c_stride(buffers.c_stride),
        chunk(buffers.chunk),
        x_prepared(prepares(x.storage)),
        x_rows(buffers.x_rows + team.index * buffers.chunk * call.time.batch * buffers.x_bytes),
        h_rows(buffers.h_rows + team.index * call.time.batch * buffers.h_bytes),
        x_bytes(buffers.x_bytes),
        h_bytes(buffers.h_bytes),
        reset(call.extras.reset),
        seed(call.extras.seed),
        factors(call.extras.recurrent
                    ? static_cast<const T*>(call.extras.recurrent) +
                          (layer * s.directions + dir) * call.time.all() * s.output
                    : nullptr),
        masked(buffers.masked + (factors ? team.index * buffers.h_size : 0)),
        zeros(buffers.zeros),
        brief(can_be_brief && s.delay == 0 && one_sample() && !x_prepared &&
              features <= kBriefInput),
        hoisted(!brief && time.rows < kOwnProjection * time.steps * call.schedule.batch_groups),
        share(w.h.count(), place.b0, place.b1, w.h.rows_each(), place.index, place.size),
        turns(share, w.h) {
    T* reserve = static_cast<T*>(call.reserve);
    const ReserveLayout layout(s, Cell::saved, Cell::states);
    saved = reserve ? reserve + layout.saved_at(s, layer, dir, time.rows) : nullptr;
    kept_states = reserve      ? reserve + layout.states_at(s, layer, dir, time.rows)
                  : call.cells ? static_cast<T*>(call.cells) + dir * s.hidden
                               : nullptr;
    kept_stride = reserve ? s.hidden : s.directions * s.hidden;
    kept_cell_output = reserve && s.projected
                           ? reserve + layout.cell_output_at(s, layer, dir, time.rows)
                           : nullptr;
    const int index = layer * s.directions + dir;
    for (int i = 0; i < Cell::states; ++i) {
      const int64_t at = index * s.state_elements(i, time.all());
      initial[i] = call.state[i] ? static_cast<const T*>(call.state[i]) + at : nullptr;
      final_state[i] = static_cast<T*>(call.final_state[i]) + at;
      state_keys[i] = seed ? noise::state_key(*seed, noise::Bits(index), noise::Bits(i)) : 0;
    }
  }

  // Which of the buffers that each direction, or each layer, has for itself.
  static int64_t run(const ForwardCall& call, int layer, int dir) {
    return call.stack.directions > 1 ? dir : layer;
  }

  static int64_t output_item(const ForwardCall& call) {
    return call.y_storage == Storage::kSame ? int64_t(sizeof(T)) : 2;
  }

  // Row r of x, b's at step t, as the product takes it; `first`: of the rows that are prepared.
  FASTCELL_INLINE const Element* x_row(int64_t t, int64_t b, int64_t r, int64_t first) const {
    const char* const row =
        x_prepared ? x_rows + (r - first) * x_bytes + Precision::head : x.at(t, b, r);
    return reinterpret_cast<const Element*>(row);
  }

  // The rows of this place's samples at the steps [t0, t1).
  void prepare_x(int64_t t0, int64_t t1) const {
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t end = place.b1 < time.alive(t) ? place.b1 : time.alive(t);
      for (int64_t b = place.b0; b < end; ++b) {
        const int64_t r = time.first(t) + b;
        prepare(x.at(t, b, r), x.storage, features, x_rows + (r - time.first(t0)) * x_bytes);
      }
    }
  }

  static void prepare(const void* from, Storage storage, int64_t depth, char* to) {
    Precision::prepare(from, storage, depth, reinterpret_cast<Element*>(to + Precision::head));
  }

  // Whether step t begins with zeros for sample b, whose row there is r.
  FASTCELL_INLINE bool begins_anew(int64_t r) const { return reset && reset[r]; }

  // h of this place's samples below `alive` before a step with rows from `first` on, for the
  // product. Every thread that shares them does it for itself: that takes less time than another
  // barrier.
  void prepare_h(const T* rows, int64_t first, int64_t alive) const {
    const int64_t end = place.b1 < alive ? place.b1 : alive;
    if (factors) {
      for (int64_t b = place.b0; b < end; ++b) {
        const T *from = rows + b * h_stride, *by = factors + time.sample(b) * s.output;
        T* const to = masked + b * h_stride;
        for (int64_t k = 0; k < s.output; ++k) to[k] = from[k] * by[k];
        for (int64_t k = s.output; k < h_stride; ++k) to[k] = T(0);
      }
    }
    if constexpr (Precision::prepared) {
      for (int64_t b = place.b0; b < end; ++b) {
        prepare(h_operand(rows, b, first + b), Storage::kSame, s.output, h_rows + b * h_bytes);
      }
    }
  }

  // What stands for sample b's h in the product.
  FASTCELL_INLINE const T* h_operand(const T* rows, int64_t b, int64_t r) const {
    if (begins_anew(r)) return zeros;
    return (factors ? masked : rows) + b * h_stride;
  }

  FASTCELL_INLINE const Element* h_row(const T* rows, int64_t b, int64_t r) const {
    if constexpr (Precision::prepared) {
      return prepared_row(b);
    } else {
      return h_operand(rows, b, r);
    }
  }

  // The same of m, for the projection.
  void prepare_m(int64_t alive) const {
    if constexpr (Precision::prepared) {
      const int64_t end = place.b1 < alive ? place.b1 : alive;
      for (int64_t b = place.b0; b < end; ++b) {
        prepare(m + b * c_stride, Storage::kSame, s.hidden, h_rows + b * h_bytes);
      }
    }
  }

  FASTCELL_INLINE const Element* m_row(int64_t b) const {
    if constexpr (Precision::prepared) {
      return prepared_row(b);
    } else {
      return m + b * c_stride;
    }
  }

  FASTCELL_INLINE const Element* prepared_row(int64_t b) const {
    return reinterpret_cast<const Element*>(h_rows + b * h_bytes + Precision::head);
  }

  // h before step i of this direction; of 1 - remembered() and more those that the caller gave.
  FASTCELL_INLINE T* h_at(int64_t i) const {
    return h + (ring == 2 ? i & 1 : (i + ring) % ring) * h_size;
  }

  // What the delayed link of step t begins with for sample b: h, unless a reset came between.
  FASTCELL_INLINE const T* delayed_operand(const T* rows, int64_t t, int64_t b) const {
    for (int64_t k = 0; reset && k < s.delay; ++k) {
      const int64_t at = reverse ? t + k : t - k;
      if (at < 0 || at >= time.steps || b >= time.alive(at)) break;
      if (begins_anew(time.first(at) + b)) return zeros;
    }
    return rows + b * h_stride;
  }

  // Adds the delayed link's terms to sums that the input's have begun.
  FASTCELL_INLINE void add_delayed(int64_t p, int64_t t, int64_t b, int n, T* const* to,
                                   const T* h_delayed) const {
    if constexpr (!Precision::prepared) {
      const Element* a[kRowBlock];
      for (int i = 0; i < n; ++i) a[i] = delayed_operand(h_delayed, t, b + i);
      Precision::multiply(a, to, n, Packed::panel(w.skip, w.skip_weights, p), nullptr,
                          w.skip.vectors(p), w.skip.depth, nullptr, nullptr);
    }
  }

  // The steps [begin, end) of the time loop, in its direction.
  void run_steps(int64_t begin, int64_t end) {
    for (int64_t done = begin, next; done < end; done = next) {
      next = !hoisted || done + chunk > end ? end : done + chunk;
      const int64_t t0 = reverse ? time.steps - next : done;
      const int64_t t1 = reverse ? time.steps - done : next;
      sums_first = time.first(t0);
      // No barrier: a thread projects what it will itself read in the steps.
      if (hoisted) project(t0, t1);
      for (int64_t i = done; i < next; ++i) {
        const int64_t t = reverse ? time.steps - 1 - i : i;
        T *const before = h_at(i), *const after = h_at(i + 1);
        step(t, before, after, s.delay > 0 ? h_at(i + 1 - s.delay) : nullptr, i % 2 != 0);
        place.sync();
        if (s.projected) {
          project_output(t, after);
          place.sync();
        }
        if constexpr (Cell::second > 0) {
          second_part(t, before, after);
          place.sync();
        }
      }
    }
  }

  // Sample b's row of an initial state, zeros if there is none and behind it.
  static void load_row(const T* initial, int64_t b, int64_t count, T* to, int64_t stride) {
    if (!initial) count = 0;
    if (count > 0) std::memcpy(to, initial + b * count, count * sizeof(T));
    std::memset(to + count, 0, (stride - count) * sizeof(T));
  }

  void load_initial_states() {
    const Range range = part(place.b1 - place.b0, place.index, place.size);
    for (int64_t b = place.b0 + range.begin; b < place.b0 + range.end; ++b) {
      const int64_t own = time.sample(b);
      // Of a ragged batch in reverse, what a sample begins with waits there for its last step.
      const int64_t begin = reverse ? time.steps - time.length(b) : 0;
      for (int64_t k = 0; k < s.remembered(); ++k) {
        const int64_t at = s.remembered_at(k, reverse) * time.all() + own;
        load_row(initial[0], at, s.output, h_at(begin - k) + b * h_stride, h_stride);
      }
      if constexpr (Cell::states > 1) {
        load_row(initial[1], own, s.hidden, c + b * c_stride, c_stride);
      }
    }
    // Samples without steps keep them.
    const bool last = place.index == 0 && place.b0 < time.batch && place.b1 == time.batch;
    for (int64_t b = time.batch; last && b < time.all(); ++b) {
      const int64_t own = time.sample(b);
      for (int i = 0; i < Cell::states; ++i) {
        const int64_t size = s.state_size(i);
        for (int64_t k = 0; k < (i == 0 ? s.remembered() : 1); ++k) {
          const int64_t at = k * time.all() + own;
          load_row(initial[i], at, size, final_state[i] + at * size, size);
        }
      }
    }
    place.sync();
  }

  // With a delay: h of a sample's last steps, for the caller.
  void store_remembered() const {
    if (s.delay == 0) return;
    const Range range = part(place.b1 - place.b0, place.index, place.size);
    for (int64_t b = place.b0 + range.begin; b < place.b0 + range.end; ++b) {
      const int64_t end = reverse ? time.steps : time.length(b);
      for (int64_t k = 0; k < s.delay; ++k) {
        const int64_t at = s.remembered_at(k, reverse) * time.all() + time.sample(b);
        std::memcpy(final_state[0] + at * s.output, h_at(end - k) + b * h_stride,
                    s.output * sizeof(T));
      }
    }
  }

  // A row of one panel's sums in the buffer of a chunk.
  T* sums_row(int64_t p, int64_t r) const {
    return sums + p * sums_width(w.h) * time.batch * chunk +
           (r - sums_first) * w.h.blocks(p) * (G + A) * lanes;
  }

  struct Rows {
    int64_t b;  // samples [b, b + n) of one step
    int n;
    int64_t t;           // the step
    int64_t first;       // row of its sample 0
    int64_t alive_next;  // samples that go on
  };

  // Whether a step is one sample: then panels go several at a time.
  bool one_sample() const { return place.b1 - place.b0 == 1; }

  // Features of input whose weights cost a step less to read than sums that lie ready.
  static constexpr int64_t kBriefInput = 8;
  // Whether a step's sums stay in registers, and whether the input's terms can be added there.
  static constexpr bool in_registers = Precision::adds && Cell::second == 0;
  static constexpr bool can_be_brief = in_registers && !Precision::prepared;

  // Calls f(p, n) for this thread's panels [p, p + n) of one width, n <= kAtOnce, nearly in the
  // order of Share::for_each.
  template <class F>
  FASTCELL_INLINE void for_panels(bool backwards, F f) const {
    if (turns.narrow) f(turns.end, 1);
    for (int64_t done = 0, n; done < turns.count; done += n) {
      n = turns.count - done < turns.each ? turns.count - done : turns.each;
      f(backwards ? turns.end - done - n : share.begin + done, int(n));
    }
  }

  // Input projections of the steps [t0, t1) into the buffer.
  void project(int64_t t0, int64_t t1) {
    if (x_prepared) prepare_x(t0, t1);
    if (one_sample() && t1 - t0 == 1) {
      if (place.b0 < time.alive(t0)) project_one(t0);
      return;
    }
    share.for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
      for_row_blocks(time, t0, t1, b0, b1, [&](const Row* rows, int n) {
        const Element* a[kRowBlock];
        T* to[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a[i] = x_row(rows[i].t, rows[i].b, rows[i].r, sums_first);
          to[i] = sums_row(p, rows[i].r);
        }
        begin_sums(p, a, to, n, nullptr);
      });
    });
  }

  // Begins sums: with the input's terms, and the recurrent bias where the two stay apart. `next`:
  // see multiply_panel().
  FASTCELL_INLINE void begin_sums(int64_t p, const Element* const* a, T* const* to, int n,
                                  const Element* next) const {
    const int64_t unit = w.x.first_unit(p);
    Precision::multiply(a, to, n, Packed::panel(w.x, w.x_weights, p), w.x_scales + unit * G,
                        w.x.vectors(p), w.x.depth, w.x_bias + unit * G, next);
    begin_apart(p, to, n);
  }

  // The recurrent terms' sums where the two stay apart: after the input's product, which may have
  // written there.
  FASTCELL_INLINE void begin_apart(int64_t p, T* const* to, int n) const {
    for (int i = 0; i < A; ++i) {
      const V bias = V::load(w.h_bias + w.x.first_unit(p) * A + i * lanes);
      for (int row = 0; row < n; ++row) bias.store(to[row] + (G + i) * w.x.gate_width(p));
    }
  }

  // The same of one step of one sample.
  void project_one(int64_t t) {
    const int64_t r = time.first(t) + place.b0;
    const Element* const a = x_row(t, place.b0, r, sums_first);
    for_panels(false, [&](int64_t p, int n) {
      T* to[kAtOnce];
      for (int i = 0; i < n; ++i) to[i] = sums_row(p + i, r);
      begin_one(p, n, a, to);
    });
  }

  // begin_sums() of one sample and n panels.
  FASTCELL_INLINE void begin_one(int64_t p, int n, const Element* a, T* const* to) const {
    const int64_t unit = w.x.first_unit(p);
    Precision::multiply_one(a, to, n, Packed::panel(w.x, w.x_weights, p), w.x_scales + unit * G,
                            w.x.vectors(p), w.x.depth, w.x_bias + unit * G);
    for (int i = 0; i < n; ++i) begin_apart(p + i, to + i, 1);
  }

  // A step of one sample, whose sums are begun.
  void step_one(const Rows& rows, const T* h_before, T* h_after, const T* h_delayed,
                bool backwards) {
    const int64_t r = rows.first + rows.b;
    const Element* const a = h_row(h_before, rows.b, r);
    const Element* const input = brief ? x_row(rows.t, rows.b, r, 0) : nullptr;
    for_panels(backwards, [&](int64_t p, int n) {
      T* sums[kAtOnce];
      if (!brief) {
        for (int i = 0; i < n; ++i) sums[i] = sums_row(p + i, r);
      }
      if (s.delay > 0) {
        for (int i = 0; i < n; ++i) add_delayed(p + i, rows.t, rows.b, 1, sums + i, h_delayed);
      }
      if constexpr (in_registers) {
        if (!w.h.close(p)) return finish_panels(p, n, input, a, sums, rows, h_before, h_after);
      }
      alignas(64) T block[(kMaxVectors + 1) * lanes];
      if constexpr (can_be_brief) {
        if (brief) {
          sums[0] = block;  // a panel of close gates comes alone
          begin_one(p, 1, input, sums);
        }
      }
      if constexpr (Cell::recurrent) {
        T* to[kAtOnce];
        for (int i = 0; i < n; ++i) to[i] = sums[i] + A * w.h.gate_width(p);
        Precision::multiply_one(a, to, n, Packed::panel(w.h, w.h_weights, p),
                                w.h_scales + w.h.first_unit(p) * G, w.h.vectors(p), w.h.depth,
                                nullptr);
      }
      for (int i = 0; i < n; ++i) finish_panel(p + i, sums[i], 0, rows, h_before, h_after);
    });
  }

  // The rest of a step of one sample for n panels, of gates that have a vector each: the recurrent
  // product's sums go to the cell's maths in registers, since a way through memory would
  // lengthen what every step waits for. W panels of N vectors; full ones, or the only one. The sums
  // are begun with the input's terms, or these are added here.
  template <int W = kAtOnce, int N = G * blocks_fitting(G)>
  FASTCELL_INLINE void finish_panels(int64_t p, int n, const Element* input, const Element* a,
                                     T* const* from, const Rows& rows, const T* h_before,
                                     T* h_after) {
    if constexpr (N > G) {
      if (w.h.vectors(p) < N) {
        return finish_panels<1, N - G>(p, n, input, a, from, rows, h_before, h_after);
      }
    }
    if constexpr (W > 1) {
      if (n < W) {
        return finish_panels<W - 1, N>(p, n, input, a, from, rows, h_before, h_after);
      }
    }
    V sums[W][N], apart[W][A + 1];
    if (can_be_brief && brief) {
      if constexpr (can_be_brief) begin_in_registers<W, N>(p, input, sums, apart);
    } else {
      for (int i = 0; i < W; ++i) {
        for (int g = 0; g < A; ++g) apart[i][g] = V::load(from[i] + g * lanes);
        for (int v = 0; v < N; ++v) sums[i][v] = V::load(from[i] + (A + v) * lanes);
      }
    }
    if constexpr (Cell::recurrent) {
      Precision::add_one(a, Packed::panel(w.h, w.h_weights, p), w.h.depth, sums);
    }
    const int64_t r = rows.first + rows.b;
#pragma GCC unroll 4
    for (int i = 0; i < W; ++i) {
#pragma GCC unroll 4
      for (int block = 0; block < N / G; ++block) {
        const int64_t unit = w.h.first_unit(p + i) + block * lanes, left = s.hidden - unit;
        V values[G + A];
        for (int g = 0; g < joined; ++g) values[g] = sums[i][block * G + g];
        for (int g = 0; g < A; ++g) {
          values[joined + g] = apart[i][g];
          values[G + g] = sums[i][joined + g];
        }
        V parameters[Cell::parameters + Cell::held + 1];
        load_parameters(unit, parameters);
        finish_row(unit, left < lanes ? int(left) : lanes, values, parameters, rows.t, rows.b, r,
                   rows.b >= rows.alive_next, h_before, h_after);
      }
    }
  }

  // begin_sums() of one sample, in registers; `apart`: of the gates apart, the input's terms.
  template <int W, int N>
  FASTCELL_INLINE void begin_in_registers(int64_t p, const Element* input, V (&sums)[W][N],
                                          V (&apart)[W][A + 1]) const {
    V begun[W][N];
    for (int i = 0; i < W; ++i) {
      const int64_t unit = w.x.first_unit(p + i);
      for (int v = 0; v < N; ++v) begun[i][v] = V::load(w.x_bias + unit * G + v * lanes);
      for (int g = 0; g < A; ++g) sums[i][joined + g] = V::load(w.h_bias + unit * A + g * lanes);
    }
    Precision::add_one(input, Packed::panel(w.x, w.x_weights, p), w.x.depth, begun);
    for (int i = 0; i < W; ++i) {
      for (int g = 0; g < A; ++g) apart[i][g] = begun[i][g];
      for (int v = A; v < N; ++v) sums[i][v - A] = begun[i][v];
    }
  }

  // The cell's maths for one panel and some samples.
  FASTCELL_INLINE void finish_panel(int64_t p, const T* from, int64_t width, const Rows& rows,
                                    const T* h_before, T* h_after) {
    for (int i = 0; i < w.h.blocks(p); ++i, from += (G + A) * lanes) {
      const int64_t unit = w.h.first_unit(p) + i * lanes;
      if (s.hidden - unit >= lanes) {
        finish(unit, lanes, from, lanes, width, rows, h_before, h_after);
      } else {
        finish(unit, int(s.hidden - unit), from, w.h.gate_width(p), width, rows, h_before, h_after);
      }
    }
  }

  void step(int64_t t, const T* h_before, T* h_after, const T* h_delayed, bool backwards) {
    const int64_t alive = time.alive(t), first = time.first(t), alive_next = going_on(t);
    int64_t panels_done = 0;
    if (!hoisted && x_prepared) prepare_x(t, t + 1);
    prepare_h(h_before, first, alive);
    if ((brief || hoisted) && one_sample()) {
      const int64_t b = place.b0;
      if (b < alive)
        step_one({b, 1, t, first, alive_next}, h_before, h_after, h_delayed, backwards);
      return;
    }
    share.for_each(backwards, [&](int64_t p, int64_t b0, int64_t b1) {
      if (!hoisted) prefetch_input(reverse ? t - 1 : t + 1, panels_done++, share.panels());
      if (b1 > alive) b1 = alive;
      const int64_t width = w.h.blocks(p) * (G + A) * lanes;
      const Element* const own = Packed::panel(w.h, w.h_weights, p);
      alignas(64) T block[kRowBlock * kMaxVectors * lanes];
      for (int64_t b = b0; b < b1; b += kRowBlock) {
        const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
        const bool again = b + n < b1;  // the same panel for other samples
        const Element* const next = first_weights(again ? p : after(share, p, backwards));
        const Element* a[kRowBlock];
        T* to[kRowBlock];
        if (hoisted) {
          for (int i = 0; i < n; ++i) to[i] = sums_row(p, first + b + i);
        } else {
          for (int i = 0; i < n; ++i) {
            a[i] = x_row(t, b + i, first + b + i, first);
            to[i] = block + i * width;
          }
          begin_sums(p, a, to, n, own);
        }
        if (s.delay > 0) add_delayed(p, t, b, n, to, h_delayed);
        T* const sums_begin = to[0];
        for (int i = 0; i < n; ++i) {
          a[i] = h_row(h_before, b + i, first + b + i);
          to[i] += A * w.h.gate_width(p);
        }
        if constexpr (Cell::recurrent) {
          Precision::multiply(a, to, n, own, w.h_scales + w.h.first_unit(p) * G, w.h.vectors(p),
                              w.h.depth, nullptr, next);
        }
        finish_panel(p, sums_begin, width, Rows{b, n, t, first, alive_next}, h_before, h_after);
      }
    });
  }

  // The panel that this thread takes after p; after its last one the next step goes back over them.
  static int64_t after(const Share& share, int64_t p, bool backwards) {
    if (backwards) return p > share.begin / share.tiles ? p - 1 : p;
    return p < (share.end - 1) / share.tiles ? p + 1 : p;
  }

  // What a step reads first of its weights for panel p.
  const Element* first_weights(int64_t p) const {
    return hoisted ? Packed::panel(w.h, w.h_weights, p) : Packed::panel(w.x, w.x_weights, p);
  }

  // A part of the input of step t: the product will read it row by row, which no hardware foresees.
  FASTCELL_INLINE void prefetch_input(int64_t t, int64_t part_index, int64_t parts) const {
    if (t < 0 || t >= time.steps) return;
    const int64_t bytes = features * x.item();
    const Range columns{bytes * part_index / parts, bytes * (part_index + 1) / parts};
    const int64_t end = place.b1 < time.alive(t) ? place.b1 : time.alive(t);
    for (int64_t b = place.b0; b < end; ++b) {
      const char* row = x.at(t, b, time.first(t) + b);
      for (int64_t k = columns.begin; k < columns.end; k += kCacheLine)
        __builtin_prefetch(row + k, 0, 2);
    }
  }

  // The cell's maths for some samples and one block of units, whose sums' gates are `gate_width`
  // columns apart. Inlined twice: for a whole block that and `valid` are constants. (Behind `valid`
  // lanes are numbers without meaning, in h, c and m, too.)
  FASTCELL_INLINE void finish(int64_t unit, int valid, const T* from, int gate_width, int64_t width,
                              const Rows& rows, const T* h_before, T* h_after) {
    if constexpr (Cell::second > 0) return finish_first(unit, from, width, rows, h_before);
    V p[Cell::parameters + Cell::held + 1];
    load_parameters(unit, p);
    for (int row = 0; row < rows.n; ++row, from += width) {
      const int64_t b = rows.b + row, r = rows.first + b;
      V a[G + A + Cell::second];
      const auto sum = [&](int slot) {
        // (Where gates are apart, what was written begins a gate's width further.)
        return A > 0 || gate_width == lanes ? V::load(from + slot * gate_width)
                                            : load_across(from, slot * gate_width);
      };
      for (int g = 0; g < joined; ++g) a[g] = sum(A + g);
      for (int g = 0; g < A; ++g) {
        a[joined + g] = sum(g);
        a[G + g] = sum(G + g);
      }
      finish_row(unit, valid, a, p, rows.t, b, r, b >= rows.alive_next, h_before, h_after);
    }
  }

  FASTCELL_INLINE void load_parameters(int64_t unit, V* p) const {
    for (int i = 0; i < Cell::parameters; ++i) {
      p[i] = V::load(w.parameters + unit * Cell::parameters + i * lanes);
    }
  }

  // The same for one sample, whose row is r; `last`: its last step. p: the cell's parameters.
  FASTCELL_INLINE void finish_row(int64_t unit, int valid, const V* a, V* p, int64_t t, int64_t b,
                                  int64_t r, bool last, const T* h_before, T* h_after) {
    V state[Cell::states], keep[Cell::saved + 1];
    T* const c_row = c + b * c_stride + unit;
    state[0] = s.projected ? V(0) : V::load(h_before + b * h_stride + unit);
    if constexpr (Cell::states > 1) state[1] = V::load(c_row);
    if (__builtin_expect(begins_anew(r), 0)) {
      for (V& one : state) one = V(0);
    }
    for (int i = 0; i < Cell::held; ++i) {
      const noise::Bits key = seed ? noise::row_key(state_keys[i], time.row(t, b)) : 0;
      p[Cell::parameters + i] = hold<T>(s.options.zoneout[i], seed ? &key : nullptr, unit);
    }
    Cell::forward(s.options, a, p, state, keep);

    if (saved) {
      for (int i = 0; i < Cell::saved; ++i) {
        store_first(saved + (r * Cell::saved + i) * s.hidden + unit, keep[i], valid);
      }
    }
    if constexpr (Cell::states > 1) {
      state[1].store(c_row);
      if (kept_states) store_first(kept_states + r * kept_stride + unit, state[1], valid);
      if (last) store_first(final_state[1] + time.sample(b) * s.hidden + unit, state[1], valid);
    }
    if (s.projected) {
      state[0].store(m + b * c_stride + unit);
      if (kept_cell_output) store_first(kept_cell_output + r * s.hidden + unit, state[0], valid);
    } else {
      state[0].store(h_after + b * h_stride + unit);
      store_output(t, b, r, unit, state[0], valid);
      if (last && s.delay == 0) {
        store_first(final_state[0] + time.sample(b) * s.hidden + unit, state[0], valid);
      }
    }
  }

  // The first part of steps with a second product: leaves what that takes, and what is needed then.
  FASTCELL_INLINE void finish_first(int64_t unit, const T* from, int64_t width, const Rows& rows,
                                    const T* h_before) {
    for (int row = 0; row < rows.n; ++row, from += width) {
      const int64_t b = rows.b + row;
      V a[G];
      for (int g = 0; g < G; ++g) a[g] = V::load(from + g * lanes);
      const V h = V::load(h_operand(h_before, b, rows.first + b) + unit);
      Cell::first(s.options, a, h).store(m + b * c_stride + unit);
      for (int g = 0; g < G; ++g) a[g].store(first_part + (b * G + g) * c_stride + unit);
    }
  }

  void second_part(int64_t t, const T* h_before, T* h_after) {
    const int64_t alive = time.alive(t), first = time.first(t), alive_next = going_on(t);
    const Panels<T>& panels = w.second;
    const Share share(panels.count(), place.b0, place.b1, panels.rows_each(), place.index,
                      place.size);
    prepare_m(alive);
    share.for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
      if (b1 > alive) b1 = alive;
      const int vectors = panels.vectors(p);
      alignas(64) T zeros[kMaxVectors * lanes] = {};
      alignas(64) T block[kRowBlock * kMaxVectors * lanes];
      for (int64_t b = b0; b < b1; b += kRowBlock) {
        const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
        const Element* a[kRowBlock];
        T* to[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a[i] = m_row(b + i);
          to[i] = block + i * vectors * lanes;
        }
        Precision::multiply(a, to, n, Packed::panel(panels, w.second_weights, p), nullptr, vectors,
                            panels.depth, zeros, nullptr);
        for (int i = 0; i < n; ++i) {
          for (int v = 0; v < vectors; ++v) {
            const int64_t unit = panels.first_unit(p) + v * lanes;
            const int valid = s.hidden - unit < lanes ? int(s.hidden - unit) : lanes;
            V values[G + 1], held[Cell::held + 1];
            for (int g = 0; g < G; ++g) {
              values[g] = V::load(first_part + ((b + i) * G + g) * c_stride + unit);
            }
            values[G - 1] = values[G - 1] + V::load(to[i] + v * lanes);
            values[G] = V::load(m + (b + i) * c_stride + unit);
            finish_row(unit, valid, values, held, t, b + i, first + b + i, b + i >= alive_next,
                       h_before, h_after);
          }
        }
      }
    });
  }

  // Samples of step t that have another step after it, in the order of this direction.
  int64_t going_on(int64_t t) const {
    if (reverse) return t > 0 ? time.batch : 0;
    return t + 1 < time.steps ? time.alive(t + 1) : 0;
  }

  FASTCELL_INLINE void store_output(int64_t t, int64_t b, int64_t r, int64_t unit, V value,
                                    int valid) const {
    int64_t at = r * y_stride + unit;
    if (y) store_first(y + at, value, valid);
    if (!output) return;
    if (__builtin_expect(reordered, 0)) at = time.row(t, b) * y_stride + unit;
    if (output_storage == Storage::kSame) {
      store_first(reinterpret_cast<T*>(output) + at, value, valid);
    } else {
      store_stored(output + at * 2, output_storage, value, valid);
    }
  }

  // h_t = W_hr m_t.
  void project_output(int64_t t, T* h_after) {
    const int64_t alive = time.alive(t), first = time.first(t), alive_next = going_on(t);
    const Share share(w.r.count(), place.b0, place.b1, w.r.rows_each(), place.index, place.size);
    alignas(64) T zeros[kMaxVectors * lanes] = {};
    prepare_m(alive);
    share.for_each(false, [&](int64_t p, int64_t b0, int64_t b1) {
      if (b1 > alive) b1 = alive;
      const int vectors = w.r.vectors(p);
      const int64_t unit = w.r.first_unit(p);
      for (int64_t b = b0; b < b1; b += kRowBlock) {
        const int n = int(b1 - b < kRowBlock ? b1 - b : kRowBlock);
        const Element* a[kRowBlock];
        T* to[kRowBlock];
        for (int i = 0; i < n; ++i) {
          a[i] = m_row(b + i);
          to[i] = h_after + (b + i) * h_stride + unit;
        }
        Precision::multiply(a, to, n, Packed::panel(w.r, w.r_weights, p), w.r_scales + unit,
                            vectors, w.r.depth, zeros, nullptr);
        for (int i = 0; i < n; ++i) {
          for (int v = 0; v < vectors; ++v) {
            const int64_t at = unit + v * lanes, left = s.output - at;
            const int valid = left < lanes ? int(left) : lanes;
            const V value = V::load(to[i] + v * lanes);
            store_output(t, b + i, first + b + i, at, value, valid);
            if (b + i >= alive_next && s.delay == 0) {
              store_first(final_state[0] + time.sample(b + i) * s.output + at, value, valid);
            }
          }
        }
      }
    });
  }
};

}  // namespace fastcell::FASTCELL_ISA
