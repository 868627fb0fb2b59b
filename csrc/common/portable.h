// What a cell header may use wherever it is compiled: for a SIMD engine or for a GPU.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FASTCELL_INLINE __device__ __forceinline__
#define FASTCELL_CALLED __device__ __forceinline__  // a call would need memory for registers
#else
#define FASTCELL_INLINE inline __attribute__((always_inline))
#define FASTCELL_CALLED inline __attribute__((noinline))  // larger than a call is slow
#endif
