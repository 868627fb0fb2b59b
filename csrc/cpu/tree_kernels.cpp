// Compiled once per instruction set, as kernels.cpp.
#include "../cells/tree.h"
#include "engine.h"
#include "tree.h"

namespace fastcell::FASTCELL_ISA {
namespace {

template <class T, template <class> class CellOf>
constexpr TreeCellKernels tree_kernels_of(const char* name) {
  using Cell = CellOf<Vec<T>>;
  return {name,
          Cell::states,
          Cell::gates,
          Cell::forgets,
          Vec<T>::lanes,
          TreeForward<T, CellOf>::workspace_bytes,
          TreeBackward<T, CellOf>::workspace_bytes,
          TreeForward<T, CellOf>::run,
          TreeBackward<T, CellOf>::run};
}

// One line per cell.
template <class T>
constexpr TreeCellKernels tree_cells_of[] = {
    tree_kernels_of<T, cells::TreeLstm>("tree_lstm"),
    tree_kernels_of<T, cells::TreeRnnTanh>("tree_rnn_tanh"),
    tree_kernels_of<T, cells::TreeRnnRelu>("tree_rnn_relu"),
};

}  // namespace

extern const TreeKernels tree_table;
const TreeKernels tree_table = {
    int(sizeof tree_cells_of<float> / sizeof *tree_cells_of<float>),
    {tree_cells_of<float>, tree_cells_of<double>},
};

}  // namespace fastcell::FASTCELL_ISA
