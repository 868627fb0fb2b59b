// Compiled once per instruction set, with FASTCELL_ISA naming the set.
#include "../cells/gru.h"
#include "../cells/gru_before.h"
#include "../cells/gru_options.h"
#include "../cells/leaky.h"
#include "../cells/lstm.h"
#include "../cells/lstm_variants.h"
#include "../cells/rnn.h"
#include "../cells/rnn_options.h"
#include "backward.h"
#include "engine.h"
#include "forward.h"
#include "hash.h"
#include "linear_call.h"
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
                      Cell::recurrent,
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

// Elements that share a key.
constexpr int64_t kDrawnTogether = 4096;

void drop(DType dtype, const void* from, void* to, int64_t count, uint64_t seed,
          double probability) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    using V = Vec<T>;
    const V scale(probability < 1 ? T(1 / (1 - probability)) : T(0));
    const T* const x = static_cast<const T*>(from);
    T* const y = static_cast<T*>(to);
    const noise::Bits own = noise::state_key(seed, 0, 0);
    for (int64_t block = 0; block * kDrawnTogether < count; ++block) {
      const noise::Bits key = noise::row_key(own, noise::Counter(block));
      const int64_t begin = block * kDrawnTogether, left = count - begin;
      const int64_t here = left < kDrawnTogether ? left : kDrawnTogether;
      for (int64_t i = 0; i < here; i += V::lanes) {
        const int n = here - i < V::lanes ? int(here - i) : V::lanes;
        const V factor = (V(1) - hold<T>(probability, &key, i)) * scale;
        store_first(y + begin + i, load_first(x + begin + i, n) * factor, n);
      }
    }
  };
  if (dtype == DType::kFloat32) {
    run(0.0f);
  } else {
    run(0.0);
  }
}

// One line per cell: those that have narrow products too, then the others.
template <class T, class Precision>
constexpr CellKernels narrow_cells[] = {
    kernels_of<T, cells::RnnTanh, Precision>("rnn_tanh"),
    kernels_of<T, cells::RnnRelu, Precision>("rnn_relu"),
    kernels_of<T, cells::Lstm, Precision>("lstm"),
    kernels_of<T, cells::Gru, Precision>("gru"),
};
template <class T>
constexpr CellKernels other_cells[] = {
    kernels_of<T, cells::LeakyTanh, Exact<T>>("leaky_tanh"),
    kernels_of<T, cells::LeakyRelu, Exact<T>>("leaky_relu"),
    kernels_of<T, cells::LstmPeephole, Exact<T>>("lstm_peephole"),
    kernels_of<T, cells::LstmCoupled, Exact<T>>("lstm_coupled"),
    kernels_of<T, cells::LstmCoupledPeephole, Exact<T>>("lstm_coupled_peephole"),
    kernels_of<T, cells::RnnGeneral, Exact<T>>("rnn_general"),
    kernels_of<T, cells::Independent, Exact<T>>("independent"),
    kernels_of<T, cells::LstmGeneral, Exact<T>>("lstm_general"),
    kernels_of<T, cells::LstmPeepholeGeneral, Exact<T>>("lstm_peephole_general"),
    kernels_of<T, cells::LstmCoupledGeneral, Exact<T>>("lstm_coupled_general"),
    kernels_of<T, cells::LstmCoupledPeepholeGeneral, Exact<T>>("lstm_coupled_peephole_general"),
    kernels_of<T, cells::GruGeneral, Exact<T>>("gru_general"),
    kernels_of<T, cells::GruBefore, Exact<T>>("gru_before"),
};

template <size_t n>
constexpr CellTable table_of(const CellKernels (&cells)[n]) {
  return {cells, int(n)};
}

}  // namespace

extern const ReservoirKernels reservoir_kernels[kDTypes];  // reservoir_kernels.cpp
extern const LinearKernels linear_kernels[kDTypes];        // linear_kernels.cpp
extern const NormedTable normed_table;
extern const TreeKernels tree_table;
extern const Kernels table;
const Kernels table = {
    FASTCELL_STRING(FASTCELL_ISA),
    {{table_of(narrow_cells<float, Exact<float>>), table_of(narrow_cells<float, BFloat16>),
      table_of(narrow_cells<float, Int8>)},
     {table_of(narrow_cells<double, Exact<double>>), {}, {}}},
    {table_of(other_cells<float>), table_of(other_cells<double>)},
    reservoir_kernels,
    tanh_array,
    sigmoid_array,
    run_fma,
    read_array,
    drop,
    hash_bytes,
    &tree_table,
    &normed_table,
    linear_kernels,
};

}  // namespace fastcell::FASTCELL_ISA
