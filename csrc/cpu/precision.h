// In which precision the forward pass multiplies (Products in common/stack.h).
//
// A precision makes rows that its product takes (prepare), packs weights into panels to match, and
// multiplies such rows by such a panel: c (+)= a panel, sums in T. Rows and panels go in groups of
// values of k, which one instruction adds up where the CPU has it; where not, the same numbers are
// multiplied exactly, and the sums differ by rounding alone (8-bit ones not at all).
#pragma once

#include "narrow.h"
#include "panels.h"

namespace fastcell::FASTCELL_ISA {

// Whole cache lines, and rows that do not all fall into the same few sets of a cache.
constexpr int64_t prepared_row_bytes(int64_t bytes) {
  const int64_t padded = (bytes + 63) / 64 * 64;
  return padded % 1024 == 0 ? padded + 64 : padded;
}

template <class T>
struct Exact {
  using Element = T;
  static constexpr int group = 1;
  static constexpr bool prepared = false;  // rows of T serve as they are
  static constexpr bool scaled = false;    // weights come with a scale per column
  static constexpr bool adds = true;       // whether there is add_one()
  static constexpr int64_t head = 0;       // bytes before a prepared row's elements

  // Bytes from one prepared row to the next.
  static constexpr int64_t row_bytes(int64_t depth) {
    return prepared_row_bytes(depth * int64_t(sizeof(T)));
  }

  static void prepare(const void* from, Storage storage, int64_t depth, T* to) {
    const int64_t size = storage == Storage::kSame ? int64_t(sizeof(T)) : 2;
    for (int64_t k = 0; k < depth; k += Vec<T>::lanes) {
      load_stored<T>(static_cast<const char*>(from) + k * size, storage, int(depth - k))
          .store(to + k);
    }
  }

  static void pack(const Panels<T>& panels, const T* source, int64_t, T* packed, Range which,
                   int first_gate) {
    pack_transposed(panels, source, packed, which, first_gate);
  }

  static FASTCELL_INLINE void multiply(const T* const* a, T* const* c, int rows, const T* panel,
                                       const T*, int vectors, int64_t depth, const T* init,
                                       const T* next) {
    multiply_panel<Plain<T>>(a, c, rows, panel, vectors, depth, Vec<T>::lanes, init, next);
  }

  // One row by `panels` <= kAtOnce panels of one width that follow one another, as do their scales
  // and what the sums begin with.
  static FASTCELL_INLINE void multiply_one(const T* a, T* const* c, int panels, const T* panel,
                                           const T*, int vectors, int64_t depth, const T* init) {
    const int64_t step = depth * vectors * Vec<T>::lanes;
    multiply_across<Plain<T>>(a, c, panels, panel, step, vectors, depth, Vec<T>::lanes, init);
  }

  // The same of W panels of N vectors, with sums in registers.
  template <int W, int N>
  static FASTCELL_INLINE void add_one(const T* a, const T* panel, int64_t depth,
                                      Vec<T> (&sums)[W][N]) {
    add_across<Plain<T>>(a, panel, depth * N * Vec<T>::lanes, depth, sums);
  }
};

// Packs a matrix whose elements are smaller than a float: groups of k are moved as one float is.
template <int group, class Element>
void pack_groups(const Panels<float>& panels, const Element* source, int64_t depth, Element* packed,
                 Range which, int first_gate) {
  static_assert(group * sizeof(Element) == sizeof(float), "a group has the size of a float");
  if (depth % group == 0) {
    pack_transposed(panels, reinterpret_cast<const float*>(source),
                    reinterpret_cast<float*>(packed), which, first_gate);
    return;
  }
  constexpr int L = Vec<float>::lanes;
  for (int64_t p = which.begin; p < which.end; ++p) {
    const int width = panels.vectors(p) * L;
    Element* to = packed + panels.offset(p) * group;
    for (int64_t k = 0; k < panels.depth * group; ++k) {
      for (int column = 0; column < width; ++column) {
        const int64_t unit = panels.first_unit(p) + column / (panels.gates * L) * L + column % L;
        const int gate = (first_gate + column / L % panels.gates) % panels.gates;
        const bool there = k < depth && unit < panels.units;
        to[(k / group * width + column) * group + k % group] =
            there ? source[(gate * panels.units + unit) * depth + k] : Element(0);
      }
    }
  }
}

#if defined(__AVX512F__)
// Written out: the instructions are used where the CPU has them, in code that is compiled for all
// CPUs with AVX-512.
struct BFloat16Dots {
  using Element = uint16_t;
  using Sum = float;
  using Columns = __m512i;
  static constexpr int group = 2;
  static constexpr int parts = 1;

