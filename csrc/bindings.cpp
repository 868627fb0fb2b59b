// The thin layer between Python and the engines: pointers and sizes in, plain structures out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cell_options.h"
#include "cpu/engine.h"
#include "cpu/ragged_rows.h"
#include "cuda/bindings.h"
#include "cuda/build_info.h"
#include "huge_pages.h"
#include "normed_bindings.h"
#include "pointers.h"
#include "reservoir_bindings.h"
#include "small_call.h"
#include "tree_bindings.h"

namespace py = pybind11;

namespace fastcell {
namespace {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wanted = std::getenv("FASTCELL_ISA");
    const char* error = nullptr;
    const Kernels* found = choose_kernels(wanted, &error);
    if (!found) throw std::runtime_error(std::string("FASTCELL_ISA=") + wanted + " " + error);
    return *found;
  }();
  return chosen;
}

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

// The members of Extras, in their order; 0 for null.
using ExtraPointers = std::array<Pointer, 4>;
Extras extras_of(const ExtraPointers& p) {
  return {as(p[0]), as(p[1]), as<const uint8_t>(p[2]), as<const uint64_t>(p[3])};
}

// Of a padded batch with lengths: address of the samples' order, how many they are, all steps.
using Padding = std::tuple<Pointer, int64_t, int64_t>;

// A stack of layers with its kernels: what Python holds per configuration.
class BoundStack {
 public:
  BoundStack(const std::string& cell, const std::string& dtype, const std::string& products,
             int64_t input, int64_t hidden, int64_t proj, int layers, int directions, bool bias,
             const CellOptionsTuple& options, int64_t delay)
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

  // A tensor of the caller's: rows alone where there are offsets and no padding.
  template <class T>
  static RowMap<T> rows_of(const Timeline& time, Pointer base, int64_t step, int64_t row) {
    return {as<T>(base), step, row, time.offsets && !time.order, time.order};
  }

  int64_t item_size() const { return stack_.dtype == DType::kFloat32 ? 4 : 8; }
  int64_t packed_bytes() const { return packed_bytes_; }
  int64_t reserve_row_elements() const {
    return ReserveLayout(stack_, kernels_.saved, kernels_.states).row_elements;
  }

  // Where what is kept of one layer has c of all rows: (first element, width), per direction.
  std::vector<std::pair<int64_t, int64_t>> cells_at(int64_t rows) const {
    const ReserveLayout layout(stack_, kernels_.saved, kernels_.states);
    std::vector<std::pair<int64_t, int64_t>> found;
    for (int dir = 0; dir < stack_.directions; ++dir) {
      found.emplace_back(layout.states_at(stack_, 0, dir, rows), layout.states);
    }
    return found;
  }

