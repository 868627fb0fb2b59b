#include "normed_run.h"

#include <algorithm>
#include <stdexcept>

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

void launch_product(const Plan& plan, const std::string& kernel, Sweep& sweep, void* stream) {
  const int rows = plan.row_warps * kWarpRows;
  const int tiles = int((sweep.batch + rows - 1) / rows);
  for (int tile = 0; tile < tiles; tile += plan.tiles_at_once) {
    sweep.first_tile = tile;
    const unsigned now = unsigned(std::min(plan.tiles_at_once, tiles - tile));
    const Launch to{kernel.c_str(),
                    {unsigned(plan.unit_blocks), now, 1},
                    kThreads,
                    1,
                    unsigned(plan.shared),
                    false,
                    stream};
    launch(plan.device, to, &sweep);
  }
}

}  // namespace

NormedPlan choose_normed_plan(int device, const std::string& cell, const std::string& products,
                              bool backward, long long steps, long long batch, int hidden) {
  const NormedFacts& facts = facts_of(cell);
  const int wide = facts.gates * hidden;
  const int columns = backward ? hidden : wide, along = backward ? wide : hidden;
  const Sizes sizes{false, steps, batch, columns, along, 1, false};
  // Behind the product TF32 is float32.
  const char* type = products_facts(products == "tf32" ? "float32" : products).type;
  return {choose_plan(device, kMatrix, products, sizes, "step"),
          std::string("fastcell::cuda::normed_") + (backward ? "backward" : "forward") +
              "<fastcell::cuda::" + type + ", fastcell::cells::" + facts.type + ">",
          hidden, backward};
}

void run(const NormedPlan& plan, NormedStep step, const Timeline& time, bool reverse,
         const void* weights, void* stream) {
  const Plan& product = plan.product;
  Sweep sweep{};
  sweep.side[0].weights = weights;
  sweep.side[0].exchange = step.operand;
  sweep.y = step.sums;
  sweep.hidden = product.sizes.hidden;
  sweep.directions = 1;
  sweep.width = product.width;
  sweep.unit_blocks = product.unit_blocks;
  sweep.tiles = product.tiles;
  sweep.row_warps = product.row_warps;
  sweep.unit_warps = product.unit_warps;
  sweep.k_warps = product.k_warps;
  const std::string product_kernel =
      std::string("fastcell::cuda::normed_product<fastcell::cuda::") + product.products.type + ">";

  step.hidden = plan.hidden;
  step.width = product.width;
  step.tf32 = product.products.tensor && product.products.element == 4;
  step.all_rows = time.rows;
  step.fed = 0;
  const auto launch_norms = [&](int64_t samples) {
    const Launch to{
        plan.kernel.c_str(), {unsigned(samples), 1, 1}, kThreads, 1, kNormedShared, false, stream};
    launch(product.device, to, &step);
  };
  for (int64_t s = 0; s < time.steps; ++s) {
    const int64_t t = reverse != plan.backward ? time.steps - 1 - s : s;
    const int64_t past = reverse ? t + 1 : t - 1;
    const bool begins = past < 0 || past >= time.steps;
    step.t = t;
    step.first = time.first(t);
    step.alive = sweep.batch = time.alive(t);
    step.past_t = past;
    step.past_first = begins ? 0 : time.first(past);
    step.past_alive = begins ? 0 : time.alive(past);
    if (plan.backward) {
      launch_norms(std::max<int64_t>(step.alive, step.fed));
      launch_product(product, product_kernel, sweep, stream);
      step.fed = step.alive;
    } else {
      launch_product(product, product_kernel, sweep, stream);
      launch_norms(step.alive);
    }
  }
}

}  // namespace fastcell::cuda
