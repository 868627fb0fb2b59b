#include "bound_stream.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "c_function.h"

namespace fastcell {

BoundStream::BoundStream(const std::vector<StageOf>& stages, int64_t features, bool float64,
                         int64_t batch, bool batch_first, int threads)
    : kernels_(kernels().linear[float64]),
      features_(features),
      item_size_(float64 ? 8 : 4),
      batch_(batch),
      batch_first_(batch_first),
      threads_(threads) {
  for (const StageOf& given : stages) {
    Stage stage{};
    if (const auto* found = std::get_if<const BoundStack*>(&given)) {
      const BoundStack* const stack = *found;
      if (!stack || stack->stack().input != features || stack->item_size() != item_size_) {
        throw std::invalid_argument("a stream's stack does not fit what comes before it");
      }
      stage.stack.emplace(*stack);
      features = stack->stack().directions * stack->stack().output;
    } else if (const auto* found = std::get_if<const BoundLinear*>(&given)) {
      const BoundLinear* const linear = *found;
      if (!linear || linear->in != features) {
        throw std::invalid_argument("a stream's linear layer does not fit what comes before it");
      }
      stage.linear.emplace(*linear);
      features = linear->out;
    } else {
      stage.activation = activation_named(std::get<std::string>(given));
    }
    stage.features = features;
    stages_.push_back(std::move(stage));
  }
  if (stages_.empty()) throw std::invalid_argument("a stream has no stages");
}

BoundStream::Buffers::Buffers(const BoundStream& stream, int64_t steps, Arena& arena) {
  int64_t widest = 0, stacks = 0;
  for (size_t i = 0; i < stream.stages_.size(); ++i) {
    const Stage& stage = stream.stages_[i];
    if (i + 1 < stream.stages_.size()) widest = std::max(widest, stage.features);
    if (!stage.stack) continue;
    stacks = std::max(
        stacks, stage.stack->forward_workspace(steps, stream.batch_, steps * stream.batch_, false,
                                               false, false, false, stream.threads_));
  }
  for (void*& one : between) {
    one = arena.take<char>(steps * stream.batch_ * widest * stream.item_size_);
  }
  this->stacks = arena.take<char>(stacks);
}

int64_t BoundStream::workspace_bytes(int64_t steps) const {
  Arena arena(nullptr);
  Buffers(*this, steps, arena);
  return arena.used();
}

void BoundStream::bind(const std::vector<Memory>& memory, Pointer workspace, int64_t most_steps,
                       Pointer output, py::object owners) {
  if (memory.size() != stages_.size()) throw std::invalid_argument("bind: memory for each stage");
  Arena arena(as(workspace));
  const Buffers buffers(*this, most_steps, arena);
  size_t last = 0;
  for (size_t i = 0; i < stages_.size(); ++i) last = writes(i) ? i : last;
  int next = 0;
  void* target = nullptr;
  for (size_t i = 0; i < stages_.size(); ++i) {
    Stage& stage = stages_[i];
    const auto& [packed, states] = memory[i];
    if (writes(i)) target = i == last ? as(output) : buffers.between[next++ % 2];
    stage.output = target;
    stage.packed = as(packed);
    stage.scheduled_steps = -1;
    if (!stage.stack) continue;
    if (int(states.size()) != stage.stack->states()) {
      throw std::invalid_argument("bind: wrong number of states");
    }
    stage.call = stage.stack->plain_call(stage.packed, buffers.stacks);
    stage.call.y = target;
    for (size_t k = 0; k < states.size(); ++k) {
      stage.call.state[k] = as(current_ ? states[k].second : states[k].first);
      stage.call.final_state[k] = as(current_ ? states[k].first : states[k].second);
    }
  }
  most_steps_ = most_steps;
  owners_ = std::move(owners);
  heard_ = py::object();
}

void BoundStream::run(Pointer x, int64_t steps, int64_t x_step, int64_t x_row) {
  if (steps < 1 || steps > most_steps_) throw std::invalid_argument("run: too many steps");
  const bool barriers = !crowded();
  if (barriers != barriers_) {
    for (Stage& stage : stages_) stage.scheduled_steps = -1;
    barriers_ = barriers;
  }
  RowMap<const char> rows{as<const char>(x), x_step, x_row, false};
  for (Stage& stage : stages_) {
    if (stage.stack) {
      run_stack(stage, rows, steps);
    } else if (stage.linear) {
      run_linear(stage, rows, steps);
    } else {
      run_activation(stage, rows, steps);
    }
    rows = {static_cast<const char*>(stage.output), batch_ * stage.features, stage.features, false};
  }
  current_ ^= 1;
}

void BoundStream::run_stack(Stage& stage, const RowMap<const char>& x, int64_t steps) {
  ForwardCall& call = stage.call;
  if (steps != stage.scheduled_steps) {
    call.time = {steps, batch_, steps * batch_, nullptr};
    call.schedule = stage.stack->schedule(call.time, threads_, barriers_, true);
    stage.scheduled_steps = steps;
  }
  call.x = x;
  stage.stack->run(call);
  for (int i = 0; i < kMaxStates; ++i) {
    void* const next = call.final_state[i];
    call.final_state[i] = const_cast<void*>(call.state[i]);
    call.state[i] = next;
  }
}

void BoundStream::run_linear(const Stage& stage, const RowMap<const char>& x, int64_t steps) const {
  const BoundLinear& linear = *stage.linear;
  const int64_t rows = steps * batch_;
  struct Job {
    const BoundLinear& linear;
    LinearCall call;
  } job{linear, {linear.in, linear.out, steps, batch_, x, stage.packed, stage.output}};
  // Less is over before another thread has begun.
  constexpr int64_t kLittle = 1 << 20;
  if (threads_ == 1 || rows * linear.in * linear.out < kLittle) {
    return linear.run(job.call, 0, rows);
  }
  const py::gil_scoped_release release;
  run_team(
      threads_,
      [](const Team& team, Barrier*, const void* context) {
        const Job& job = *static_cast<const Job*>(context);
        const Range mine = part(job.call.steps * job.call.batch, team.index, team.size);
        job.linear.run(job.call, mine.begin, mine.end);
      },
      &job);
}

void BoundStream::run_activation(const Stage& stage, const RowMap<const char>& x,
                                 int64_t steps) const {
  const int64_t rows = steps * batch_, n = stage.features;
  char* const to = static_cast<char*>(stage.output);
  if (x.base == to) return kernels_.activate(stage.activation, to, to, rows * n);
  for (int64_t r = 0; r < rows; ++r) {
    kernels_.activate(stage.activation, x.base + x.offset(r / batch_, r % batch_, r) * item_size_,
                      to + r * n * item_size_, n);
  }
}

void BoundStream::remember(const py::object& array, const py::object& heard, int64_t steps) {
  if (!py::isinstance<py::array>(array)) throw std::invalid_argument("remember: not an array");
  array_type_ = py::type::of(array);
  array_dtype_ = array.attr("dtype");
  array_rank_ = py::reinterpret_borrow<py::array>(array).ndim();
  array_steps_ = steps;
  heard_ = heard;
}

py::object BoundStream::run_again(PyObject* block) {
  if (!heard_ || Py_TYPE(block) != reinterpret_cast<PyTypeObject*>(array_type_.ptr())) {
    return py::none();
  }
  const auto& array = *py::detail::array_proxy(block);
  const int rank = array.nd;
  // (An array that was pickled has a dtype of its own, which is equal.)
  const auto same_dtype = [&] {
    return array.descr == array_dtype_.ptr() ||
           py::reinterpret_borrow<py::object>(array.descr).equal(array_dtype_);
  };
  if (rank != array_rank_ || !same_dtype() || array.dimensions[rank - 1] != features_ ||
      (features_ > 1 && array.strides[rank - 1] != item_size_)) {
    return py::none();
  }
  int64_t steps = 1, batch = 1, step = 0, row = 0;
  for (int i = 0; i < rank - 1; ++i) {
    if (array.strides[i] % item_size_ != 0) return py::none();
    if (rank == 2 || (i == 0) != batch_first_) {
      steps = array.dimensions[i];
      step = array.strides[i] / item_size_;
    } else {
      batch = array.dimensions[i];
      row = array.strides[i] / item_size_;
    }
  }
  if (steps != array_steps_ || batch != batch_) return py::none();
  const py::object heard = heard_;  // another call may come while the interpreter is free
  run(reinterpret_cast<Pointer>(array.data), steps, step, row);
  return heard;
}

namespace {
struct Again {
  py::object owner;
  BoundStream* stream;
};
}  // namespace

PyObject* BoundStream::again_entry(PyObject* capsule, PyObject* block) {
  return guarded([&] {
    return static_cast<Again*>(PyCapsule_GetPointer(capsule, nullptr))->stream->run_again(block);
  });
}

py::object BoundStream::again(const py::object& self) {
  static PyMethodDef method = {"again", &again_entry, METH_O, nullptr};
  auto* const context = new Again{self, self.cast<BoundStream*>()};
  const py::capsule capsule(context, [](void* p) { delete static_cast<Again*>(p); });
  return owned(PyCFunction_New(&method, capsule.ptr()));
}

}  // namespace fastcell