  void pack(const std::vector<Pointer>& weights, Pointer packed, int threads) const {
    struct Job {
      const BoundStack& self;
      std::vector<const void*> weights;
      void* packed;
    } job{*this, as_pointers(weights), as(packed)};
    if (int(weights.size()) != stack_.layers * stack_.directions * stack_.weights_each()) {
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

  Timeline timeline(int64_t steps, int64_t batch, int64_t rows, Pointer offsets,
                    const Padding& padding = {}) const {
    const auto [order, samples, padded_steps] = padding;
    return {steps,   batch,       rows, as<const int64_t>(offsets), as<const int64_t>(order),
            samples, padded_steps};
  }

  // Every call in this way from now on, whatever it costs; 0 groups: as the model chooses again.
  void force_schedule(int direction_groups, int batch_groups, int unit_threads, int layer_groups) {
    forced_ = {direction_groups, batch_groups, unit_threads, layer_groups};
  }

  Schedule schedule(const Timeline& time, int threads, bool barriers, bool wavefront) const {
    if (forced_.direction_groups > 0 && (wavefront || forced_.layer_groups == 1)) return forced_;
    return choose_schedule(stack_, time, kernels_, threads, barriers, wavefront);
  }

  py::tuple explain(int64_t steps, int64_t batch, int64_t rows, Pointer offsets, int threads,
                    bool wavefront, bool barriers) const {
    const Schedule s =
        schedule(timeline(steps, batch, rows, offsets), threads, barriers, wavefront);
    return py::make_tuple(s.direction_groups, s.batch_groups, s.unit_threads, s.layer_groups);
  }

  // Sizes without tensors: the call's pointers do not matter to it.
  int64_t forward_workspace(int64_t steps, int64_t batch, int64_t rows, bool keep, bool masks,
                            bool recurrent, bool narrow, int threads) const {
    ForwardCall call{};
    call.stack = stack_;
    call.time = {steps, batch, rows, nullptr};
    call.reserve = keep ? &call : nullptr;
    call.extras.masks = masks ? &call : nullptr;
    call.extras.recurrent = recurrent ? &call : nullptr;
    call.x_storage = narrow ? Storage::kBFloat16 : Storage::kSame;
    return kernels_.forward_workspace(call, threads);
  }

  int64_t backward_workspace(int64_t steps, int64_t batch, int64_t rows, bool masks, bool recurrent,
                             int threads) const {
    BackwardCall call{};
    call.stack = stack_;
    call.time = {steps, batch, rows, nullptr};
    call.extras.masks = masks ? &call : nullptr;
    call.extras.recurrent = recurrent ? &call : nullptr;
    return kernels_.backward_workspace(call, threads);
  }

  void forward(int64_t steps, int64_t batch, int64_t rows, Pointer offsets, const Padding& padding,
               Pointer x, int64_t x_step, int64_t x_row, Pointer h0, Pointer c0, Pointer y,
               Pointer cells, Pointer h_final, Pointer c_final, const ExtraPointers& extras,
               Pointer packed, Pointer reserve, Pointer workspace, const std::string& storage,
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
    launch(call, kernels_.forward);
  }

  // For calls that keep nothing: all but time, schedule, input, states and output.
  ForwardCall inference_call(const void* packed, void* workspace) const {
    ForwardCall call{};
    call.stack = stack_;
    call.packed = packed;
    call.workspace = workspace;
    return call;
  }
  const Stack& stack() const { return stack_; }

  void run(const ForwardCall& call) const {
    // A call that is over before another thread could take the interpreter's lock keeps it.
    const bool brief = call.schedule.threads() == 1 && call.time.rows * packed_bytes_ <= 1 << 18;
    launch(call, kernels_.forward, !brief);
  }

  void backward(int64_t steps, int64_t batch, int64_t rows, Pointer offsets, const Padding& padding,
                Pointer x, int64_t x_step, int64_t x_row, Pointer d_x, Pointer d_y,
                int64_t d_y_step, int64_t d_y_row, Pointer h0, Pointer c0, Pointer d_h_final,
                Pointer d_c_final, Pointer d_h0, Pointer d_c0, const ExtraPointers& extras,
                const std::vector<Pointer>& weights, const std::vector<Pointer>& d_weights,
                Pointer reserve, Pointer workspace, int64_t d_x_step, int64_t d_x_row,
                bool accumulate, Pointer d_cells, int threads) const {
    const size_t expected = size_t(stack_.layers) * stack_.directions * stack_.weights_each();
    if (weights.size() != expected || d_weights.size() != expected) {
      throw std::invalid_argument("backward: wrong number of weights");
    }
    if (!kernels_.backward) throw std::invalid_argument("these kernels have no backward call");
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
    prefer_huge_pages(call.workspace, kernels_.backward_workspace(call, threads));
    prefer_huge_pages(call.d_x.base, rows * stack_.input * item_size());
    launch(call, kernels_.backward);
  }

 private:
  template <class Call>
  static void launch(const Call& call, void (*kernel)(const Call&, const Team&, Barrier*),
                     bool release = true) {
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

  Stack stack_;
  CellKernels kernels_;
  int64_t packed_bytes_ = 0;
  Schedule forced_{};
};

// A stack that is fed block by block, its states kept between the calls: nothing is allocated, and
// little else done, per call. The memory is Python's.
class BoundStream {
 public:
  BoundStream(const BoundStack& stack, int64_t batch, bool batch_first, int threads)
      : stack_(stack), batch_(batch), batch_first_(batch_first), threads_(threads) {}

  int64_t workspace_bytes(int64_t steps) const {
    return stack_.forward_workspace(steps, batch_, steps * batch_, false, false, false, false,
                                    threads_);
  }

  // states: of each kind (h, and c) a pair, current and next, (L, B, features).
  void bind(Pointer packed, const std::vector<std::pair<Pointer, Pointer>>& states,
            Pointer workspace, int64_t most_steps, Pointer output) {
    call_ = stack_.inference_call(as(packed), as(workspace));
    if (int(states.size()) > kMaxStates) throw std::invalid_argument("bind: too many states");
    for (size_t i = 0; i < states.size(); ++i) {
      call_.state[i] = as(current_ ? states[i].second : states[i].first);
      call_.final_state[i] = as(current_ ? states[i].first : states[i].second);
    }
    most_steps_ = most_steps;
    scheduled_steps_ = -1;
    output_ = output;
    array_rank_ = 0;
  }

  // Which of the states' two buffers holds them now.
  int current() const { return current_; }

  // x: (steps, B, I) at these strides, in elements.
  void run(Pointer x, int64_t steps, int64_t x_step, int64_t x_row) {
    if (steps < 1 || steps > most_steps_) throw std::invalid_argument("run: too many steps");
    const bool barriers = !crowded();
    if (steps != scheduled_steps_ || barriers != barriers_) {
      call_.time = {steps, batch_, steps * batch_, nullptr};
      call_.schedule = stack_.schedule(call_.time, threads_, barriers, true);
      scheduled_steps_ = steps;
      barriers_ = barriers;
    }
    call_.x = {as<const char>(x), x_step, x_row, false};
    call_.y = as(output_);
    stack_.run(call_);
    for (int i = 0; i < kMaxStates; ++i) {
      void* const next = call_.final_state[i];
      call_.final_state[i] = const_cast<void*>(call_.state[i]);
      call_.state[i] = next;
    }
    current_ ^= 1;
  }

  // The block that has just run was an array of so many dimensions.
  void remember_array(int rank, int64_t steps) {
    array_rank_ = rank;
    array_steps_ = steps;
  }

  // Runs an array of the remembered one's dtype and shape: true. Else nothing was done. (To look
  // all that up in Python takes several times as long as a small step.)
  bool run_array(py::handle array) {
    if (array_rank_ == 0) return false;
    Py_buffer view;
    if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      return false;
    }
    const Stack& s = stack_.stack();
    const int64_t item = stack_.item_size();
    const char* const format = s.dtype == DType::kFloat32 ? "f" : "d";
    int64_t steps = 1, batch = 1, step = 0, row = 0;
    const int rank = view.ndim;
    bool like = rank == array_rank_ && view.format && !std::strcmp(view.format, format) &&
                view.shape[rank - 1] == s.input && view.strides[rank - 1] == item;
    for (int i = 0; like && i < rank - 1; ++i) {
      like = view.strides[i] % item == 0;
      if (rank == 2 || (i == 0) != batch_first_) {
        steps = view.shape[i];
        step = view.strides[i] / item;
      } else {
        batch = view.shape[i];
        row = view.strides[i] / item;
      }
    }
    const auto x = reinterpret_cast<Pointer>(view.buf);
    PyBuffer_Release(&view);
    if (!like || steps != array_steps_ || batch != batch_) return false;
    run(x, steps, step, row);
    return true;
  }

 private:
  BoundStack stack_;
  int64_t batch_;
  bool batch_first_;
  int threads_;
  ForwardCall call_{};
  Pointer output_ = 0;
  int array_rank_ = 0;  // 0: none is remembered
  int64_t array_steps_ = 0;
  int64_t most_steps_ = 0, scheduled_steps_ = -1;
  bool barriers_ = true;
  int current_ = 0;
};

// A hash over weights: notices those that were written without torch's version counter (through
// .data or a NumPy view). `whole`: over all elements; else tensors of more than kSmall give a
// sample of 64 words, since reading them all would cost as much as a step does.
class Hash {
 public:
  void add(const void* from, int64_t count, int64_t item_size, bool whole) {
    constexpr int64_t kSmall = 4096;  // what gradcheck moves element by element is smaller
    if (whole || count <= kSmall) {
      value_ = kernels().hash(from, count * item_size, value_);
    } else {
      add_sample(static_cast<const char*>(from), count * item_size);
    }
  }

  std::uint64_t value() const { return value_; }

 private:
  void add_sample(const char* data, int64_t bytes) {
    constexpr int64_t kSamples = 64;
    const int64_t each = bytes / (8 * kSamples);
    std::uint64_t sample[kSamples];
    for (int64_t i = 0; i < kSamples; ++i) {
      // Anywhere within its part, so that samples do not all fall into one row or column.
      const std::uint64_t random = (std::uint64_t(i) * 0x9E3779B97F4A7C15ull) >> 32;
      const int64_t at = i * each + int64_t((random * std::uint64_t(each)) >> 32);
      std::memcpy(&sample[i], data + at * 8, 8);
    }
    value_ = kernels().hash(sample, sizeof sample, value_);
  }

  std::uint64_t value_ = 0;
};

std::uint64_t fingerprint(const std::vector<std::tuple<Pointer, int64_t, int64_t>>& tensors,
                          bool whole) {
  Hash hash;
  for (const auto& [pointer, count, item_size] : tensors) {
    hash.add(as(pointer), count, item_size, whole);
  }
  return hash.value();
}

// One layer's call at one shape, without a backward pass, as a function of Python: of the module's
// __dict__, the input, and a tuple of states or None. It returns (output, [h] or [h, c]), or None
// where this is not that call: then nothing was done. Not a class of pybind11, whose way to a
// method takes a tenth of a small step.
class SmallCall {
 public:
  explicit SmallCall(const BoundStack& stack) : stack_(stack) {}

  // attributes: of the module, and their values; absent: those that it must not have; sizes of the
  // input, (T, B, I) or as the module has it; weights by name, in the order in which they were
  // packed; templates: tensors as the results are, made by `empty_like`; unchanged: (dictionary,
  // key), whose values must stay the same objects; quiet: functions that must return nothing true;
  // `threads_now`: torch's number; served: is no longer empty once a call was this one.
  static py::object make(const BoundStack& stack, const py::object& capsule, py::dict attributes,
                         std::vector<py::object> absent,
                         const std::vector<std::pair<py::str, py::object>>& weights,
                         py::object packed, py::object workspace, Pointer workspace_pointer,
                         Pointer packed_pointer, int64_t steps, int64_t batch, bool batch_first,
                         int threads, std::vector<py::object> templates, py::object empty_like,
                         const std::vector<std::pair<py::dict, py::object>>& unchanged,
                         std::vector<py::object> quiet, py::object threads_now, py::list served) {
    auto call = std::make_unique<SmallCall>(stack);
    call->api_ = exchange_api(capsule);
    if (!call->api_) throw std::invalid_argument("no exchange API that is known");
    if (templates.empty()) throw std::invalid_argument("a call has results");
    call->tensor_type_ = py::type::of(templates[0]);
    call->attributes_ = std::move(attributes);
    call->absent_ = std::move(absent);
    call->packed_ = std::move(packed);
    call->workspace_ = std::move(workspace);
    call->call_ = stack.inference_call(as(packed_pointer), as(workspace_pointer));
    call->call_.time = {steps, batch, steps * batch, nullptr};
    call->steps_ = steps;
    call->batch_ = batch;
    call->batch_first_ = batch_first;
    call->threads_ = threads;
    call->templates_ = std::move(templates);
    call->empty_like_ = std::move(empty_like);
    for (const auto& [dictionary, key] : unchanged) {
      call->unchanged_.push_back({dictionary, key, dictionary[key]});
    }
    call->quiet_ = std::move(quiet);
    call->threads_now_ = std::move(threads_now);
    call->served_ = std::move(served);
    for (const auto& [name, weight] : weights) {
      call->weights_.emplace_back(name, weight, *call->api_);
      call->parameter_type_ = py::type::of(weight);
    }
    if (call->weights_.empty()) throw std::invalid_argument("a call has weights");
    call->fingerprint_ = call->fingerprint_now();

    static PyMethodDef method = {
        "small_call",
        reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&SmallCall::entry)),
        METH_FASTCALL, nullptr};
    const py::capsule owner(call.release(), [](void* p) { delete static_cast<SmallCall*>(p); });
    PyObject* const function = PyCFunction_New(&method, owner.ptr());
    if (!function) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function);
  }

 private:
  static PyObject* entry(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (count != 3) {
      PyErr_SetString(PyExc_TypeError, "small_call takes a dict, an input and states");
      return nullptr;
    }
    try {
      auto* const call = static_cast<SmallCall*>(PyCapsule_GetPointer(self, nullptr));
      return call->run(args[0], args[1], args[2]).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  py::object run(PyObject* module, PyObject* input, PyObject* states) {
    static PyObject* const parameters_name = PyUnicode_InternFromString("_parameters");
    if (PyThread_get_thread_ident() != thread_ || !plain(input) || !surroundings()) {
      return py::none();
    }
    PyObject *name, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(attributes_.ptr(), &at, &name, &value)) {
      if (PyDict_GetItem(module, name) != value) return py::none();
    }
    for (const py::object& absent : absent_) {
      if (PyDict_GetItem(module, absent.ptr())) return py::none();
    }
    PyObject* const parameters = PyDict_GetItem(module, parameters_name);
    if (!parameters) return py::none();
    for (const RecordedWeight& weight : weights_) {
      if (!weight.is_in(parameters, *api_)) return py::none();
    }
    const Stack& s = stack_.stack();
    dlpack::Tensor x;
    const int64_t first = batch_first_ ? batch_ : steps_, second = batch_first_ ? steps_ : batch_;
    if (!view(input, {first, second, s.input}, x) || x.strides[2] != 1) return py::none();
    // (Nothing is written to `call_` before the last call into Python, where a finalizer may make
    // this same call.)
    const RowMap<const char> rows{static_cast<const char*>(x.data), x.strides[batch_first_],
                                  x.strides[!batch_first_], false};
    const void* initial[kMaxStates] = {};
    void* final[kMaxStates] = {};
    const int64_t runs = int64_t(s.layers) * s.directions;
    const Py_ssize_t given = PyTuple_Check(states) ? PyTuple_GET_SIZE(states) : 0;
    if (given == 0 && states != Py_None) return py::none();
    for (int i = 0; i < kMaxStates && i < given; ++i) {
      PyObject* const state = PyTuple_GetItem(states, i);
      const int64_t size = s.state_size(i);
      dlpack::Tensor seen;
      const bool known = plain(state) || Py_TYPE(state) == parameter_type();
      if (!known || !view(state, {runs, batch_, size}, seen) || seen.strides[2] != 1 ||
          seen.strides[1] != size || seen.strides[0] != batch_ * size) {
        return py::none();
      }
      initial[i] = seen.data;
    }
    if (fingerprint_now() != fingerprint_) return py::none();

    dlpack::Tensor seen;
    py::object output = like(templates_[0], seen);
    void* const y = seen.data;
    py::list finals(templates_.size() - 1);
    for (size_t i = 1; i < templates_.size(); ++i) {
      py::object one = like(templates_[i], seen);
      final[i - 1] = seen.data;
      PyList_SET_ITEM(finals.ptr(), Py_ssize_t(i) - 1, one.release().ptr());
    }
    call_.x = rows;
    call_.y = y;
    std::copy_n(initial, kMaxStates, call_.state);
    std::copy_n(final, kMaxStates, call_.final_state);
    const bool barriers = !crowded();
    if (barriers != barriers_ || call_.schedule.direction_groups == 0) {
      call_.schedule = stack_.schedule(call_.time, threads_, barriers, true);
      barriers_ = barriers;
    }
    stack_.run(call_);
    if (PyList_GET_SIZE(served_.ptr()) == 0) served_.append(true);
    return py::reinterpret_steal<py::object>(PyTuple_Pack(2, output.ptr(), finals.ptr()));
  }

  bool plain(PyObject* tensor) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == tensor_type_.ptr();
  }
  // Of the weights, and of an initial state that is learned.
  PyTypeObject* parameter_type() const {
    return reinterpret_cast<PyTypeObject*>(parameter_type_.ptr());
  }

  // Whether the rest of torch is as it was: no mode, no gradient, no other number of threads.
  bool surroundings() const {
    for (const auto& [dictionary, key, value] : unchanged_) {
      if (PyDict_GetItem(dictionary.ptr(), key.ptr()) != value.ptr()) return false;
    }
    for (const py::object& function : quiet_) {
      const int loud = PyObject_IsTrue(called(function).ptr());
      if (loud < 0) throw py::error_already_set();
      if (loud) return false;
    }
    const long threads = PyLong_AsLong(called(threads_now_).ptr());
    if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
    return threads == threads_;
  }

  static py::object called(const py::object& function) {
    PyObject* const found = PyObject_CallNoArgs(function.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

  // A new tensor, and where its numbers lie.
  py::object like(const py::object& prototype, dlpack::Tensor& seen) const {
    PyObject* const argument = prototype.ptr();
    PyObject* const made = PyObject_Vectorcall(empty_like_.ptr(), &argument, 1, nullptr);
    if (!made) throw py::error_already_set();
    py::object owner = py::reinterpret_steal<py::object>(made);
    if (api_->view(made, &seen) != 0) throw py::error_already_set();
    return owner;
  }

  bool view(PyObject* object, std::initializer_list<int64_t> shape, dlpack::Tensor& out) const {
    if (!RecordedWeight::see(object, *api_, out)) return false;
    const int bits = stack_.item_size() * 8;
    return out.device_type == dlpack::kCpu && out.type_code == dlpack::kFloat &&
           out.type_bits == bits && out.rank == int(shape.size()) &&
           std::equal(shape.begin(), shape.end(), out.shape) && !RecordedWeight::negated(object);
  }

  std::uint64_t fingerprint_now() const {
    Hash hash;
    for (const RecordedWeight& w : weights_) hash.add(w.data(), w.count(), w.item_size(), false);
    return hash.value();
  }

  struct Unchanged {
    py::dict dictionary;
    py::object key, value;
  };

  BoundStack stack_;
  const dlpack::ExchangeApi* api_ = nullptr;
  py::object tensor_type_, parameter_type_;
  py::dict attributes_;
  py::object packed_, workspace_;  // kept alive
  std::vector<py::object> absent_, templates_, quiet_;
  py::object empty_like_, threads_now_;
  py::list served_;
  std::vector<Unchanged> unchanged_;
  std::vector<RecordedWeight> weights_;
  ForwardCall call_{};
  int64_t steps_ = 0, batch_ = 0;
  bool batch_first_ = false;
  int threads_ = 0;
  bool barriers_ = true;
  std::uint64_t fingerprint_ = 0;
  unsigned long thread_ = PyThread_get_thread_ident();  // whose workspace it is
};

double measure_fma_peak(int threads, double seconds) {
  struct Job {
    double seconds;
    std::vector<double> rates;
  } job{seconds, std::vector<double>(size_t(threads), 0.0)};
  py::gil_scoped_release release;
  run_team(
      threads,
      [](const Team& team, Barrier*, const void* context) {
        Job& job = *static_cast<Job*>(const_cast<void*>(context));
        float sink[64];
        using Clock = std::chrono::steady_clock;
        kernels().run_fma(100000, sink);
        team.sync();
        const auto start = Clock::now();
        int64_t flops = 0;
        double elapsed = 0;
        while ((elapsed = std::chrono::duration<double>(Clock::now() - start).count()) <
               job.seconds) {
          flops += kernels().run_fma(100000, sink);
        }
        job.rates[size_t(team.index)] = double(flops) / elapsed;
      },
      &job);
  double total = 0;
  for (double rate : job.rates) total += rate;
  return total;
}

double measure_read_bandwidth(int64_t bytes_per_thread, int threads, double seconds) {
  struct Job {
    double seconds;
    int64_t count;
    std::vector<std::vector<float>> data;
    std::vector<double> rates;
  } job{seconds, bytes_per_thread / 4, {}, std::vector<double>(size_t(threads), 0.0)};
  py::gil_scoped_release release;
  for (int i = 0; i < threads; ++i) job.data.emplace_back(size_t(job.count) + 16, 1.0f);
  run_team(
      threads,
      [](const Team& team, Barrier*, const void* context) {
        Job& job = *static_cast<Job*>(const_cast<void*>(context));
        // Whole cache lines, as the kernels' packed weights are.
        const auto start_of_data =
            reinterpret_cast<std::uintptr_t>(job.data[size_t(team.index)].data());
        const float* data = as<const float>((start_of_data + 63) & ~std::uintptr_t(63));
        float sink[64];
        using Clock = std::chrono::steady_clock;
        kernels().read(data, job.count, sink);
        team.sync();
        const auto start = Clock::now();
        int64_t bytes = 0;
        double elapsed = 0;
        const int64_t rounds = 1 + (1 << 22) / (job.count * 4 + 1);
        while ((elapsed = std::chrono::duration<double>(Clock::now() - start).count()) <
               job.seconds) {
          for (int64_t i = 0; i < rounds; ++i) kernels().read(data, job.count, sink);
          bytes += rounds * job.count * 4;
        }
        job.rates[size_t(team.index)] = double(bytes) / elapsed;
      },
      &job);
  double total = 0;
  for (double rate : job.rates) total += rate;
  return total;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastcell's kernels, on raw pointers; fastcell.ops is the layer that knows tensors.";
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def(
      "estimate_quotients",
      [](std::optional<bool> wanted) {
        const bool before = estimate_quotients;
        if (wanted) estimate_quotients = *wanted;
        return before;
      },
      py::arg("wanted") = py::none(),
      "Whether AVX-512 kernels divide by estimate and correction; sets it, for tests.");
  m.def(
      "dot_products",
      [](std::optional<bool> wanted) {
        const bool before = bfloat16_dots || int8_dots;
        if (wanted) {
          bfloat16_dots = *wanted && has_bfloat16_dots();
          int8_dots = *wanted && has_int8_dots();
        }
        return before;
      },
      py::arg("wanted") = py::none(),
      "Whether AVX-512 kernels use BF16 and VNNI, which the CPU has; sets it, for tests.");
  m.def(
      "isas",
      [] {
        int count;
        const Kernels* const* all = compiled_kernels(&count);
        std::vector<std::string> names;
        for (int i = 0; i < count; ++i) {
          if (supported(*all[i])) names.emplace_back(all[i]->isa);
        }
        return names;
      },
      "The instruction sets that this build and this CPU have, lowest first.");
  m.def(
      "address",
      [](py::handle array) {
        Py_buffer view;
        if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_STRIDES) != 0)
          throw py::error_already_set();
        const auto address = reinterpret_cast<Pointer>(view.buf);
        PyBuffer_Release(&view);
        return address;
      },
      py::arg("array"));
  m.def(
      "drop",
      [](Pointer from, Pointer to, int64_t count, bool float64, uint64_t seed, double probability) {
        py::gil_scoped_release release;
        kernels().drop(float64 ? DType::kFloat64 : DType::kFloat32, as<const void>(from), as(to),
                       count, seed, probability);
      },
      "Dropout by a seed: each element is zeroed with that probability, the others are scaled.");
  m.def(
      "ragged_order",
      [](int64_t batch, Pointer lengths, Pointer order, Pointer offsets) {
        ragged_order(batch, as<const int64_t>(lengths), as<int64_t>(order), as<int64_t>(offsets));
      },
      "Fills the tensors of csrc/cpu/ragged_rows.h.");
  m.def(
      "ragged_rows",
      [](int64_t steps, int64_t batch, Pointer lengths, bool batch_first, Pointer order,
         Pointer rank, Pointer sizes, Pointer rows) {
        ragged_rows(steps, batch, as<const int64_t>(lengths), batch_first, as<int64_t>(order),
                    as<int64_t>(rank), as<int64_t>(sizes), as<int64_t>(rows));
      },
      "Fills the tensors of csrc/cpu/ragged_rows.h.");
  m.def("fingerprint", &fingerprint, py::arg("tensors"), py::arg("whole"));
  m.def("measure_fma_peak", &measure_fma_peak, py::arg("threads"), py::arg("seconds"),
        "float32 operations per second of independent FMA chains on all threads together.");
  m.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("bytes_per_thread"),
        py::arg("threads"), py::arg("seconds"),
        "Bytes per second read by all threads together, each from its own array of that size.");
  const auto bind_map = [&m](const char* name, bool is_tanh) {
    m.def(
        name,
        [is_tanh](Pointer x, Pointer y, int64_t count, bool float64) {
          py::gil_scoped_release release;
          (is_tanh ? kernels().tanh : kernels().sigmoid)(
              float64 ? DType::kFloat64 : DType::kFloat32, as(x), as(y), count);
        },
        py::arg("x"), py::arg("y"), py::arg("count"), py::arg("float64"));
  };
  bind_map("tanh", true);
  bind_map("sigmoid", false);

  py::class_<BoundStack>(m, "Stack", "A configuration of layers with the kernels that run it.")
      .def(py::init<const std::string&, const std::string&, const std::string&, int64_t, int64_t,
                    int64_t, int, int, bool, const CellOptionsTuple&, int64_t>(),
           py::arg("cell"), py::arg("dtype"), py::arg("products"), py::arg("input"),
           py::arg("hidden"), py::arg("proj"), py::arg("layers"), py::arg("directions"),
           py::arg("bias"), py::arg("options"), py::arg("delay") = 0)
      .def_property_readonly("packed_bytes", &BoundStack::packed_bytes)
      .def_property_readonly("reserve_row_elements", &BoundStack::reserve_row_elements)
      .def("cells_at", &BoundStack::cells_at)
      .def("pack", &BoundStack::pack)
      .def("explain", &BoundStack::explain, py::arg("steps"), py::arg("batch"), py::arg("rows"),
           py::arg("offsets"), py::arg("threads"), py::arg("wavefront"), py::arg("barriers") = true)
      .def("force_schedule", &BoundStack::force_schedule)
      .def("forward_workspace", &BoundStack::forward_workspace)
      .def("backward_workspace", &BoundStack::backward_workspace)
      .def("forward", &BoundStack::forward)
      .def("backward", &BoundStack::backward);

  m.def(
      "has_exchange_api", [](py::handle capsule) { return exchange_api(capsule) != nullptr; },
      py::arg("capsule"));
  m.def("small_call", &SmallCall::make, py::arg("stack"), py::arg("exchange_api"),
        py::arg("attributes"), py::arg("absent"), py::arg("weights"), py::arg("packed"),
        py::arg("workspace"), py::arg("workspace_pointer"), py::arg("packed_pointer"),
        py::arg("steps"), py::arg("batch"), py::arg("batch_first"), py::arg("threads"),
        py::arg("templates"), py::arg("empty_like"), py::arg("unchanged"), py::arg("quiet"),
        py::arg("threads_now"), py::arg("served"),
        "A layer's call at one shape, which is likely to come again, as a function.");

  py::class_<BoundStream>(m, "Stream", "A stack that is fed block by block.")
      .def(py::init<const BoundStack&, int64_t, bool, int>(), py::arg("stack"), py::arg("batch"),
           py::arg("batch_first"), py::arg("threads"))
      .def_property_readonly("current", &BoundStream::current)
      .def("workspace_bytes", &BoundStream::workspace_bytes)
      .def("bind", &BoundStream::bind)
      .def("run", &BoundStream::run)
      .def("remember_array", &BoundStream::remember_array)
      .def("run_array", &BoundStream::run_array);

  m.def("cuda_architectures", &cuda::architectures, "What this build has CUDA kernels for.");
  m.def("cuda_runtime_version", &cuda::runtime_version, "12090 for 12.9; 0 without CUDA.");
  m.def(
      "cuda_images",
      [] {
        py::list found;
        for (const auto& [architecture, image] : cuda::images()) {
          found.append(py::make_tuple(architecture, py::bytes(image)));
        }
        return found;
      },
      "(architecture, machine code or PTX) of every CUDA module inside.");
  m.def(
      "cuda_report", [] { return std::string(cuda::report_json()); },
      "What the compiler said of the CUDA kernels, as JSON.");
  bind_cuda(m);
  bind_trees(m, kernels);
  bind_normed(m, kernels);
  bind_reservoir(m, &kernels);
}

}  // namespace fastcell
