// 16-bit storage: bfloat16 and float16 to float and back, a register at a time.
//
// Widening is exact. Narrowing rounds to nearest, ties to even; NaN stays NaN.
#pragma once

#include "../common/stack.h"
#include "simd.h"

namespace fastcell {
// Whether the CPU has AVX-512 BF16 and VNNI; set once, by what the CPU is.
extern bool bfloat16_dots, int8_dots;
}  // namespace fastcell

namespace fastcell::FASTCELL_ISA {

struct Narrow {
  static constexpr int lanes = Vec<float>::lanes;
  typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));
  typedef uint32_t Bits __attribute__((vector_size(lanes * 4)));

  static FASTCELL_INLINE Vec<float> from_bits(Bits b) {
    return Vec<float>::from_bits(reinterpret_cast<Vec<float>::Bits>(b));
  }
  static FASTCELL_INLINE Bits to_bits(Vec<float> x) { return reinterpret_cast<Bits>(x.v); }

  // The first n lanes from memory, zero behind them.
  static FASTCELL_INLINE Bits load(const void* p, int n) {
    Halves h{};
    std::memcpy(&h, p, size_t(n < lanes ? n : lanes) * 2);
    return __builtin_convertvector(h, Bits);
  }
  static FASTCELL_INLINE void store(void* p, Bits b, int n) {
    const Halves h = __builtin_convertvector(b, Halves);
    std::memcpy(p, &h, size_t(n < lanes ? n : lanes) * 2);
  }

  // Subnormal numbers may become 0.
  static FASTCELL_INLINE Bits round_bfloat16(Vec<float> x) {
#if defined(__AVX512F__)
    if (bfloat16_dots) {
      __m256i halves;
      asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x.v));
      return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(__mmask16(-1), halves));
    }
#endif
    const Bits bits = to_bits(x);
    const Bits rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
    const Bits nan = (bits >> 16) | 0x40;
    return (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
  }
  static FASTCELL_INLINE Vec<float> widen_bfloat16(Bits h) { return from_bits(h << 16); }

  static FASTCELL_INLINE Bits round_float16(Vec<float> x) {
    const Bits all = to_bits(x);
    const Bits bits = all & 0x7fffffff;
    // Adding 0.5 leaves a subnormal half's bits, rounded, at the end of the sum's.
    const Bits half = Bits{} + 0x3f000000;
    const Bits subnormal = to_bits(from_bits(bits) + from_bits(half)) - half;
    const Bits normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const Bits special = bits > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    const Bits finite = bits < 0x38800000 ? subnormal : normal;
    return (bits >= 0x47800000 ? special : finite) | ((all >> 16) & 0x8000);
  }
  static FASTCELL_INLINE Vec<float> widen_float16(Bits h) {
    const Bits bits = (h & 0x7fff) << 13;
    const Bits exponent = bits & (0x7c00u << 13);
    const Bits normal = bits + (112u << 23);
    const Bits special = normal + (112u << 23);
    const Bits least = Bits{} + (113u << 23);  // 2^-14
    const Bits subnormal = to_bits(from_bits(bits + least) - from_bits(least));
    const Bits finite = exponent == 0 ? subnormal : normal;
    return from_bits((exponent == (0x7c00u << 13) ? special : finite) | ((h & 0x8000) << 16));
  }
};

// The first n lanes of T from memory of that storage, zero behind them; and back.
template <class T>
FASTCELL_INLINE Vec<T> load_stored(const void* p, Storage storage, int n) {
  if constexpr (sizeof(T) == 4) {
    if (storage == Storage::kBFloat16) return Narrow::widen_bfloat16(Narrow::load(p, n));
    if (storage == Storage::kFloat16) return Narrow::widen_float16(Narrow::load(p, n));
  }
  return load_first(static_cast<const T*>(p), n);
}

template <class T>
FASTCELL_INLINE void store_stored(void* p, Storage storage, Vec<T> x, int n) {
  if constexpr (sizeof(T) == 4) {
    if (storage == Storage::kBFloat16) return Narrow::store(p, Narrow::round_bfloat16(x), n);
    if (storage == Storage::kFloat16) return Narrow::store(p, Narrow::round_float16(x), n);
  }
  store_first(static_cast<T*>(p), x, n);
}

}  // namespace fastcell::FASTCELL_ISA
