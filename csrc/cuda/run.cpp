#include "run.h"

namespace fastcell::cuda {

void run(const Plan& plan, Sweep sweep, long long begin, long long end, void* stream) {
  const Sizes& sizes = plan.sizes;
  sweep.steps = sizes.steps;
  sweep.batch = sizes.batch;
  sweep.hidden = sizes.hidden;
  sweep.output = sizes.output;
  sweep.directions = sizes.directions;
  sweep.width = plan.width;
  sweep.projected_width = plan.projected_width;
  sweep.row_warps = plan.row_warps;
  sweep.unit_warps = plan.unit_warps;
  sweep.k_warps = plan.k_warps;
  sweep.unit_blocks = plan.unit_blocks;
  sweep.tiles = plan.tiles;
  sweep.stages = sizes.projected ? kCell | kOutput : kCell;

  const std::string kernel = plan.kernel();
  Launch to{};
  to.kernel = kernel.c_str();
  to.grid[0] = unsigned(plan.unit_blocks);
  to.grid[2] = unsigned(sizes.directions);
  to.block = kThreads;
  to.cluster = plan.place == Place::kCluster ? unsigned(plan.unit_blocks) : 1;
  to.shared = unsigned(plan.shared);
  to.cooperative = plan.place == Place::kGrid;
  to.stream = stream;

  const bool finish = sweep.finish;
  for (int tile = 0; tile < plan.tiles; tile += plan.tiles_at_once) {
    const int left = plan.tiles - tile;
    to.grid[1] = unsigned(left < plan.tiles_at_once ? left : plan.tiles_at_once);
    sweep.first_tile = tile;
    sweep.begin = begin;
    sweep.end = end;
    sweep.finish = finish && end == sizes.steps;
    if (plan.place != Place::kStep) {
      launch(plan.device, to, &sweep);
      continue;
    }
    sweep.finish = false;
    for (long long s = begin; s < end; ++s) {
      sweep.begin = s;
      sweep.end = s + 1;
      if (!sizes.projected) {
        launch(plan.device, to, &sweep);
        continue;
      }
      for (const int stage : {sizes.backward ? kOutput : kCell, sizes.backward ? kCell : kOutput}) {
        sweep.stages = stage;
        launch(plan.device, to, &sweep);
      }
    }
    if (finish && end == sizes.steps) {
      sweep.begin = sweep.end = sizes.steps;
      sweep.finish = true;
      launch(plan.device, to, &sweep);
    }
  }
}

}  // namespace fastcell::cuda
