// From the lengths of a padded batch's samples to the rows that exist, as a packed sequence has
// them.
#pragma once

#include <cstdint>

namespace fastcell {

// Of `batch` samples: `order` (batch), the longest first, equal ones in their own order; `offsets`
// (longest + 1), how many rows the steps before each have.
void ragged_order(int64_t batch, const int64_t* lengths, int64_t* order, int64_t* offsets);

// The same for lengths in [0, steps]; also `rank` (batch), each sample's place in that order;
// `sizes` (longest), the samples of each step; `rows` (sum of lengths), step by step, row
// t * batch + sample of a time-major tensor or sample * steps + t of a batch-first one.
void ragged_rows(int64_t steps, int64_t batch, const int64_t* lengths, bool batch_first,
                 int64_t* order, int64_t* rank, int64_t* sizes, int64_t* rows);

}  // namespace fastcell
