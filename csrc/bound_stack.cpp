#include "bound_stack.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "huge_pages.h"
#include "kernels_in_use.h"

namespace fastcell {
namespace {

std::vector<const void*> as_pointers(const std::vector<Pointer>& from) {
  std::vector<const void*> to;
  to.reserve(from.size());
  for (Pointer p : from) to.push_back(as<const void>(p));
  return to;
}

// The position of a name among those of an enumeration.
template <class E, size_t n>
E named(const std::string& name, const char* const (&names)[n], const char* what) {
  std::string all;
  for (size_t i = 0; i < n; ++i) {
    if (name == names[i]) return E(i);
    all += std::string(i ? ", " : "") + names[i];
  }
  throw std::invalid_argument(std::string(what) + " must be one of " + all + ", got " + name);
}
constexpr const char* kDTypeNames[] = {"float32", "float64"};
constexpr const char* kProductsNames[] = {"exact", "bfloat16", "int8"};
constexpr const char* kStorageNames[] = {"same", "bfloat16", "float16"};

const CellKernels& kernels_named(const std::string& name, const Stack& stack) {
  const Kernels& all = kernels();
  const CellTable first = all.narrow_cells[int(stack.dtype)][int(stack.products)];
  if (first.count == 0) throw std::invalid_argument("float64 stacks multiply exactly");
  const bool exact = stack.products == Products::kExact;
  const CellTable second = exact ? all.other_cells[int(stack.dtype)] : CellTable{};
  std::string names;
  for (int i = 0; i < first.count + second.count; ++i) {
    const CellKernels& cell = i < first.count ? first.cells[i] : second.cells[i - first.count];
    if (name == cell.name) return cell;
    names += std::string(i ? ", " : "") + cell.name;
  }
  throw std::invalid_argument("cell must be one of " + names + ", got " + name);
}

Extras extras_of(const ExtraPointers& p) {
  return {as(p[0]), as(p[1]), as<const uint8_t>(p[2]), as<const uint64_t>(p[3])};
}

// A tensor of the caller's: rows alone where there are offsets and no padding.
template <class T>
RowMap<T> rows_of(const Timeline& time, Pointer base, int64_t step, int64_t row) {
  return {as<T>(base), step, row, time.offsets && !time.order, time.order};
}

Timeline timeline(int64_t steps, int64_t batch, int64_t rows, Pointer offsets,
                  const Padding& padding = {}) {
  const auto [order, samples, padded_steps] = padding;
  return {steps,   batch,       rows, as<const int64_t>(offsets), as<const int64_t>(order),
          samples, padded_steps};
}

template <class Call>
void launch(const Call& call, void (*kernel)(const Call&, const Team&, Barrier*), bool release) {
  struct Job {
    const Call& call;
    void (*kernel)(const Call&, const Team&, Barrier*);
  } job{call, kernel};
  std::optional<py::gil_scoped_release> released;
  if (release) released.emplace();
  run_team(
      call.schedule.threads(),
      [](const Team& team, Barrier* barriers, const void* context) {
        const Job& job = *static_cast<const Job*>(context);
        job.kernel(job.call, team, barriers);
      },
      &job);
}

}  // namespace

BoundStack::BoundStack(const std::string& cell, const std::string& dtype,
                       const std::string& products, int64_t input, int64_t hidden, int64_t proj,
                       int layers, int directions, bool bias, const CellOptionsTuple& options,
                       int64_t delay)
    : stack_{named<DType>(dtype, kDTypeNames, "dtype"),
             named<Products>(products, kProductsNames, "products"),
             input,
             hidden,
             proj > 0 ? proj : hidden,
             proj > 0,
             bias,
             layers,
             directions,
             0,
             true,
             cell_options(options),
             delay},
      kernels_(kernels_named(cell, stack_)) {
  stack_.parameters = kernels_.parameters;
  stack_.recurrent = kernels_.recurrent;
  if (delay != 0 && (delay < 2 || stack_.products != Products::kExact)) {
    throw std::invalid_argument("a delay has 2 or more steps, and goes with exact products");
  }
  if (input < 0 || hidden <= 0 || layers <= 0 || directions < 1 || directions > 2) {
    throw std::invalid_argument(
        "a stack needs input >= 0, hidden > 0, layers > 0, directions 1 or 2");
  }
  packed_bytes_ = kernels_.packed_bytes(stack_);
}

std::vector<std::pair<int64_t, int64_t>> BoundStack::cells_at(int64_t rows) const {
  const ReserveLayout layout(stack_, kernels_.saved, kernels_.states);
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int dir = 0; dir < stack_.directions; ++dir) {
    found.emplace_back(layout.states_at(stack_, 0, dir, rows), layout.states);
  }
  return found;
}

void BoundStack::pack(const std::vector<Pointer>& weights, Pointer packed, int threads) const {
  struct Job {
    const BoundStack& self;
    std::vector<const void*> weights;
    void* packed;
  } job{*this, as_pointers(weights), as(packed)};
  if (int(weights.size()) != weight_count()) {
    throw std::invalid_argument("pack: wrong number of weights");
  }
  prefer_huge_pages(job.packed, packed_bytes());
  py::gil_scoped_release release;
  // Sharing it out pays from about 1 MB on.
  run_team(
      packed_bytes() < (1 << 20) ? 1 : threads,
      [](const Team& team, Barrier*, const void* context) {
        const Job& job = *static_cast<const Job*>(context);
        job.self.kernels_.pack(job.self.stack_, job.weights.data(), job.packed, team);
      },
      &job);
}

