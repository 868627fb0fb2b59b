// A stack of layers with its kernels: what Python holds per configuration.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cell_options.h"
#include "cpu/engine.h"
#include "pointers.h"

namespace fastcell {

namespace py = pybind11;

// The members of Extras, in their order; 0 for null.
using ExtraPointers = std::array<Pointer, 4>;

// Of a padded batch with lengths: address of the samples' order, how many they are, all steps.
using Padding = std::tuple<Pointer, int64_t, int64_t>;

class BoundStack {
 public:
  BoundStack(const std::string& cell, const std::string& dtype, const std::string& products,
             int64_t input, int64_t hidden, int64_t proj, int layers, int directions, bool bias,
             const CellOptionsTuple& options, int64_t delay);

  const Stack& stack() const { return stack_; }
  int states() const { return kernels_.states; }
  int64_t item_size() const { return stack_.dtype == DType::kFloat32 ? 4 : 8; }
  int64_t packed_bytes() const { return packed_bytes_; }
  int64_t reserve_row_elements() const {
    return ReserveLayout(stack_, kernels_.saved, kernels_.states).row_elements;
  }
  // Tensors of all layers and directions.
  int weight_count() const { return stack_.layers * stack_.directions * stack_.weights_each(); }

  // Where what is kept of one layer has c of all rows: (first element, width), per direction.
  std::vector<std::pair<int64_t, int64_t>> cells_at(int64_t rows) const;

  void pack(const std::vector<Pointer>& weights, Pointer packed, int threads) const;

  // Every call in this way from now on, whatever it costs; 0 groups: as the model chooses again.
  void force_schedule(int direction_groups, int batch_groups, int unit_threads, int layer_groups) {
    forced_ = {direction_groups, batch_groups, unit_threads, layer_groups};
  }
  Schedule schedule(const Timeline& time, int threads, bool barriers, bool wavefront) const;
  py::tuple explain(int64_t steps, int64_t batch, int64_t rows, Pointer offsets, int threads,
                    bool wavefront, bool barriers) const;

  int64_t forward_workspace(int64_t steps, int64_t batch, int64_t rows, bool keep, bool masks,
                            bool recurrent, bool narrow, int threads) const;
  int64_t backward_workspace(int64_t steps, int64_t batch, int64_t rows, bool masks, bool recurrent,
                             int threads) const;

  void forward(int64_t steps, int64_t batch, int64_t rows, Pointer offsets, const Padding& padding,
               Pointer x, int64_t x_step, int64_t x_row, Pointer h0, Pointer c0, Pointer y,
               Pointer cells, Pointer h_final, Pointer c_final, const ExtraPointers& extras,
               Pointer packed, Pointer reserve, Pointer workspace, const std::string& storage,
               int threads) const;
  void backward(int64_t steps, int64_t batch, int64_t rows, Pointer offsets, const Padding& padding,
                Pointer x, int64_t x_step, int64_t x_row, Pointer d_x, Pointer d_y,
                int64_t d_y_step, int64_t d_y_row, Pointer h0, Pointer c0, Pointer d_h_final,
                Pointer d_c_final, Pointer d_h0, Pointer d_c0, const ExtraPointers& extras,
                const std::vector<Pointer>& weights, const std::vector<Pointer>& d_weights,
                Pointer reserve, Pointer workspace, int64_t d_x_step, int64_t d_x_row,
                bool accumulate, Pointer d_cells, int threads) const;

  // Calls that are filled in elsewhere.
  ForwardCall plain_call(const void* packed, void* workspace) const {
    ForwardCall call{};
    call.stack = stack_;
    call.packed = packed;
    call.workspace = workspace;
    return call;
  }
  void run(const ForwardCall& call) const;
  void run(const BackwardCall& call, int threads) const;

 private:
  // Whether a call is over before another thread could take the interpreter's lock.
  bool brief(const Schedule& schedule, int64_t rows) const {
    return schedule.threads() == 1 && rows * packed_bytes_ <= 1 << 18;
  }

  Stack stack_;
  CellKernels kernels_;
  int64_t packed_bytes_ = 0;
  Schedule forced_{};
};

}  // namespace fastcell
