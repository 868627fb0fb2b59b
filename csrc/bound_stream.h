// Layers that are fed block by block, their states kept between the calls: nothing is allocated,
// and little else done, per call. The memory is Python's.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bound_linear.h"
#include "bound_stack.h"

namespace fastcell {

class BoundStream {
 public:
  // What a block goes through in turn: a stack, a linear layer, or an activation by its name.
  using StageOf = std::variant<const BoundStack*, const BoundLinear*, std::string>;
  // A stage's memory: what was packed, and of each state (h, and c) two buffers (L, B, features).
  using Memory = std::pair<Pointer, std::vector<std::pair<Pointer, Pointer>>>;

  BoundStream(const std::vector<StageOf>& stages, int64_t features, bool float64, int64_t batch,
              bool batch_first, int threads);

  int64_t workspace_bytes(int64_t steps) const;

  // output: (most_steps, B, features); owners: of all that memory, kept with it.
  void bind(const std::vector<Memory>& memory, Pointer workspace, int64_t most_steps,
            Pointer output, py::object owners);

  // Which of the states' two buffers holds them now.
  int current() const { return current_; }

  // x: (steps, B, I) at these strides, in elements.
  void run(Pointer x, int64_t steps, int64_t x_step, int64_t x_row);

  // The block that has just run was this NumPy array, and gave this.
  void remember(const py::object& array, const py::object& heard, int64_t steps);

  // A function of a block: of an array like the remembered one (type, dtype, shape) it returns,
  // once run, what is remembered with it; else None, and nothing was done. (To look that up in
  // Python, or through the buffer protocol, takes several times as long as a small step.)
  static py::object again(const py::object& self);

 private:
  struct Stage {
    std::optional<BoundStack> stack;
    std::optional<BoundLinear> linear;
    Activation activation;  // where it is neither
    int64_t features;       // of its output
    ForwardCall call{};     // of a stack
    const void* packed = nullptr;
    void* output = nullptr;
    int64_t scheduled_steps = -1;
  };

  static PyObject* again_entry(PyObject* capsule, PyObject* block);
  py::object run_again(PyObject* block);

  void run_stack(Stage& stage, const RowMap<const char>& x, int64_t steps);
  void run_linear(const Stage& stage, const RowMap<const char>& x, int64_t steps) const;
  void run_activation(const Stage& stage, const RowMap<const char>& x, int64_t steps) const;

  // Whether a stage writes elsewhere than it reads: all but activations, which change what another
  // stage has written, unless they come first.
  bool writes(size_t i) const { return i == 0 || stages_[i].stack || stages_[i].linear; }
  struct Buffers {
    void* between[2];  // outputs that another stage reads
    void* stacks;      // what a stack works with
    Buffers(const BoundStream& stream, int64_t steps, Arena& arena);
  };

  std::vector<Stage> stages_;
  const LinearKernels& kernels_;
  int64_t features_, item_size_, batch_;
  bool batch_first_;
  int threads_;
  py::object owners_;
  py::object array_type_, array_dtype_, heard_;  // null: no array is remembered
  int array_rank_ = 0;
  int64_t array_steps_ = 0;
  int64_t most_steps_ = 0;
  bool barriers_ = true;
  int current_ = 0;
};

}  // namespace fastcell
