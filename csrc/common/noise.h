// Random bits that are a function of where they are used, so that nothing is stored for the
// backward pass, and no order of the work changes them. A hash in counter mode: each number is the
// finalizer of MurmurHash3 (Appleby, 2011) applied to key and counter.
//
// A row's key is mixed well, a unit's number but spread: one finalizer per draw is what a step can
// pay for.
#pragma once

#include "portable.h"

namespace fastcell::noise {

using Bits = unsigned int;  // 32 of them
using Counter = unsigned long long;

// B: Bits, or a vector of them.
template <class B>
FASTCELL_INLINE B mix(B x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Of one state of a layer and direction.
FASTCELL_INLINE Bits state_key(Counter seed, Bits layer, Bits state) {
  Bits key = mix(Bits(seed));
  key = mix(key ^ Bits(seed >> 32));
  return mix(key ^ (2 * layer + state));
}

// Of one row of that.
FASTCELL_INLINE Bits row_key(Bits state_key, Counter row) {
  return mix(mix(state_key ^ Bits(row)) ^ Bits(row >> 32));
}

// Of one unit: all 32-bit numbers with the same probability.
template <class B>
FASTCELL_INLINE B draw(Bits key, B unit) {
  return mix(unit * 0x9e3779b9u ^ key);
}

// Draws below it have this probability.
FASTCELL_INLINE Bits threshold(double probability) {
  return probability >= 1 ? ~Bits(0) : Bits(probability * 4294967296.0);
}

}  // namespace fastcell::noise
