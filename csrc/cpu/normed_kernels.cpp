// Compiled once per instruction set, as kernels.cpp.
#include "../cells/normed.h"
#include "engine.h"
#include "normed.h"

namespace fastcell::FASTCELL_ISA {
namespace {

template <class T, template <class> class CellOf>
constexpr NormedKernels normed_kernels_of(const char* name) {
  using Engine = Normed<T, CellOf>;
  using Cell = CellOf<Vec<T>>;
  return {name,       Cell::gates, Cell::states, Engine::kept_elements, Engine::workspace_bytes,
          Engine::run};
}

// One line per cell.
template <class T>
constexpr NormedKernels normed_cells_of[] = {
    normed_kernels_of<T, cells::NormedLstm>("lstm"),
    normed_kernels_of<T, cells::NormedGru>("gru"),
};

}  // namespace

extern const NormedTable normed_table;
const NormedTable normed_table = {
    int(sizeof normed_cells_of<float> / sizeof *normed_cells_of<float>),
    {normed_cells_of<float>, normed_cells_of<double>},
};

}  // namespace fastcell::FASTCELL_ISA
