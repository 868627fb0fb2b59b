// device.h as threads of this machine, so that the kernels can be tested without a GPU.
//
// A block is one thread of the system, the threads of a block are fibers of it, which give way to
// each other where they wait. Under ThreadSanitizer nothing orders what two threads do, of one
// block or of two, but what does so on a GPU: barriers, flags, the begin and the end of a launch.
// Not the fibers' turns, not that blocks run one after another, not a product of the tensor cores.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/portable.h"

#define FASTCELL_KERNEL inline void
#define FASTCELL_KERNEL_PARAMETER

namespace fastcell::cuda {

using Bits32 = unsigned int;
using Bits16 = unsigned short;
using Index = long long;

struct alignas(16) Bytes16 {
  Bits32 word[4];
};

// What emulates the device, and is none of the kernel's accesses to memory.
#define FASTCELL_UNOBSERVED __attribute__((no_sanitize("thread")))

namespace emulated {

constexpr int kWarp = 32;

// Waiting of a fixed number of fibers for each other: wait() orders what they did before it and
// what they do after, meet() does not. wait() is arrive() and, given what that returned, await().
struct Barrier {
  std::atomic<int> arrived{0};
  std::atomic<int> passed{0};
  void wait(int count);
  void meet(int count);
  int arrive(int count);
  void await(int before);
};

struct Block;
struct Cluster {
  Barrier barrier;
  Block** blocks;
  int size;
};

struct Block {
  int index[3];
  int threads;
  char* shared;
  Barrier barrier;
  Barrier warps[kWarp];
  Bits32 fragments[kWarp][kWarp][6];  // of each warp and lane: what its product takes
  Cluster* cluster;
  int rank;
  std::vector<int> before;  // of each thread: what it waits for at the cluster's barrier
};

extern thread_local Block* current_block;
extern thread_local int current_thread;
void give_way();

}  // namespace emulated

// Never kept in a register across a wait: another fiber runs then.
FASTCELL_UNOBSERVED inline __attribute__((noinline)) int thread() {
  return emulated::current_thread;
}
FASTCELL_UNOBSERVED inline __attribute__((noinline)) emulated::Block& this_block() {
  return *emulated::current_block;
}

inline int lane() { return thread() % emulated::kWarp; }
inline int block(int axis) { return this_block().index[axis]; }
inline char* shared_memory() { return this_block().shared; }
inline void block_barrier() { this_block().barrier.wait(this_block().threads); }
inline void warp_barrier() { this_block().warps[thread() / emulated::kWarp].wait(emulated::kWarp); }

inline Bytes16 load16(const void* p) {
  Bytes16 v;
  std::memcpy(&v, __builtin_assume_aligned(p, 16), sizeof v);
  return v;
}
inline void store16(void* p, Bytes16 v) { std::memcpy(p, &v, sizeof v); }
inline Bytes16 load16_fresh(const void* p) { return load16(p); }

inline int load_acquire(const int* p) {
  emulated::give_way();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release(int* p, int v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline int load_system(const int* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_system(int* p, int v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }

inline int cluster_rank() { return this_block().rank; }
inline void cluster_arrive() {
  emulated::Cluster& cluster = *this_block().cluster;
  this_block().before[size_t(thread())] =
      cluster.barrier.arrive(cluster.size * this_block().threads);
}
inline void cluster_wait() {
  this_block().cluster->barrier.await(this_block().before[size_t(thread())]);
}
inline void store16_remote(void* p, int rank, Bytes16 v) {
  emulated::Block& self = this_block();
  store16(self.cluster->blocks[rank]->shared + (static_cast<char*>(p) - self.shared), v);
}

inline Bits32 bits_of(float x) {
  Bits32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(Bits32 bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
// To nearest, ties to even.
inline Bits16 round_to_float16(float x) {
  const Bits32 sign = (bits_of(x) >> 16) & 0x8000;
  const Bits32 bits = bits_of(x) & 0x7fffffff;
  if (bits > 0x7f800000) return Bits16(sign | 0x7e00);
  if (bits < (113u << 23)) {  // subnormal: adding 0.5 leaves its bits, rounded, at the sum's end
    return Bits16(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
  }
  const Bits32 rounded = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  return Bits16(sign | (rounded < 0x7c00 ? rounded : 0x7c00));
}
inline float widen_float16(Bits16 h) {
  const Bits32 sign = Bits32(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  if (rest < 0x400) return float_of(sign | bits_of(float(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + (112u << 23)));
}

// d += a b, fragments as PTX has them; `pair` multiplies what 32 bits hold. The lanes wait for each
// other, but what they read and write is not ordered by it.
template <class Pair>
FASTCELL_UNOBSERVED inline void mma(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2],
                                    const Pair& pair) {
  const int warp = thread() / emulated::kWarp;
  auto& lanes = this_block().fragments[warp];
  for (int i = 0; i < 4; ++i) lanes[lane()][i] = a[i];
  for (int i = 0; i < 2; ++i) lanes[lane()][4 + i] = b[i];
  this_block().warps[warp].meet(emulated::kWarp);
  const int row = lane() & ~3, column = 2 * (lane() & 3);
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {  // row i / 2, column i % 2
      const Bits32* rows = lanes[row + k];
      const Bits32* columns = lanes[4 * (column + i % 2) + k] + 4;
      d[i] = pair(rows[i / 2], columns[0], d[i]);
      d[i] = pair(rows[i / 2 + 2], columns[1], d[i]);
    }
  }
  this_block().warps[warp].meet(emulated::kWarp);
}
inline void mma_bfloat16(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
  mma(d, a, b, [](Bits32 x, Bits32 y, float sum) {
    sum = std::fma(float_of(x << 16), float_of(y << 16), sum);
    return std::fma(float_of(x & 0xffff0000u), float_of(y & 0xffff0000u), sum);
  });
}
inline void mma_float16(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
  mma(d, a, b, [](Bits32 x, Bits32 y, float sum) {
    sum = std::fma(widen_float16(Bits16(x)), widen_float16(Bits16(y)), sum);
    return std::fma(widen_float16(Bits16(x >> 16)), widen_float16(Bits16(y >> 16)), sum);
  });
}
// The hardware looks at 10 bits of the mantissa.
inline void mma_tf32(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
  mma(d, a, b, [](Bits32 x, Bits32 y, float sum) {
    return std::fma(float_of(x & ~0x1fffu), float_of(y & ~0x1fffu), sum);
  });
}

inline float exp_of(float x) { return std::exp(x); }
inline double exp_of(double x) { return std::exp(x); }
inline float tanh_of(float x) { return std::tanh(x); }
inline double tanh_of(double x) { return std::tanh(x); }
inline float sqrt_of(float x) { return std::sqrt(x); }
inline double sqrt_of(double x) { return std::sqrt(x); }
inline float fma_of(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_of(double a, double b, double c) { return std::fma(a, b, c); }

}  // namespace fastcell::cuda
