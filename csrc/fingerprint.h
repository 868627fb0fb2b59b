// A hash over weights: notices those that were written without torch's version counter (through
// .data or a NumPy view).
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels_in_use.h"

namespace fastcell {

// `whole`: over all elements; else tensors of more than kSmall give a sample of 64 words, since
// reading them all would cost as much as a step does.
class Hash {
 public:
  void add(const void* from, int64_t count, int64_t item_size, bool whole) {
    constexpr int64_t kSmall = 4096;  // what gradcheck moves element by element is smaller
    if (whole || count <= kSmall) {
      value_ = kernels().hash(from, count * item_size, value_);
    } else {
      add_sample(static_cast<const char*>(from), count * item_size);
    }
  }

  std::uint64_t value() const { return value_; }

 private:
  void add_sample(const char* data, int64_t bytes) {
    constexpr int64_t kSamples = 64;
    const int64_t each = bytes / (8 * kSamples);
    std::uint64_t sample[kSamples];
    for (int64_t i = 0; i < kSamples; ++i) {
      // Anywhere within its part, so that samples do not all fall into one row or column.
      const std::uint64_t random = (std::uint64_t(i) * 0x9E3779B97F4A7C15ull) >> 32;
      const int64_t at = i * each + int64_t((random * std::uint64_t(each)) >> 32);
      std::memcpy(&sample[i], data + at * 8, 8);
    }
    value_ = kernels().hash(sample, sizeof sample, value_);
  }

  std::uint64_t value_ = 0;
};

}  // namespace fastcell
