// A hash of memory, by which weights that were written past torch's version counter are noticed.
#pragma once

#include "simd.h"

namespace fastcell::FASTCELL_ISA {

// Lanes of 32 bits that mix words of their own: of what a lane had, no two words give the same, so
// that any one change shows. The shift brings the upper bits down, without which a changed sign
// would stay in the top bit, and two would cancel.
inline uint64_t hash_bytes(const void* from, int64_t bytes, uint64_t hash) {
  using Words = typename Raw<float>::counters;
  constexpr int kWays = 4;  // side by side: one would wait for its own products
  constexpr int64_t kBlock = kWays * int64_t(sizeof(Words));
  Words ways[kWays];
  for (int way = 0; way < kWays; ++way) ways[way] = Words{} + uint32_t(way + 1);
  const auto add = [&](const char* block) {
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) {
      Words words;
      std::memcpy(&words, block + way * sizeof words, sizeof words);
      words = (words ^ ways[way]) * 0x9e3779b1u;
      ways[way] = words ^ (words >> 15);
    }
  };
  const char* data = static_cast<const char*>(from);
  int64_t left = bytes;
  for (; left >= kBlock; left -= kBlock, data += kBlock) add(data);
  if (left > 0) {
    char rest[kBlock] = {};
    std::memcpy(rest, data, size_t(left));
    add(rest);
  }
  uint64_t lanes[kBlock / 8];
  std::memcpy(lanes, ways, sizeof lanes);
  for (uint64_t lane : lanes) {
    hash = (hash ^ lane) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace fastcell::FASTCELL_ISA
