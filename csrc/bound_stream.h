// A stack that is fed block by block, its states kept between the calls: nothing is allocated, and
// little else done, per call. The memory is Python's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bound_stack.h"

namespace fastcell {

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
    call_ = stack_.plain_call(as(packed), as(workspace));
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

}  // namespace fastcell
