// Compiled once per instruction set, with FASTCELL_ISA naming the set.
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "backward.h"
#include "engine.h"
#include "forward.h"
#include "measure.h"

#define FASTCELL_STRING_(x) #x
#define FASTCELL_STRING(x) FASTCELL_STRING_(x)

namespace fastcell::FASTCELL_ISA {
namespace {

template <class T, template <class> class CellOf>
constexpr CellKernels kernels_of(const char* name) {
  using Cell = CellOf<Vec<T>>;
  return {name,
          Cell::saved,
          Cell::states,
          Cell::gates,
          Vec<T>::lanes,
          Packing<T, CellOf>::bytes,
          Packing<T, CellOf>::pack,
          Forward<T, CellOf>::workspace_bytes,
          Forward<T, CellOf>::run,
          Backward<T, CellOf>::workspace_bytes,
          Backward<T, CellOf>::run};
}

template <class F>
void map_array(DType dtype, const void* x, void* y, int64_t count, F f) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    using V = Vec<T>;
    for (int64_t i = 0; i < count; i += V::lanes) {
      const int n = count - i < V::lanes ? int(count - i) : V::lanes;
      store_first(static_cast<T*>(y) + i, f(load_first(static_cast<const T*>(x) + i, n)), n);
    }
  };
  if (dtype == DType::kFloat32) {
    run(0.0f);
  } else {
    run(0.0);
  }
}

void tanh_array(DType dtype, const void* x, void* y, int64_t count) {
  map_array(dtype, x, y, count, [](auto v) { return tanh(v); });
}

void sigmoid_array(DType dtype, const void* x, void* y, int64_t count) {
  map_array(dtype, x, y, count, [](auto v) { return sigmoid(v); });
}

// One line per cell.
template <class T>
constexpr CellKernels cells_of[] = {
    kernels_of<T, cells::RnnTanh>("rnn_tanh"),
    kernels_of<T, cells::RnnRelu>("rnn_relu"),
    kernels_of<T, cells::Lstm>("lstm"),
    kernels_of<T, cells::Gru>("gru"),
};

}  // namespace

extern const Kernels table;
const Kernels table = {
    FASTCELL_STRING(FASTCELL_ISA),
    int(sizeof cells_of<float> / sizeof *cells_of<float>),
    {cells_of<float>, cells_of<double>},
    tanh_array,
    sigmoid_array,
    run_fma,
    read_array,
};

}  // namespace fastcell::FASTCELL_ISA
