// What a cell header may use wherever it is compiled: for a SIMD engine or for a GPU.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FASTCELL_INLINE __device__ __forceinline__
#else
#define FASTCELL_INLINE inline __attribute__((always_inline))
#endif
