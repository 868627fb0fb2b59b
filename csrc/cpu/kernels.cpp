// Compiled once per instruction set, with FASTCELL_ISA naming the set.
#include "../cells/gru.h"
#include "../cells/leaky.h"
#include "../cells/lstm.h"
#include "../cells/lstm_variants.h"
#include "../cells/rnn.h"
#include "backward.h"
#include "engine.h"
#include "forward.h"
#include "measure.h"
#include "reservoir_call.h"

#define FASTCELL_STRING_(x) #x
#define FASTCELL_STRING(x) FASTCELL_STRING_(x)

namespace fastcell::FASTCELL_ISA {
namespace {

template <class T, template <class> class CellOf, class Precision>
constexpr CellKernels kernels_of(const char* name) {
  using Cell = CellOf<Vec<T>>;
  CellKernels kernels{name,
                      Cell::saved,
                      Cell::states,
                      Cell::gates,
                      Cell::parameters,
                      Vec<T>::lanes,
                      Packing<T, CellOf, Precision>::bytes,
                      Packing<T, CellOf, Precision>::pack,
                      Forward<T, CellOf, Precision>::workspace_bytes,
                      Forward<T, CellOf, Precision>::run,
                      nullptr,
                      nullptr};
  if constexpr (!Precision::scaled) {  // integer weights are not trained
    kernels.backward_workspace = Backward<T, CellOf>::workspace_bytes;
    kernels.backward = Backward<T, CellOf>::run;
  }
  return kernels;
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
template <class T, class Precision>
constexpr CellKernels cells_of[] = {
    kernels_of<T, cells::RnnTanh, Precision>("rnn_tanh"),
    kernels_of<T, cells::RnnRelu, Precision>("rnn_relu"),
    kernels_of<T, cells::Lstm, Precision>("lstm"),
    kernels_of<T, cells::Gru, Precision>("gru"),
    kernels_of<T, cells::LeakyTanh, Precision>("leaky_tanh"),
    kernels_of<T, cells::LeakyRelu, Precision>("leaky_relu"),
    kernels_of<T, cells::LstmPeephole, Precision>("lstm_peephole"),
    kernels_of<T, cells::LstmCoupled, Precision>("lstm_coupled"),
    kernels_of<T, cells::LstmCoupledPeephole, Precision>("lstm_coupled_peephole"),
};
constexpr auto& plain_cells = cells_of<float, Exact<float>>;

}  // namespace

extern const ReservoirKernels reservoir_kernels[kDTypes];  // reservoir_kernels.cpp
extern const Kernels table;
const Kernels table = {
    FASTCELL_STRING(FASTCELL_ISA),
    int(sizeof plain_cells / sizeof *plain_cells),
    {{plain_cells, cells_of<float, BFloat16>, cells_of<float, Int8>},
     {cells_of<double, Exact<double>>, nullptr, nullptr}},
    reservoir_kernels,
    tanh_array,
    sigmoid_array,
    run_fma,
    read_array,
};

}  // namespace fastcell::FASTCELL_ISA
