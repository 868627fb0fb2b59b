// How a block's dynamic shared memory is cut, in bytes from its begin; for kernels and their host.
#pragma once

#include "../common/portable.h"
#include "sweep.h"

namespace fastcell::cuda {

constexpr int kChunkBytes = 64;  // along k: what a lane's row or column takes at a time
constexpr int kGroup = 8;        // columns that a warp multiplies at least
constexpr int kWarpRows = 16;    // rows that it multiplies

constexpr int kChunkWeights = kGroup * kChunkBytes;  // bytes of a group of columns in one chunk

// A resident kernel's weights: each warp holds the first chunks of its part of k in registers, as
// many as there are here, the rest lies in shared memory. Without tensor cores, whose lanes share
// what they hold, registers would hold the same numbers many times.
constexpr FASTCELL_INLINE int held_chunks(bool resident, bool tensor, int groups) {
  // (4 registers for a chunk and group; with more than these, kernels spill.)
  return !resident || !tensor ? 0 : groups == 1 ? 10 : 16 / groups;
}

// Numbers from one row of what is exchanged to the next, of rows of `width`. In shared memory,
// where a cluster has it, a row is an odd number of chunks: the rows that lanes read at the same
// time then lie in different banks.
constexpr FASTCELL_INLINE int row_stride(int width, int element, bool cluster) {
  const int chunk = kChunkBytes / element;
  return cluster && width > 0 && width / chunk % 2 == 0 ? width + chunk : width;
}

struct SharedLayout {
  long long weights, projection;  // their packed bytes of one block, 0 unless resident
  long long hidden, projected;    // what is exchanged, of a cluster; hidden twice
  long long sums, stopped, total;

  FASTCELL_INLINE SharedLayout(int row_warps, int unit_warps, int k_warps, int width,
                               int projected_width, bool resident, bool cluster, int groups,
                               int held, int element, int real) {
    const long long rows = row_warps * kWarpRows, units = unit_warps * kGroup;
    const long long left = each_chunks(width, element, k_warps) - held;
    weights = resident && left > 0 ? unit_warps * k_warps * left * groups * kChunkWeights : 0;
    projection = resident ? units * projected_width * element : 0;
    hidden = weights + projection;
    projected = hidden + (cluster ? 2 * rows * row_stride(width, element, true) * element : 0);
    sums = projected + (cluster ? rows * row_stride(projected_width, element, true) * element : 0);
    stopped = sums + k_warps * groups * rows * units * real;
    total = stopped + 16;
  }
  // Chunks of one warp's part of k.
  static FASTCELL_INLINE int each_chunks(int width, int element, int k_warps) {
    return (width * element / kChunkBytes + k_warps - 1) / k_warps;
  }
};

}  // namespace fastcell::cuda
