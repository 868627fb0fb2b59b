// Plan and launches of a layer with layer normalisation: one direction, one pass.
#pragma once

#include <optional>

#include "../common/stack.h"
#include "normed_step.h"
#include "plan.h"
#include "shared_layout.h"

namespace fastcell::cuda {

struct NormedPlan {
  // Their sizes: `hidden` columns, `output` numbers along k.
  Plan product;
  std::optional<Plan> projection;
  std::string kernel;
  int hidden;
  bool backward;
};

// Columns and samples with their padding: how weights are packed, how many operands there are.
inline int columns_of(const Plan& product) {
  return product.unit_blocks * product.unit_warps * kGroup;
}
inline int samples_of(const Plan& product) { return product.tiles * product.row_warps * kWarpRows; }

// `projection`: numbers of h, or 0 without one. Throws std::invalid_argument for a cell without
// kernels.
NormedPlan choose_normed_plan(int device, const std::string& cell, const std::string& products,
                              bool backward, long long steps, long long batch, int hidden,
                              int projection);

// Runs all steps. `step`: addresses that do not change from step to step. Rows are counted on the
// host: `time`. The backward pass leaves the gradients of the states before the first step.
void run(const NormedPlan& plan, NormedStep step, const Timeline& time, bool reverse,
         const void* weights, const void* projection, void* stream);

}  // namespace fastcell::cuda
