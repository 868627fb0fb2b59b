// The plain structures that cross from the bindings into an engine: sizes, strides, raw pointers.
//
// Every function is always inlined: the header is compiled once per instruction set, and the linker
// must find no copy that it could share between them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "options.h"
#include "portable.h"

namespace fastcell {

constexpr int kMaxStates = 2;

enum class DType { kFloat32, kFloat64 };
constexpr int kDTypes = 2;

// What the products of the forward pass multiply: numbers of the stack's own dtype; both rounded to
// bfloat16; or both quantized to 8 bits, the weights by column and the others by row, as they come.
// Sums, states and the cell's maths have the stack's dtype in any case.
enum class Products { kExact, kBFloat16, kInt8 };
constexpr int kProducts = 3;

// How a caller's tensor holds numbers: in the stack's dtype, or in 16 bits.
enum class Storage { kSame, kBFloat16, kFloat16 };

// A stack of recurrent layers, as its constructor describes it.
struct Stack {
  DType dtype;
  Products products;
  int64_t input;   // features of x_t
  int64_t hidden;  // hidden units
  int64_t output;  // features of h_t: the projection's size, or hidden
  bool projected;
  bool bias;
  int layers;
  int directions;  // 1 or 2
  int parameters;  // vectors (H) that the cell has besides its matrices and biases
  bool recurrent;  // whether there is a matrix w_hh; else these vectors are in its place
  CellOptions options;
  int64_t delay = 0;  // h of so many steps before is input too, through w_skip; 0: it is not

  FASTCELL_INLINE int64_t layer_input(int layer) const {
    return layer == 0 ? input : directions * output;
  }
  FASTCELL_INLINE int64_t state_size(int state) const { return state == 0 ? output : hidden; }
  // Steps of which a sample brings h, and leaves it: the oldest first, but of a reverse direction,
  // for which those are the steps after, the nearest first.
  FASTCELL_INLINE int64_t remembered() const { return delay > 0 ? delay : 1; }
  // Elements of one layer's and direction's state.
  FASTCELL_INLINE int64_t state_elements(int state, int64_t batch) const {
    return (state == 0 ? remembered() : 1) * batch * state_size(state);
  }
  // Where of these h of the k-th step before the first is; or before the end.
  FASTCELL_INLINE int64_t remembered_at(int64_t k, bool reverse) const {
    return reverse ? k : remembered() - 1 - k;
  }
  // Tensors of one layer and direction: w_ih, w_hh[, b_ih, b_hh][, w_hr][, the cell's vectors as
  // one matrix][, w_skip], then for kInt8 what an integer weight stands for, per row of w_ih,
  // w_hh[, w_hr].
  FASTCELL_INLINE int projection_at() const { return 2 + (bias ? 2 : 0); }
  FASTCELL_INLINE int parameters_at() const {
    return recurrent ? projection_at() + (projected ? 1 : 0) : 1;
  }
  FASTCELL_INLINE int scales_at() const {
    return projection_at() + (projected ? 1 : 0) + (parameters > 0 && recurrent ? 1 : 0) +
           (delay > 0 ? 1 : 0);
  }
  FASTCELL_INLINE int weights_each() const {
    return scales_at() + (products == Products::kInt8 ? 2 + (projected ? 1 : 0) : 0);
  }
  FASTCELL_INLINE int skip_at() const { return scales_at() - 1; }
};

// Which rows exist: step t has alive(t) samples, a prefix of the batch; rows are time-major.
struct Timeline {
  int64_t steps;
  int64_t batch;
  int64_t rows;
  const int64_t* offsets;  // ragged: steps + 1 row offsets; else null
  // Of a padded batch whose samples have lengths: what is above says it of those that have any, the
  // longest first. Sample b is the caller's order[b]; those without steps are last in `order`.
  const int64_t* order = nullptr;
  int64_t samples = 0;
  int64_t padded_steps = 0;

