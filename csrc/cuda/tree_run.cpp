#include "tree_run.h"

#include <stdexcept>

#include "../cells/tree.h"
#include "gpu.h"
#include "sweep.h"

namespace fastcell::cuda {
namespace {

struct TreeFacts {
  const char* name;  // in Python
  const char* type;  // in C++
  int gates, forgets;
};
template <template <class> class Cell>
constexpr TreeFacts facts(const char* name, const char* type) {
  return {name, type, Cell<float>::gates, Cell<float>::forgets};
}
// As in kernel_names.py.
constexpr TreeFacts kTrees[] = {
    facts<cells::TreeLstm>("tree_lstm", "TreeLstm"),
    facts<cells::TreeRnnTanh>("tree_rnn_tanh", "TreeRnnTanh"),
    facts<cells::TreeRnnRelu>("tree_rnn_relu", "TreeRnnRelu"),
};
const TreeFacts& tree_facts(const std::string& name) {
  for (const TreeFacts& one : kTrees) {
    if (name == one.name) return one;
  }
  throw std::invalid_argument("no CUDA kernels for cell " + name);
}

class Runner {
 public:
  explicit Runner(const TreeRun& run)
      : run_(run),
        wide_(run.real == "float64"),
        cell_(tree_facts(run.cell)),
        gather_(named("tree_gather", type())),
        products_(
            named("row_products", wide_ ? "fastcell::cuda::Float64" : "fastcell::cuda::Float32")),
        step_(named(run.backward ? "tree_backward" : "tree_forward",
                    std::string(type()) + ", fastcell::cells::" + cell_.type)),
        level_(run.level) {
    if (!wide_ && run.real != "float32") {
      throw std::invalid_argument("no CUDA kernels for trees in " + run.real);
    }
    level_.leaves = run.levels > 0 ? run.level_offsets[1] : 0;
  }

  void forward() {
    for (long long l = 0; l < run_.levels; ++l) {
      choose(l, l + 1);
      if (l > 0) {
        gather();
        multiply({level_.seen, run_.weights, const_cast<void*>(level_.products), count(),
                  level_.seen_width, level_.columns, 0},
                 {level_.edge_seen, run_.edge_weights,
                  at(level_.forget, level_.edge_begin * level_.hidden), edges(), level_.edge_width,
                  level_.hidden, 0});
      }
      step();
    }
  }

  void backward() {
    if (run_.again && run_.levels > 1) {
      choose(1, run_.levels);
      gather();
    }
    for (long long l = run_.levels - 1; l >= 0; --l) {
      choose(l, l + 1);
      step();
      if (l == 0) continue;
      const long long inner = level_.begin - level_.leaves;
      const int columns = level_.positions * level_.hidden;
      multiply({at(level_.d_products, inner * level_.d_width), run_.weights,
                at(level_.d_seen, inner * columns), count(), level_.d_width, columns, 0},
               {at(level_.d_forget, level_.edge_begin * level_.edge_width), run_.edge_weights,
                at(level_.d_edge_seen, level_.edge_begin * level_.hidden), edges(),
                level_.edge_width, level_.hidden, 0});
    }
  }

 private:
  const char* type() const { return wide_ ? "double" : "float"; }
  static std::string named(const char* kernel, const std::string& arguments) {
    return std::string("fastcell::cuda::") + kernel + "<" + arguments + ">";
  }
  // (null stays so)
  void* at(const void* numbers, long long index) const {
    if (!numbers) return nullptr;
    return const_cast<char*>(static_cast<const char*>(numbers)) + index * (wide_ ? 8 : 4);
  }
  long long count() const { return level_.end - level_.begin; }
  long long edges() const { return level_.edge_end - level_.edge_begin; }

  void choose(long long from, long long to) {
    level_.begin = run_.level_offsets[from];
    level_.end = run_.level_offsets[to];
    level_.edge_begin = run_.level_edges[from];
    level_.edge_end = run_.level_edges[to];
  }
  void start(const std::string& kernel, long long blocks, int columns, int shared,
             const void* parameter) const {
    launch(run_.device,
           {kernel.c_str(),
            {unsigned(blocks), unsigned(columns), 1},
            kThreads,
            1,
            unsigned(shared),
            false,
            run_.stream},
           parameter);
  }
  void for_each(const std::string& kernel, long long numbers) const {
    start(kernel, (numbers + kThreads - 1) / kThreads, 1, 0, &level_);
  }
  void step() const { for_each(step_, count() * level_.hidden); }
  void gather() const {
    for_each(gather_,
             count() * level_.seen_width + (level_.edge_seen ? edges() * level_.edge_width : 0));
  }
  // The second one if there are weights for it.
  void multiply(const RowProduct& first, const RowProduct& second) const {
    RowProducts both{{first, second}};
    if (!second.weights) both.part[1].count = both.part[1].columns = 0;
    int columns = 0;
    for (RowProduct& one : both.part) {
      one.tiles = int((one.count + kProductRows - 1) / kProductRows);
      if (one.columns > columns) columns = one.columns;
    }
    start(products_, both.part[0].tiles + both.part[1].tiles,
          (columns + kProductColumns - 1) / kProductColumns,
          kProductParts * kProductRows * kProductColumns * (wide_ ? 8 : 4), &both);
  }

  const TreeRun& run_;
  const bool wide_;
  const TreeFacts& cell_;
  const std::string gather_, products_, step_;
  TreeLevel level_;
};

}  // namespace

void run(const TreeRun& run) {
  Runner runner(run);
  if (run.backward) {
    runner.backward();
  } else {
    runner.forward();
  }
}

}  // namespace fastcell::cuda
