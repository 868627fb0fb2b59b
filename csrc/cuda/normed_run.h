// Plan and launches of a layer with layer normalisation: one direction, one pass.
#pragma once

#include "../common/stack.h"
#include "normed_step.h"
#include "plan.h"
#include "shared_layout.h"

namespace fastcell::cuda {

struct NormedPlan {
  Plan product;  // its sizes: `hidden` columns, `output` numbers along k
  std::string kernel;
  int hidden;
  bool backward;

  int width() const { return product.width; }
  // Columns and samples with their padding: how weights are packed, how many operands there are.
  int columns() const { return product.unit_blocks * product.unit_warps * kGroup; }
  int samples() const { return product.tiles * product.row_warps * kWarpRows; }
};

// `cell`: "lstm" or "gru". Throws std::invalid_argument for another.
NormedPlan choose_normed_plan(int device, const std::string& cell, const std::string& products,
                              bool backward, long long steps, long long batch, int hidden);

// Runs all steps. `step`: addresses that do not change from step to step. Rows are counted on the
// host: `time`.
void run(const NormedPlan& plan, NormedStep step, const Timeline& time, bool reverse,
         const void* weights, void* stream);

}  // namespace fastcell::cuda
