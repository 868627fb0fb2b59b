#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "../cells/gru.h"
#include "../cells/gru_before.h"
#include "../cells/gru_options.h"
#include "../cells/leaky.h"
#include "../cells/lstm.h"
#include "../cells/lstm_variants.h"
#include "../cells/rnn.h"
#include "../cells/rnn_options.h"
#include "shared_layout.h"

namespace fastcell::cuda {
namespace {

template <template <class> class Cell>
constexpr CellFacts facts(const char* name, const char* type, bool persistent) {
  using C = Cell<float>;
  return {name,     type,          C::gates,     C::apart,  C::states,
          C::saved, C::parameters, C::recurrent, C::second, persistent};
}

// As in kernel_names.py.
constexpr CellFacts kCells[] = {
    facts<cells::RnnTanh>("rnn_tanh", "RnnTanh", true),
    facts<cells::RnnRelu>("rnn_relu", "RnnRelu", true),
    facts<cells::Lstm>("lstm", "Lstm", true),
    facts<cells::Gru>("gru", "Gru", true),
    facts<cells::LeakyTanh>("leaky_tanh", "LeakyTanh", false),
    facts<cells::LeakyRelu>("leaky_relu", "LeakyRelu", false),
    facts<cells::LstmPeephole>("lstm_peephole", "LstmPeephole", false),
    facts<cells::LstmCoupled>("lstm_coupled", "LstmCoupled", false),
    facts<cells::LstmCoupledPeephole>("lstm_coupled_peephole", "LstmCoupledPeephole", false),
    facts<cells::RnnGeneral>("rnn_general", "RnnGeneral", false),
    facts<cells::Independent>("independent", "Independent", false),
    facts<cells::LstmGeneral>("lstm_general", "LstmGeneral", false),
    facts<cells::LstmPeepholeGeneral>("lstm_peephole_general", "LstmPeepholeGeneral", false),
    facts<cells::LstmCoupledGeneral>("lstm_coupled_general", "LstmCoupledGeneral", false),
    facts<cells::LstmCoupledPeepholeGeneral>("lstm_coupled_peephole_general",
                                             "LstmCoupledPeepholeGeneral", false),
    facts<cells::GruGeneral>("gru_general", "GruGeneral", false),
    facts<cells::GruBefore>("gru_before", "GruBefore", false),
};
constexpr ProductsFacts kProductsFacts[] = {
    {"float64", "Float64", 8, 8, false, false, 150, 75},
    {"float32", "Float32", 4, 4, true, false, 75, 75},
    {"tf32", "Tf32", 4, 4, true, true, 25, 80},
    {"bfloat16", "Brain", 2, 4, true, true, 25, 80},
    {"float16", "Half", 2, 4, true, true, 25, 75},
};
constexpr const char* kPlaceTypes[] = {"Step", "Grid", "Cluster"};

// What a step takes besides its products: a launch; flags through the second-level cache; a
// barrier of a cluster. Estimates from the hardware's latencies, in ns.
constexpr double kStepTime[] = {4000, 2000, 1000};

template <class Facts, size_t n>
const Facts& find(const Facts (&all)[n], const std::string& name, const char* what) {
  for (const Facts& one : all) {
    if (name == one.name) return one;
  }
  throw std::invalid_argument("no CUDA kernels for " + std::string(what) + " " + name);
}

int up(long long n, int multiple) { return int((n + multiple - 1) / multiple * multiple); }
int parts(long long n, int size) { return int((n + size - 1) / size); }

Launch launch_of(const Plan& plan, const std::string& kernel, int tiles) {
  const bool cluster = plan.place == Place::kCluster;
  return {kernel.c_str(),
          {unsigned(plan.unit_blocks), unsigned(tiles), unsigned(plan.sizes.directions)},
          kThreads,
          cluster ? unsigned(plan.unit_blocks) : 1u,
          unsigned(plan.shared),
          plan.place == Place::kGrid,
          nullptr};
}

// Fills in what follows from a place and a division of the work. False if it does not fit.
bool complete(Plan& plan, const Limits& limits) {
  const Sizes& sizes = plan.sizes;
  const int rows = plan.row_warps * kWarpRows, units = plan.unit_warps * kGroup;
  if (rows * units > kPairs * kThreads) return false;
  plan.k_warps = kWarps / (plan.row_warps * plan.unit_warps);
  plan.tiles = parts(sizes.batch, rows);
  plan.unit_blocks = parts(sizes.hidden, units);
  if (plan.place == Place::kCluster) {
    int size = 1;  // clusters are of 1, 2, 4, 8 or 16 blocks
    while (size < plan.unit_blocks) size *= 2;
    if (size > limits.max_cluster) return false;
    plan.unit_blocks = size;
  }
  const bool resident = plan.place != Place::kStep;
  const int groups = sizes.backward ? 1 : plan.cell.gates - plan.cell.second;
  const SharedLayout layout(plan.row_warps, plan.unit_warps, plan.k_warps, plan.width,
                            plan.projected_width, resident, plan.place == Place::kCluster, groups,
                            held_chunks(resident, plan.products.tensor, groups),
                            plan.products.element, plan.products.real);
  plan.stride = row_stride(plan.width, plan.products.element, plan.place == Place::kCluster);
  plan.projected_stride =
      row_stride(plan.projected_width, plan.products.element, plan.place == Place::kCluster);
  if (layout.total > limits.shared_per_block) return false;
  plan.shared = int(layout.total);
  plan.tiles_at_once = std::min(plan.tiles, 65535);  // of a grid's second dimension

  int at_once = limits.multiprocessors;  // blocks, or those of all clusters
  if (plan.place != Place::kStep) {
    at_once = resident_blocks(plan.device, launch_of(plan, plan.kernel(), 1));
    const int each = plan.unit_blocks * sizes.directions;
    if (at_once < (plan.place == Place::kGrid ? each : plan.unit_blocks)) return false;
    if (plan.place == Place::kGrid) {
      plan.tiles_at_once = std::min(plan.tiles, at_once / each);
    }
  }
  const double blocks = double(plan.unit_blocks) * plan.tiles * sizes.directions;
  plan.at_once = int(at_once / blocks);
  const double waves = std::max(1.0, blocks / at_once);
  const auto product = [&](int width, int columns) {
    const int chunks = width * plan.products.element / kChunkBytes;
    return parts(chunks, plan.k_warps) * columns * plan.products.chunk_time;
  };
  const double base = kStepTime[int(plan.place)];
  double step = base + waves * product(plan.width, groups);
  if (sizes.projected) step += base + waves * product(plan.projected_width, 1);
  // A grid's tiles that do not fit at once run one after another, all steps of each.
  if (plan.place == Place::kGrid) {
    step += base * (parts(plan.tiles, plan.tiles_at_once) - 1);
  } else if (plan.place == Place::kCluster) {
    step += base * (int(waves + 0.999) - 1);
  }
  plan.time = step * double(sizes.steps);
  return true;
}

}  // namespace

const CellFacts& cell_facts(const std::string& name) { return find(kCells, name, "cell"); }
const ProductsFacts& products_facts(const std::string& name) {
  return find(kProductsFacts, name, "products of");
}

std::string Plan::kernel() const {
  const auto qualified = [](const char* space, const char* type) {
    return "fastcell::" + std::string(space) + "::" + type;
  };
  return qualified("cuda", sizes.backward ? "backward<" : "forward<") +
         qualified("cuda", products.type) + ", " + qualified("cells", cell.type) + ", " +
         qualified("cuda", kPlaceTypes[int(place)]) + ">";
}

Plan choose_plan(int device, const CellFacts& cell, const std::string& products, const Sizes& sizes,
                 const std::string& wanted) {
  const Limits limit = limits(device);
  Plan plan{};
  plan.cell = cell;
  plan.products = products_facts(products);
  plan.sizes = sizes;
  plan.device = device;
  if (limit.capability < plan.products.capability) {
    const auto text = [](int n) { return std::to_string(n / 10) + "." + std::to_string(n % 10); };
    throw std::invalid_argument("products of " + products + " need a GPU of compute capability " +
                                text(plan.products.capability) + ", got " + text(limit.capability));
  }
  const int chunk = kChunkBytes / plan.products.element;
  const int gates_width =
      up(up(sizes.hidden, kGroup) * (plan.cell.gates - plan.cell.second), chunk);
  plan.width = sizes.backward ? gates_width : up(sizes.output, chunk);
  if (sizes.projected)
    plan.projected_width = up(sizes.backward ? sizes.output : sizes.hidden, chunk);

  Plan best{};
  bool found = false;
  for (const Place place : {Place::kStep, Place::kGrid, Place::kCluster}) {
    if (!wanted.empty() && wanted != kPlaceNames[int(place)]) continue;
    if (place != Place::kStep && !(plan.products.persistent && plan.cell.persistent)) continue;
    if (place != Place::kStep && wanted.empty() && sizes.steps == 1) continue;  // nothing to keep
    if (place == Place::kGrid && !limit.cooperative) continue;
    if (place == Place::kCluster && limit.max_cluster == 1) continue;
    plan.place = place;
    for (plan.row_warps = 1; plan.row_warps <= kWarps; plan.row_warps *= 2) {
      // More rows than samples are of no use.
      if (plan.row_warps > 1 && plan.row_warps * kWarpRows / 2 >= sizes.batch) break;
      for (plan.unit_warps = 1; plan.unit_warps * plan.row_warps <= kWarps; plan.unit_warps *= 2) {
        if (!complete(plan, limit)) continue;
        if (!found || plan.time < best.time) best = plan;
        found = true;
      }
    }
  }
  if (!found) {
    throw std::invalid_argument("no plan for " + std::string(cell.name) + " with products of " +
                                products + ", hidden size " + std::to_string(sizes.hidden) +
                                ", batch " + std::to_string(sizes.batch) +
                                (wanted.empty() ? "" : " in place '" + wanted + "'"));
  }
  return best;
}

}  // namespace fastcell::cuda
