#include "ragged_rows.h"

#include <algorithm>
#include <numeric>

namespace fastcell {

namespace {

void longest_first(int64_t batch, const int64_t* lengths, int64_t* order) {
  std::iota(order, order + batch, 0);
  std::stable_sort(order, order + batch,
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
}

}  // namespace

void ragged_order(int64_t batch, const int64_t* lengths, int64_t* order, int64_t* offsets) {
  longest_first(batch, lengths, order);
  int64_t alive = batch;
  const int64_t longest = batch > 0 ? lengths[order[0]] : 0;
  offsets[0] = 0;
  for (int64_t t = 0; t < longest; ++t) {
    while (lengths[order[alive - 1]] <= t) --alive;
    offsets[t + 1] = offsets[t] + alive;
  }
}

void ragged_rows(int64_t steps, int64_t batch, const int64_t* lengths, bool batch_first,
                 int64_t* order, int64_t* rank, int64_t* sizes, int64_t* rows) {
  longest_first(batch, lengths, order);
  for (int64_t i = 0; i < batch; ++i) rank[order[i]] = i;
  int64_t alive = batch;
  const int64_t longest = batch > 0 ? lengths[order[0]] : 0;
  for (int64_t t = 0; t < longest; ++t) {
    while (lengths[order[alive - 1]] <= t) --alive;
    sizes[t] = alive;
    for (int64_t b = 0; b < alive; ++b) {
      *rows++ = batch_first ? order[b] * steps + t : t * batch + order[b];
    }
  }
}

}  // namespace fastcell
