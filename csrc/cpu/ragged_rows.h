// From the lengths of a padded batch's samples to the rows that exist, as a packed sequence has them.
#pragma once

#include <cstdint>

namespace fastcell {

// Of `batch` samples with lengths in [0, steps]: `order` (batch), the longest first, equal ones XX (longest), the samples of each step; `rows` (sum of lengths), step by step, row
// t * batch + sample of a time-major tensor or sample * steps + t of a batch-first one.
void ragged_rows(int64_t steps, int64_t batch, const int64_t* lengths, bool batch_first,
                 int64_t* order, int64_t* rank, int64_t* sizes, int64_t* rows);

}  // namespace fastcell