  static FASTCELL_INLINE __m512i row(const Element* a, int) {
    int32_t both;
    std::memcpy(&both, a, 4);
    return _mm512_set1_epi32(both);
  }
  static FASTCELL_INLINE Columns columns(const Element* panel, int) {
    return _mm512_loadu_si512(panel);
  }
  static FASTCELL_INLINE Vec<float> add(__m512i row, Columns columns, Vec<float> sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(columns), "v"(row));
    return sum;
  }
};

struct Int8Dots {
  using Element = uint8_t;
  using Sum = int32_t;
  using Columns = __m512i;
  static constexpr int group = 4;
  static constexpr int parts = 1;

  static FASTCELL_INLINE __m512i row(const Element* a, int) {
    int32_t all;
    std::memcpy(&all, a, 4);
    return _mm512_set1_epi32(all);
  }
  static FASTCELL_INLINE Columns columns(const Element* panel, int) {
    return _mm512_loadu_si512(panel);
  }
  static FASTCELL_INLINE Vec<int32_t> add(__m512i row, Columns columns, Vec<int32_t> sum) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(columns), "v"(row));
    return sum;
  }
};
#endif

// One of a group's two values of k per turn, widened.
struct BFloat16Widened {
  using Element = uint16_t;
  using Sum = float;
  using Columns = Vec<float>;
  static constexpr int group = 2;
  static constexpr int parts = 2;

  static FASTCELL_INLINE Columns columns(const Element* panel, int part) {
    return widen(Vec<int32_t>::load(reinterpret_cast<const int32_t*>(panel)), part);
  }
  static FASTCELL_INLINE Vec<float> row(const Element* a, int part) {
    int32_t both;
    std::memcpy(&both, a, 4);
    return widen(Vec<int32_t>(both), part);
  }
  static FASTCELL_INLINE Vec<float> add(Vec<float> row, Columns columns, Vec<float> sum) {
    return fma(row, columns, sum);
  }

 private:
  // The first of two lies in the low half.
  static FASTCELL_INLINE Vec<float> widen(Vec<int32_t> both, int part) {
    return Vec<float>::from_bits(part == 0 ? both.v << 16 : both.v & int32_t(0xffff0000));
  }
};

// Weights as unsigned bytes, 128 more than they are; the others as signed bytes.
#if defined(__SSE2__)
// Two of a group's four per turn, as pairs of 16 bits.
struct Int8Widened {
  using Element = uint8_t;
  using Sum = int32_t;
  typedef int16_t Columns __attribute__((vector_size(kVectorBytes)));
  static constexpr int group = 4;
  static constexpr int parts = 2;

  static FASTCELL_INLINE Columns columns(const Element* panel, int part) {
    const Vec<int32_t> all = Vec<int32_t>::load(reinterpret_cast<const int32_t*>(panel));
    const Columns pairs = reinterpret_cast<Columns>(all.v);
    return part == 0 ? pairs & 0xff : (pairs >> 8) & 0xff;
  }
  static FASTCELL_INLINE Columns row(const Element* a, int part) {
    int32_t all;
    std::memcpy(&all, a, 4);
    const Columns pairs = reinterpret_cast<Columns>(Vec<int32_t>(all).v);
    return part == 0 ? (pairs << 8) >> 8 : pairs >> 8;
  }
  static FASTCELL_INLINE Vec<int32_t> add(Columns row, Columns columns, Vec<int32_t> sum) {
    using Sums = Raw<int32_t>::type;
#if defined(__AVX512BW__)
    return Vec<int32_t>(sum.v +
                        reinterpret_cast<Sums>(_mm512_madd_epi16(
                            reinterpret_cast<__m512i>(row), reinterpret_cast<__m512i>(columns))));
#elif defined(__AVX2__)
    return Vec<int32_t>(sum.v +
                        reinterpret_cast<Sums>(_mm256_madd_epi16(
                            reinterpret_cast<__m256i>(row), reinterpret_cast<__m256i>(columns))));
#else
    return Vec<int32_t>(sum.v +
                        reinterpret_cast<Sums>(_mm_madd_epi16(reinterpret_cast<__m128i>(row),
                                                              reinterpret_cast<__m128i>(columns))));
#endif
  }
};
#else
// One of a group's four per turn.
struct Int8Widened {
  using Element = uint8_t;
  using Sum = int32_t;
  using Columns = Vec<int32_t>;
  static constexpr int group = 4;
  static constexpr int parts = 4;

