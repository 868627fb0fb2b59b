// A linear layer, y = W x + b, and activations: what stands beside the recurrent layers of a
// stream.
#pragma once

#include "../cells/activation.h"
#include "linear_call.h"
#include "math.h"
#include "panels.h"
#include "rows.h"

namespace fastcell::FASTCELL_ISA {

template <class T>
struct Linear {
  using V = Vec<T>;

  static int64_t packed_bytes(int64_t in, int64_t out) {
    Arena arena(nullptr);
    Packed(in, out, arena);
    return arena.used();
  }

  // weight: (out, in); bias: (out) or null.
  static void pack(int64_t in, int64_t out, const void* weight, const void* bias, void* to) {
    Arena arena(to);
    const Packed packed(in, out, arena);
    pack_transposed(packed.panels, static_cast<const T*>(weight), packed.weights,
                    Range{0, packed.panels.count()}, 0);
    std::memset(packed.bias, 0, packed.panels.padded_units() * sizeof(T));
    if (bias) std::memcpy(packed.bias, bias, out * sizeof(T));
  }

  // The rows [begin, end) of steps * batch. A row's sums are the same whatever rows are beside it.
  static void run(const LinearCall& call, int64_t begin, int64_t end) {
    Arena arena(const_cast<void*>(call.packed));
    const Packed packed(call.in, call.out, arena);
    const Panels<T>& panels = packed.panels;
    const RowMap<const T> x = call.x.as<const T>();
    T* const y = static_cast<T*>(call.y);
    alignas(64) T block[kRowBlock * kMaxVectors * V::lanes];
    if (begin == end) return;
    int64_t t = begin / call.batch, b = begin % call.batch;
    for (int64_t r0 = begin; r0 < end; r0 += kRowBlock) {
      const int n = int(end - r0 < kRowBlock ? end - r0 : kRowBlock);
      const T* a[kRowBlock];
      T* c[kRowBlock];
      for (int i = 0; i < n; ++i) {
        a[i] = x.at(t, b, r0 + i);
        if (++b == call.batch) {
          b = 0;
          ++t;
        }
      }
      for (int64_t p = 0; p < panels.count(); ++p) {
        const int vectors = panels.vectors(p);
        const int64_t unit = panels.first_unit(p);
        const bool full = panels.full(p);
        for (int i = 0; i < n; ++i) {
          c[i] = full ? y + (r0 + i) * call.out + unit : block + i * vectors * V::lanes;
        }
        multiply_panel<Plain<T>>(a, c, n, packed.weights + panels.offset(p), vectors, panels.depth,
                                 V::lanes, packed.bias + unit);
        for (int v = 0; v < vectors && !full; ++v) {
          const int64_t at = unit + v * V::lanes, left = call.out - at;
          for (int i = 0; i < n; ++i) {
            store_first(y + (r0 + i) * call.out + at, V::load(c[i] + v * V::lanes),
                        left < V::lanes ? int(left) : V::lanes);
          }
        }
      }
    }
  }

  static void activate(Activation which, const void* from, void* to, int64_t count) {
    const T* const x = static_cast<const T*>(from);
    T* const y = static_cast<T*>(to);
    for (int64_t i = 0; i < count; i += V::lanes) {
      const int n = count - i < V::lanes ? int(count - i) : V::lanes;
      store_first(y + i, cells::activate(which, load_first(x + i, n)), n);
    }
  }

 private:
  struct Packed {
    Panels<T> panels;
    T *weights, *bias;
    Packed(int64_t in, int64_t out, Arena& arena)
        : panels{1, out, in},
          weights(arena.take<T>(panels.size())),
          bias(arena.take<T>(panels.padded_units())) {}
  };
};

}  // namespace fastcell::FASTCELL_ISA
