// The one way in which device code reaches the hardware. Two implementations of the same names:
// device_nvidia.h (a GPU) and device_emulated.h (threads of this machine, for the tests).
//
//   thread(), lane(), block(axis)      who runs
//   shared_memory()                    the block's dynamic shared memory
//   block_barrier(), warp_barrier()    wait for all threads of the block, of the warp
//   cluster_rank(), store16_remote()   the blocks of a cluster and their shared memories
//   cluster_arrive(), cluster_wait()   a barrier of their threads, in two halves
//   load16(), store16()                16 bytes at an address that is a multiple of 16
//   load16_fresh()                     the same from global memory that other blocks write
//   load_acquire(), store_release()    a flag between blocks of the device
//   mma_*()                            one product of the tensor cores
//   exp_of(), tanh_of(), sqrt_of(), fma_of()
//                                      of float and double
#pragma once

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
#include "device_nvidia.h"
#else
#include "device_emulated.h"
#endif
