#include "normed_run.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "../cells/normed.h"

namespace fastcell::cuda {
namespace {

struct NormedFacts {
  const char* name;
  const char* type;
  int gates;
};
template <template <class> class Cell>
constexpr NormedFacts facts(const char* name, const char* type) {
  return {name, type, Cell<float>::gates};
}
// As in kernel_names.py.
constexpr NormedFacts kNormedCells[] = {
    facts<cells::NormedLstm>("lstm", "NormedLstm"),
    facts<cells::NormedLstmPeephole>("lstm_peephole", "NormedLstmPeephole"),
    facts<cells::NormedLstmCoupled>("lstm_coupled", "NormedLstmCoupled"),
    facts<cells::NormedLstmCoupledPeephole>("lstm_coupled_peephole", "NormedLstmCoupledPeephole"),
    facts<cells::NormedGru>("gru", "NormedGru"),
};

const NormedFacts& facts_of(const std::string& name) {
  for (const NormedFacts& one : kNormedCells) {
    if (name == one.name) return one;
  }
  throw std::invalid_argument("no CUDA kernels for normalised cell " + name);
}

// A matrix is planned as a cell of one gate.
constexpr CellFacts kMatrix = {"layer normalisation", "", 1, 0, 1, 0, 0, true, 0, false};

std::string matrix_kernel(const char* name, const Plan& plan) {
  return std::string("fastcell::cuda::normed_") + name + "<fastcell::cuda::" + plan.products.type +
         ">";
}

Sweep sweep_of(const Plan& plan, const void* weights, void* operand) {
  Sweep sweep{};
  sweep.side[0].weights = weights;
  sweep.side[0].exchange = operand;
  sweep.hidden = plan.sizes.hidden;
  sweep.directions = 1;
  sweep.width = plan.width;
  sweep.unit_blocks = plan.unit_blocks;
  sweep.tiles = plan.tiles;
  sweep.row_warps = plan.row_warps;
  sweep.unit_warps = plan.unit_warps;
  sweep.k_warps = plan.k_warps;
  return sweep;
}

void launch_product(const Plan& plan, const std::string& kernel, NormedProduct& parameter,
                    int64_t samples, void* stream) {
  const int rows = plan.row_warps * kWarpRows;
  const int tiles = int((samples + rows - 1) / rows);
  parameter.product.batch = samples;
  for (int tile = 0; tile < tiles; tile += plan.tiles_at_once) {
    parameter.product.first_tile = tile;
    const unsigned now = unsigned(std::min(plan.tiles_at_once, tiles - tile));
    const Launch to{kernel.c_str(),
                    {unsigned(plan.unit_blocks), now, 1},
                    kThreads,
                    1,
                    unsigned(plan.shared),
                    false,
                    stream};
    launch(plan.device, to, &parameter);
  }
}

}  // namespace

NormedPlan choose_normed_plan(int device, const std::string& cell, const std::string& products,
                              bool backward, long long steps, long long batch, int hidden,
                              int projection) {
  const NormedFacts& facts = facts_of(cell);
  // Backward, the transposed of a matrix is multiplied by.
  const auto plan = [&](int columns, int along) {
    if (backward) std::swap(columns, along);
    return choose_plan(device, kMatrix, products, {false, steps, batch, columns, along, 1, false},
                       "step");
  };
  std::optional<Plan> projected;
  if (projection > 0) projected = plan(projection, hidden);
  // Behind the product TF32 is float32.
  const char* type = products_facts(products == "tf32" ? "float32" : products).type;
  return {plan(facts.gates * hidden, projection > 0 ? projection : hidden), projected,
          std::string("fastcell::cuda::normed_") + (backward ? "backward" : "forward") +
              "<fastcell::cuda::" + type + ", fastcell::cells::" + facts.type + ">",
          hidden, backward};
}

void run(const NormedPlan& plan, NormedStep step, const Timeline& time, bool reverse,
         const void* weights, const void* projection, void* stream) {
  const Plan& product = plan.product;
  const std::optional<Plan>& projected = plan.projection;
  const Sweep recurrent = sweep_of(product, weights, step.operand);
  const Sweep projecting = projected ? sweep_of(*projected, projection, step.projected) : Sweep{};
  const std::string multiply = matrix_kernel("product", product);
  const std::string project = matrix_kernel("project", product);
  const std::string collect = matrix_kernel("collect", product);

  step.hidden = plan.hidden;
  step.output = plan.backward ? product.sizes.hidden : product.sizes.output;
  step.width = product.width;
  step.projected_width = projected ? projected->width : 0;
  step.tf32 = product.products.tensor && product.products.element == 4;
  step.all_rows = time.rows;
  step.fed = 0;
  const auto launch_recurrent = [&](const std::string& kernel, int64_t samples) {
    NormedProduct parameter{recurrent, step};
    launch_product(product, kernel, parameter, samples, stream);
  };
  const auto launch_projection = [&](const std::string& kernel) {
    NormedProduct parameter{projecting, step};
    launch_product(*projected, kernel, parameter, step.alive, stream);
  };
  const auto launch_norms = [&](int64_t samples) {
    const Launch to{
        plan.kernel.c_str(), {unsigned(samples), 1, 1}, kThreads, 1, kNormedShared, false, stream};
    launch(product.device, to, &step);
  };
  // Samples that a step does not have hand on what the one after it has left.
  const auto launch_collecting = [&] {
    const int64_t samples = std::max<int64_t>(step.alive, step.fed);
    if (projected) {
      launch_recurrent(collect, samples);
    } else {
      launch_norms(samples);
    }
  };
  for (int64_t s = 0; s < time.steps; ++s) {
    const int64_t t = reverse != plan.backward ? time.steps - 1 - s : s;
    const int64_t past = reverse ? t + 1 : t - 1;
    const bool begins = past < 0 || past >= time.steps;
    step.t = t;
    step.first = time.first(t);
    step.alive = time.alive(t);
    step.past_t = past;
    step.past_first = begins ? 0 : time.first(past);
    step.past_alive = begins ? 0 : time.alive(past);
    if (plan.backward) {
      launch_collecting();
      if (projected) {
        launch_projection(multiply);
        launch_norms(step.alive);
      } else {
        launch_recurrent(multiply, step.alive);
      }
      step.fed = step.alive;
    } else {
      launch_recurrent(multiply, step.alive);
      launch_norms(step.alive);
      if (projected) launch_projection(project);
    }
  }
  if (plan.backward) {  // a step that no sample has
    step.alive = 0;
    launch_collecting();
  }
}

}  // namespace fastcell::cuda