Schedule BoundStack::schedule(const Timeline& time, int threads, bool barriers,
                              bool wavefront) const {
  if (forced_.direction_groups > 0 && (wavefront || forced_.layer_groups == 1)) return forced_;
  return choose_schedule(stack_, time, kernels_, threads, barriers, wavefront);
}

py::tuple BoundStack::explain(int64_t steps, int64_t batch, int64_t rows, Pointer offsets,
                              int threads, bool wavefront, bool barriers) const {
  const Schedule s = schedule(timeline(steps, batch, rows, offsets), threads, barriers, wavefront);
  return py::make_tuple(s.direction_groups, s.batch_groups, s.unit_threads, s.layer_groups);
}

// Sizes without tensors: the call's pointers do not matter to it.
int64_t BoundStack::forward_workspace(int64_t steps, int64_t batch, int64_t rows, bool keep,
                                      bool masks, bool recurrent, bool narrow, int threads) const {
  ForwardCall call{};
  call.stack = stack_;
  call.time = {steps, batch, rows, nullptr};
  call.reserve = keep ? &call : nullptr;
  call.extras.masks = masks ? &call : nullptr;
  call.extras.recurrent = recurrent ? &call : nullptr;
  call.x_storage = narrow ? Storage::kBFloat16 : Storage::kSame;
  return kernels_.forward_workspace(call, threads);
}

int64_t BoundStack::backward_workspace(int64_t steps, int64_t batch, int64_t rows, bool masks,
                                       bool recurrent, int threads) const {
  BackwardCall call{};
  call.stack = stack_;
  call.time = {steps, batch, rows, nullptr};
  call.extras.masks = masks ? &call : nullptr;
  call.extras.recurrent = recurrent ? &call : nullptr;
  return kernels_.backward_workspace(call, threads);
}

void BoundStack::forward(int64_t steps, int64_t batch, int64_t rows, Pointer offsets,
                         const Padding& padding, Pointer x, int64_t x_step, int64_t x_row,
                         Pointer h0, Pointer c0, Pointer y, Pointer cells, Pointer h_final,
                         Pointer c_final, const ExtraPointers& extras, Pointer packed,
                         Pointer reserve, Pointer workspace, const std::string& storage,
                         int threads) const {
  ForwardCall call{};
  call.stack = stack_;
  call.time = timeline(steps, batch, rows, offsets, padding);
  call.extras = extras_of(extras);
  call.schedule = schedule(call.time, threads, !crowded(), !call.extras.masks);
  call.x = rows_of<const char>(call.time, x, x_step, x_row);
  call.y = as(y);
  call.cells = as(cells);
  call.x_storage = call.y_storage = named<Storage>(storage, kStorageNames, "storage");
  call.state[0] = as(h0);
  call.state[1] = as(c0);
  call.final_state[0] = as(h_final);
  call.final_state[1] = as(c_final);
  call.packed = as(packed);
  call.reserve = as(reserve);
  call.workspace = as(workspace);
  prefer_huge_pages(call.reserve, rows * reserve_row_elements() * item_size());
  prefer_huge_pages(call.y, rows * stack_.directions * stack_.output * item_size());
  launch(call, kernels_.forward, true);
}

void BoundStack::run(const ForwardCall& call) const {
  launch(call, kernels_.forward, !brief(call.schedule, call.time.rows));
}

void BoundStack::backward(int64_t steps, int64_t batch, int64_t rows, Pointer offsets,
                          const Padding& padding, Pointer x, int64_t x_step, int64_t x_row,
                          Pointer d_x, Pointer d_y, int64_t d_y_step, int64_t d_y_row, Pointer h0,
                          Pointer c0, Pointer d_h_final, Pointer d_c_final, Pointer d_h0,
                          Pointer d_c0, const ExtraPointers& extras,
                          const std::vector<Pointer>& weights,
                          const std::vector<Pointer>& d_weights, Pointer reserve, Pointer workspace,
                          int64_t d_x_step, int64_t d_x_row, bool accumulate, Pointer d_cells,
                          int threads) const {
  if (int(weights.size()) != weight_count() || int(d_weights.size()) != weight_count()) {
    throw std::invalid_argument("backward: wrong number of weights");
  }
  const std::vector<const void*> w = as_pointers(weights);
  std::vector<void*> d_w;
  d_w.reserve(d_weights.size());
  for (Pointer p : d_weights) d_w.push_back(as(p));
  BackwardCall call{};
  call.stack = stack_;
  call.time = timeline(steps, batch, rows, offsets, padding);
  call.schedule = schedule(call.time, threads, !crowded(), false);
  call.x = rows_of<const char>(call.time, x, x_step, x_row);
  call.d_x = rows_of<char>(call.time, d_x, d_x_step, d_x_row);
  call.d_y = rows_of<const char>(call.time, d_y, d_y_step, d_y_row);
  call.state[0] = as(h0);
  call.state[1] = as(c0);
  call.d_final[0] = as(d_h_final);
  call.d_final[1] = as(d_c_final);
  call.d_state[0] = as(d_h0);
  call.d_state[1] = as(d_c0);
  call.extras = extras_of(extras);
  call.weights = w.data();
  call.d_weights = d_w.data();
  call.accumulate = accumulate;
  call.d_cells = as(d_cells);
  call.reserve = as(reserve);
  call.workspace = as(workspace);
  run(call, threads);
}

void BoundStack::run(const BackwardCall& call, int threads) const {
  if (!kernels_.backward) throw std::invalid_argument("these kernels have no backward call");
  prefer_huge_pages(call.workspace, kernels_.backward_workspace(call, threads));
  prefer_huge_pages(call.d_x.base, call.time.rows * stack_.input * item_size());
  launch(call, kernels_.backward, !brief(call.schedule, call.time.rows));
}

}  // namespace fastcell