  static FASTCELL_INLINE Columns columns(const Element* panel, int part) {
    const Vec<int32_t> all = Vec<int32_t>::load(reinterpret_cast<const int32_t*>(panel));
    return Columns((all.v >> (8 * part)) & 0xff);
  }
  static FASTCELL_INLINE Columns row(const Element* a, int part) {
    return Columns(int32_t(int8_t(a[part])));
  }
  static FASTCELL_INLINE Vec<int32_t> add(Columns row, Columns columns, Vec<int32_t> sum) {
    return sum + row * columns;
  }
};
#endif

// Both sides rounded to bfloat16.
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int group = 2;
  static constexpr bool prepared = true;
  static constexpr bool scaled = false;
  static constexpr bool adds = true;
  static constexpr int64_t head = 0;

  static constexpr int64_t row_bytes(int64_t depth) { return prepared_row_bytes((depth + 1) * 2); }

  static void prepare(const void* from, Storage storage, int64_t depth, Element* to) {
    if (storage == Storage::kBFloat16) {
      std::memcpy(to, from, size_t(depth) * 2);
      to[depth] = 0;  // the rest of the last group
      return;
    }
    const int64_t size = storage == Storage::kSame ? 4 : 2;
    for (int64_t k = 0; k < depth; k += Narrow::lanes) {
      const Vec<float> x =
          load_stored<float>(static_cast<const char*>(from) + k * size, storage, int(depth - k));
      Narrow::store(to + k, Narrow::round_bfloat16(x), Narrow::lanes);
    }
  }

  static void pack(const Panels<float>& panels, const Element* source, int64_t depth,
                   Element* packed, Range which, int first_gate) {
    pack_groups<group>(panels, source, depth, packed, which, first_gate);
  }

  static FASTCELL_INLINE void multiply(const Element* const* a, float* const* c, int rows,
                                       const Element* panel, const float*, int vectors,
                                       int64_t depth, const float* init, const Element* next) {
    constexpr int lanes = Vec<float>::lanes;
#if defined(__AVX512F__)
    if (bfloat16_dots) {
      multiply_panel<BFloat16Dots>(a, c, rows, panel, vectors, depth, lanes, init, next);
      return;
    }
#endif
    multiply_panel<BFloat16Widened>(a, c, rows, panel, vectors, depth, lanes, init, next);
  }

  static FASTCELL_INLINE void multiply_one(const Element* a, float* const* c, int panels,
                                           const Element* panel, const float*, int vectors,
                                           int64_t depth, const float* init) {
    constexpr int lanes = Vec<float>::lanes;
    const int64_t step = depth * vectors * lanes * group;
#if defined(__AVX512F__)
    if (bfloat16_dots) {
      multiply_across<BFloat16Dots>(a, c, panels, panel, step, vectors, depth, lanes, init);
      return;
    }
#endif
    multiply_across<BFloat16Widened>(a, c, panels, panel, step, vectors, depth, lanes, init);
  }

  template <int W, int N>
  static FASTCELL_INLINE void add_one(const Element* a, const Element* panel, int64_t depth,
                                      Vec<float> (&sums)[W][N]) {
    const int64_t step = depth * N * Vec<float>::lanes * group;
#if defined(__AVX512F__)
    if (bfloat16_dots) {
      add_across<BFloat16Dots>(a, panel, step, depth, sums);
      return;
    }
#endif
    add_across<BFloat16Widened>(a, panel, step, depth, sums);
  }
};

// Weights in 8 bits with a scale per column; rows in 8 bits with a scale of their own, the largest
// magnitude over 127. A row that holds NaN or an infinity gives NaN.
struct Int8 {
  using Element = uint8_t;
  static constexpr int group = 4;
  static constexpr bool prepared = true;
  static constexpr bool scaled = true;
  static constexpr bool adds = false;
  static constexpr int64_t head = 64;

  static constexpr int64_t row_bytes(int64_t depth) { return prepared_row_bytes(head + depth); }

  struct Head {
    float scale;
    int32_t excess;  // of its integer products: the weights are stored as 128 more than they are
  };
  static const Head& head_of(const Element* row) {
    return *reinterpret_cast<const Head*>(row - head);
  }