  FASTCELL_INLINE int64_t first(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  FASTCELL_INLINE int64_t alive(int64_t t) const {
    return offsets ? offsets[t + 1] - offsets[t] : batch;
  }
  // The caller's number of sample b, how many he has, and his number of a row in the order of time.
  FASTCELL_INLINE int64_t sample(int64_t b) const { return order ? order[b] : b; }
  FASTCELL_INLINE int64_t all() const { return order ? samples : batch; }
  FASTCELL_INLINE int64_t row(int64_t t, int64_t b) const {
    return order ? t * samples + order[b] : first(t) + b;
  }
  // Steps of sample b.
  FASTCELL_INLINE int64_t length(int64_t b) const {
    if (!offsets) return steps;
    int64_t low = 0, high = steps;  // it has step low - 1, and no step high
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (b < alive(middle)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  // The step that row r belongs to.
  FASTCELL_INLINE int64_t step_of(int64_t r) const {
    if (!offsets) return r / batch;
    int64_t low = 0, high = steps;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (offsets[middle] <= r ? low : high) = middle;
    }
    return low;
  }
};

// How a team of threads shares one layer: directions apart, the batch apart, hidden units apart
// (the last with one barrier per step). Or how it shares a stack: layers apart, as a wavefront: a
// layer follows the one below it some steps behind.
struct Schedule {
  int direction_groups;
  int batch_groups;
  int unit_threads;
  int layer_groups = 1;
  FASTCELL_INLINE int threads() const {
    return direction_groups * batch_groups * unit_threads * layer_groups;
  }
};

// Steps that a layer of a wavefront is behind the one below it: few, so that all groups have work
// for most of the time, but enough rows for the product with the input's weights.
FASTCELL_INLINE int64_t wavefront_steps(int64_t steps, int groups) {
  const int64_t each = (steps + 6 * groups - 1) / (6 * groups);
  return each < 4 ? 4 : each;
}

// Samples per step, of one part of a batch, from which a step multiplies its own input: reading the
// input's weights anew is hidden behind that many rows of FMAs.
constexpr int64_t kOwnProjection = 16;

// Where a row (t, b) of the caller's tensor lies.
template <class T>
struct RowMap {
  T* base;
  int64_t step;  // elements between steps; unused when packed
  int64_t row;   // elements between samples of one step
  bool packed;
  const int64_t* order = nullptr;  // the timeline's

  FASTCELL_INLINE int64_t offset(int64_t t, int64_t b, int64_t r) const {
    return packed ? r * row : t * step + (order ? order[b] : b) * row;
  }
  FASTCELL_INLINE T* at(int64_t t, int64_t b, int64_t r) const { return base + offset(t, b, r); }
  template <class U>
  FASTCELL_INLINE RowMap<U> as() const {
    return {reinterpret_cast<U*>(base), step, row, packed, order};
  }
};

// What else a call may bring; null where it does not.
struct Extras {
  const void* masks;      // (L-1, rows, D*output): factors of the outputs between layers
  const void* recurrent;  // (L*D, B, output): factors of h_{t-1} in the recurrent products
  const uint8_t* reset;   // (rows): whether the states before that step are zero
  const uint64_t* seed;   // of what zoneout draws; null: it takes the expectation
};

struct ForwardCall {
  Stack stack;
  Timeline time;
  Schedule schedule;
  RowMap<const char> x;  // in elements; base as bytes
  Storage x_storage, y_storage;
  const void* state[kMaxStates];  // Stack::state_elements() of all L*D each, or null for zeros
  void* final_state[kMaxStates];  // the same
  void* y;                        // (rows, D*output), of a padded batch (steps, samples, D*output)
  void* cells;  // (rows, D*hidden), of one layer's c at all steps, or null; not with an order
  Extras extras;
  const void* packed;  // what pack() made
  void* reserve;       // kept for the backward call, or null
  void* workspace;
};

struct BackwardCall {
  Stack stack;
  Timeline time;
  Schedule schedule;
  RowMap<const char> x;
  RowMap<char> d_x;        // base null: not asked for
  RowMap<const char> d_y;  // base null: zero
  const void* state[kMaxStates];
  const void* d_final[kMaxStates];  // null: zero
  void* d_state[kMaxStates];        // null: not asked for
  Extras extras;
  const void* const* weights;  // flat, torch's order
  void* const* d_weights;      // flat; null entries are not asked for
  bool accumulate;             // d_weights are added to
  const void* d_cells;  // (rows, D*hidden), of one layer's c at all steps, or null; without order
  const void* reserve;
  void* workspace;
};

// A bump allocator over one buffer; on a null base it only measures.
class Arena {
 public:
  explicit FASTCELL_INLINE Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  FASTCELL_INLINE T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  FASTCELL_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What the forward call keeps for the backward call. Independent of instruction set and threads.
// The last layer's output is kept like every other: the caller may change his in place.
struct ReserveLayout {
  int64_t row_elements;                // in all, per row
  int64_t saved, states, cell_output;  // per row, of one layer and direction

  FASTCELL_INLINE ReserveLayout(const Stack& s, int saved_values, int state_count)
      : saved(saved_values * s.hidden),
        states((state_count - 1) * s.hidden),
        cell_output(s.projected ? s.hidden : 0) {
    row_elements = (each() + s.output) * s.layers * s.directions;
  }
  FASTCELL_INLINE int64_t each() const { return saved + states + cell_output; }

  // Offsets in elements, for `rows` rows.
  FASTCELL_INLINE int64_t saved_at(const Stack& s, int layer, int dir, int64_t rows) const {
    return rows * each() * (int64_t(layer) * s.directions + dir);
  }
  FASTCELL_INLINE int64_t states_at(const Stack& s, int layer, int dir, int64_t rows) const {
    return saved_at(s, layer, dir, rows) + rows * saved;
  }
  FASTCELL_INLINE int64_t cell_output_at(const Stack& s, int layer, int dir, int64_t rows) const {
    return states_at(s, layer, dir, rows) + rows * states;
  }
  FASTCELL_INLINE int64_t layer_output_at(const Stack& s, int layer, int64_t rows) const {
    return rows * (each() * s.layers * s.directions + s.output * s.directions * layer);
  }
};

}  // namespace fastcell
