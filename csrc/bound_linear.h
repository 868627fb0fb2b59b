// A linear layer with its kernels.
#pragma once

#include <stdexcept>

#include "cpu/linear_call.h"
#include "kernels_in_use.h"
#include "pointers.h"

namespace fastcell {

class BoundLinear {
 public:
  BoundLinear(bool float64, int64_t in, int64_t out)
      : in(in), out(out), kernels_(kernels().linear[float64]) {
    if (in < 1 || out < 1) throw std::invalid_argument("a linear layer needs features in and out");
  }

  const int64_t in, out;  // features

  int64_t packed_bytes() const { return kernels_.packed_bytes(in, out); }
  // weight: (out, in); bias: (out), or 0.
  void pack(Pointer weight, Pointer bias, Pointer packed) const {
    kernels_.pack(in, out, as<const void>(weight), as<const void>(bias), as(packed));
  }
  void run(const LinearCall& call, int64_t begin, int64_t end) const {
    kernels_.run(call, begin, end);
  }

 private:
  const LinearKernels& kernels_;
};

}  // namespace fastcell