  static void prepare(const void* from, Storage storage, int64_t depth, Element* to) {
    using V = Vec<float>;
    using Integers = Raw<int32_t>::type;
    typedef uint8_t Bytes __attribute__((vector_size(V::lanes)));
    const int64_t size = storage == Storage::kSame ? 4 : 2;
    const auto load = [&](int64_t k) {
      return load_stored<float>(static_cast<const char*>(from) + k * size, storage, int(depth - k));
    };
    V most(0), bad(0);
    for (int64_t k = 0; k < depth; k += V::lanes) {
      const V x = load(k);
      most = max(most, max(x, -x));
      bad = fma(x, V(0), bad);  // NaN once x is NaN or infinite
    }
    float largest = 0, nan = 0;
    for (int i = 0; i < V::lanes; ++i) {
      if (most.v[i] > largest) largest = most.v[i];
      nan += bad.v[i];
    }
    // (An inverse of less than the smallest such would overflow; its row counts as zeros.)
    const V inverse(largest > 1e-35f ? 127.0f / largest : 0.0f);
    const V shift(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
    Integers sums{};
    for (int64_t k = 0; k < depth; k += V::lanes) {
      const Integers rounded = fma(load(k), inverse, shift).bits() - shift.bits();
      sums += rounded;
      const Bytes bytes = __builtin_convertvector(rounded, Bytes);
      std::memcpy(to + k, &bytes, sizeof bytes);
    }
    // Unsigned: what is not finite rounds to anything, and may overflow.
    uint32_t sum = 0;
    for (int i = 0; i < V::lanes; ++i) sum += uint32_t(sums[i]);
    const Head of_row{largest / 127.0f + nan, int32_t(sum * 128)};
    std::memcpy(to - head, &of_row, sizeof of_row);
  }

  static void pack(const Panels<float>& panels, const Element* source, int64_t depth,
                   Element* packed, Range which, int first_gate) {
    pack_groups<group>(panels, source, depth, packed, which, first_gate);
    for (int64_t p = which.begin; p < which.end; ++p) {
      Element* const panel = packed + panels.offset(p) * group;
      const int64_t bytes = int64_t(panels.vectors(p)) * kVectorBytes * panels.depth;
      for (int64_t i = 0; i < bytes; ++i) panel[i] ^= 0x80;
    }
  }

  static FASTCELL_INLINE void multiply(const Element* const* a, float* const* c, int rows,
                                       const Element* panel, const float* scales, int vectors,
                                       int64_t depth, const float* init, const Element* next) {
    using V = Vec<float>;
    alignas(64) int32_t block[kRowBlock * kMaxVectors * V::lanes];
    alignas(64) static constexpr int32_t zeros[kMaxVectors * V::lanes] = {};
    int32_t* sums[kRowBlock];
    for (int i = 0; i < rows; ++i) sums[i] = block + i * vectors * V::lanes;
#if defined(__AVX512F__)
    if (int8_dots) {
      multiply_panel<Int8Dots>(a, sums, rows, panel, vectors, depth, V::lanes, zeros, next);
    } else {
      multiply_panel<Int8Widened>(a, sums, rows, panel, vectors, depth, V::lanes, zeros, next);
    }
#else
    multiply_panel<Int8Widened>(a, sums, rows, panel, vectors, depth, V::lanes, zeros, next);
#endif
    for (int i = 0; i < rows; ++i) {
      const Head& of_row = head_of(a[i]);
      const V scale(of_row.scale);
      const float* const from = init ? init : c[i];
      for (int v = 0; v < vectors; ++v) {
        const auto sum = Vec<int32_t>::load(sums[i] + v * V::lanes).v - of_row.excess;
        const V value(__builtin_convertvector(sum, Raw<float>::type));
        fma(value, scale * V::load(scales + v * V::lanes), V::load(from + v * V::lanes))
            .store(c[i] + v * V::lanes);
      }
    }
  }

  static FASTCELL_INLINE void multiply_one(const Element* a, float* const* c, int panels,
                                           const Element* panel, const float* scales, int vectors,
                                           int64_t depth, const float* init) {
    const int64_t width = int64_t(vectors) * Vec<float>::lanes;
    for (int i = 0; i < panels; ++i, panel += depth * width * group, scales += width) {
      multiply(&a, c + i, 1, panel, scales, vectors, depth, init ? init + i * width : nullptr,
               nullptr);
    }
  }
};

}  // namespace fastcell::FASTCELL_ISA
