// Products of rows by packed weights, two of them in one launch.
#pragma once

#include "products.h"
#include "tree_level.h"

namespace fastcell::cuda {

template <class P>
FASTCELL_KERNEL row_products(const FASTCELL_KERNEL_PARAMETER RowProducts p) {
  using E = typename P::Element;
  using R = typename P::Real;
  static_assert(kProductRowWarps * kProductParts == kWarps && kProductRows == 2 * kWarpRows &&
                    kProductColumns == kProductGroups * kGroup,
                "");
  constexpr int kChunk = kProductGroups * kChunkWeights;

  const bool second = block(0) >= p.part[0].tiles;
  const RowProduct& part = p.part[second];
  const Index first_row = Index(block(0) - (second ? p.part[0].tiles : 0)) * kProductRows;
  const int first_column = block(1) * kProductColumns;
  if (first_column >= part.columns) return;  // the other product has more

  const int row_warp = thread() / 32 / kProductParts, k_part = thread() / 32 % kProductParts;
  const int chunks = part.width * int(sizeof(E)) / kChunkBytes;
  const int each = (chunks + kProductParts - 1) / kProductParts;
  const int first = k_part * each, last = first + each < chunks ? first + each : chunks;
  const Index row_bytes = Index(part.width) * Index(sizeof(E));
  const char* const rows = static_cast<const char*>(part.rows) +
                           (first_row + row_warp * kWarpRows + (lane() >> 2)) * row_bytes;
  const char* const weights =
      static_cast<const char*>(part.weights) + Index(block(1)) * chunks * kChunk;
  R sums[kProductGroups][4] = {};
  const auto load = [](const char* at) { return load16(at); };
#pragma unroll P::kUnroll
  for (int chunk = first; chunk < last; ++chunk) {
    P::template chunk<kProductGroups>(sums, rows + Index(chunk) * kChunkBytes, row_bytes,
                                      weights + Index(chunk) * kChunk, load);
  }

  // The parts of k meet in shared memory, and are added in order.
  R* const meeting = reinterpret_cast<R*>(shared_memory());  // [part][row][column]
  constexpr int kOne = kProductRows * kProductColumns;
  R* const own = meeting + k_part * kOne +
                 (row_warp * kWarpRows + (lane() >> 2)) * kProductColumns + 2 * (lane() & 3);
#pragma unroll
  for (int n = 0; n < kProductGroups; ++n) {
    own[n * kGroup] = sums[n][0];
    own[n * kGroup + 1] = sums[n][1];
    own[8 * kProductColumns + n * kGroup] = sums[n][2];
    own[8 * kProductColumns + n * kGroup + 1] = sums[n][3];
  }
  block_barrier();
#pragma unroll
  for (int i = thread(); i < kOne; i += kThreads) {
    const Index row = first_row + i / kProductColumns;
    const int column = first_column + i % kProductColumns;
    if (row >= part.count || column >= part.columns) continue;
    R sum = meeting[i];
#pragma unroll
    for (int k = 1; k < kProductParts; ++k) sum = sum + meeting[k * kOne + i];
    static_cast<R*>(part.to)[row * part.columns + column] = sum;
  }
}

}  // namespace fastcell::cuda
