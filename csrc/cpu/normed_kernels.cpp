// Compiled once per instruction set, as kernels.cpp.
#include "../cells/normed.h"
#include "normed_backward.h"
#include "normed_forward.h"
#include "normed_table.h"

namespace fastcell::FASTCELL_ISA {
namespace {

template <class T, template <class> class CellOf>
constexpr NormedKernels normed_kernels_of(const char* name) {
  using Forward = NormedForward<T, CellOf>;
  using Backward = NormedBackward<T, CellOf>;
  using Cell = CellOf<Vec<T>>;
  return {name,
          [](int64_t hidden, bool projected) {
            return NormedLayout<Cell, Vec<T>::lanes>{hidden, projected}.elements();
          },
          [](int64_t hidden) { return NormedLayout<Cell, Vec<T>::lanes>{hidden, false}.cell_at(); },
          Forward::workspace_bytes,
          Backward::workspace_bytes,
          Forward::run,
          Backward::run};
}

// One line per cell.
template <class T>
constexpr NormedKernels normed_cells_of[] = {
    normed_kernels_of<T, cells::NormedLstm>("lstm"),
    normed_kernels_of<T, cells::NormedLstmPeephole>("lstm_peephole"),
    normed_kernels_of<T, cells::NormedLstmCoupled>("lstm_coupled"),
    normed_kernels_of<T, cells::NormedLstmCoupledPeephole>("lstm_coupled_peephole"),
    normed_kernels_of<T, cells::NormedGru>("gru"),
};

}  // namespace

extern const NormedTable normed_table;
const NormedTable normed_table = {
    int(sizeof normed_cells_of<float> / sizeof *normed_cells_of<float>),
    {normed_cells_of<float>, normed_cells_of<double>},
};

}  // namespace fastcell::FASTCELL_ISA
