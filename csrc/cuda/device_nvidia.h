// device.h on an NVIDIA GPU.
#pragma once

#include "../common/portable.h"

#define FASTCELL_KERNEL __global__ void __launch_bounds__(256, 1)
#define FASTCELL_KERNEL_PARAMETER __grid_constant__

namespace fastcell::cuda {

using Bits32 = unsigned int;
using Bits16 = unsigned short;
using Index = long long;

struct alignas(16) Bytes16 {
  Bits32 word[4];
};

FASTCELL_INLINE int thread() { return int(threadIdx.x); }
FASTCELL_INLINE int lane() { return int(threadIdx.x) & 31; }
FASTCELL_INLINE int block(int axis) {
  return int(axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z);
}

extern __shared__ __align__(128) char fastcell_shared[];
FASTCELL_INLINE char* shared_memory() { return fastcell_shared; }

FASTCELL_INLINE void block_barrier() { __syncthreads(); }
FASTCELL_INLINE void warp_barrier() { __syncwarp(); }

FASTCELL_INLINE Bytes16 load16(const void* p) { return *static_cast<const Bytes16*>(p); }
FASTCELL_INLINE void store16(void* p, Bytes16 v) { *static_cast<Bytes16*>(p) = v; }

// Not from the first-level cache, which does not see what other multiprocessors write.
FASTCELL_INLINE Bytes16 load16_fresh(const void* p) {
  Bytes16 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}

FASTCELL_INLINE int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(v)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
FASTCELL_INLINE void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
}
// A word that the host may read and write, too.
FASTCELL_INLINE int load_system(const int* p) { return *static_cast<const volatile int*>(p); }
FASTCELL_INLINE void store_system(int* p, int v) { *static_cast<volatile int*>(p) = v; }

#if __CUDA_ARCH__ >= 900
FASTCELL_INLINE int cluster_rank() {
  Bits32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
// What was written before the one, to the cluster's shared memories too, is seen by all after the
// other. (Not .aligned: the lanes of a warp may come here one by one.)
FASTCELL_INLINE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
FASTCELL_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// At the address in the shared memory of block `rank` that `p` is in one's own.
FASTCELL_INLINE void store16_remote(void* p, int rank, Bytes16 v) {
  Bits32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote)
      : "r"(Bits32(__cvta_generic_to_shared(p))), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
#else  // no clusters: kernel_names.py has no kernels for them
FASTCELL_INLINE int cluster_rank() { return 0; }
FASTCELL_INLINE void cluster_arrive() {}
FASTCELL_INLINE void cluster_wait() {}
FASTCELL_INLINE void store16_remote(void*, int, Bytes16) {}
#endif

// d += a b, 16 rows, 8 columns; fragments as PTX has them. Turing multiplies 8 numbers of k at a
// time, in float16 alone: kernel_names.py has no others for it.
#if __CUDA_ARCH__ >= 800
FASTCELL_INLINE void mma_bfloat16(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FASTCELL_INLINE void mma_tf32(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FASTCELL_INLINE void mma_float16(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
__device__ void mma_bfloat16(float (&)[4], const Bits32 (&)[4], const Bits32 (&)[2]);
__device__ void mma_tf32(float (&)[4], const Bits32 (&)[4], const Bits32 (&)[2]);
FASTCELL_INLINE void mma_float16(float (&d)[4], const Bits32 (&a)[4], const Bits32 (&b)[2]) {
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
}
#endif

FASTCELL_INLINE Bits32 bits_of(float x) { return __float_as_uint(x); }
FASTCELL_INLINE float float_of(Bits32 x) { return __uint_as_float(x); }
FASTCELL_INLINE Bits16 round_to_float16(float x) {
  Bits16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
FASTCELL_INLINE float widen_float16(Bits16 h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}

FASTCELL_INLINE float exp_of(float x) { return expf(x); }
FASTCELL_INLINE double exp_of(double x) { return exp(x); }
FASTCELL_INLINE float tanh_of(float x) { return tanhf(x); }
FASTCELL_INLINE double tanh_of(double x) { return ::tanh(x); }
FASTCELL_INLINE float sqrt_of(float x) { return __fsqrt_rn(x); }
FASTCELL_INLINE double sqrt_of(double x) { return __dsqrt_rn(x); }
FASTCELL_INLINE float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTCELL_INLINE double fma_of(double a, double b, double c) { return __fma_rn(a, b, c); }

}  // namespace fastcell::cuda
