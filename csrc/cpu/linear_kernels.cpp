// Compiled once per instruction set, with FASTCELL_ISA naming the set.
#include "linear.h"

namespace fastcell::FASTCELL_ISA {

template <class T>
constexpr LinearKernels linear_of{Linear<T>::packed_bytes, Linear<T>::pack, Linear<T>::run,
                                  Linear<T>::activate};

extern const LinearKernels linear_kernels[kDTypes];
const LinearKernels linear_kernels[kDTypes] = {linear_of<float>, linear_of<double>};

}  // namespace fastcell::FASTCELL_ISA
