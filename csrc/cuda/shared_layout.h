// How a block's dynamic shared memory is cut, in bytes from its begin; for kernels and their host.
#pragma once

#include "../common/portable.h"
#include "sweep.h"

namespace fastcell::cuda {

constexpr int kChunkBytes = 64;  // along k: what a lane's row or column takes at a time
constexpr int kGroup = 8;        // columns that a warp multiplies at least
constexpr int kWarpRows = 16;    // rows that it multiplies

struct SharedLayout {
  long long weights, projection;  // their packed bytes of one block, 0 unless resident
  long long hidden, projected;    // what is exchanged, of a cluster; hidden twice
  long long sums, stopped, total;

  FASTCELL_INLINE SharedLayout(int row_warps, int unit_warps, int k_warps, int width,
                               int projected_width, bool resident, bool cluster, int groups,
                               int element, int real) {
    const long long rows = row_warps * kWarpRows, units = unit_warps * kGroup;
    weights = resident ? units * groups * width * element : 0;
    projection = resident ? units * projected_width * element : 0;
    hidden = weights + projection;
    projected = hidden + (cluster ? 2 * rows * width * element : 0);
    sums = projected + (cluster ? rows * projected_width * element : 0);
    stopped = sums + k_warps * groups * rows * units * real;
    total = stopped + 16;
  }
};

}  // namespace fastcell::cuda
