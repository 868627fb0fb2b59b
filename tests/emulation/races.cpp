// The CUDA kernels as threads of this machine, without Python: for ThreadSanitizer, and to see that
// a layer has the same results in every place (step, grid, cluster).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/gpu_emulated.h"
#include "cuda/products.h"
#include "cuda/run.h"

namespace {

using namespace fastcell::cuda;

constexpr int kDirections = 2;

struct Case {
  const char* cell;
  int hidden, output;  // a projection where they differ
  long long steps, batch;
  bool packed;  // samples of different lengths, as in a PackedSequence
  int multiprocessors;
};

int failures = 0, passes = 0;
// Whether there was what the exchange between blocks can go wrong with.
bool several_blocks = false, several_tiles_at_once = false, tiles_in_turn = false;

std::mt19937 generator(1);

template <class T>
std::vector<T> random(size_t count, double size) {
  std::vector<T> made(count);
  for (T& x : made) {
    using R = decltype(widen(x));
    narrow(R(size * (double(generator()) / 0x1p31 - 1)), x);
  }
  return made;
}

template <class T>
std::vector<T> unwritten(size_t count) {
  T nan;
  narrow(std::numeric_limits<decltype(widen(nan))>::quiet_NaN(), nan);
  return std::vector<T>(count, nan);
}

// What a call's passes read and write besides weights and workspace.
template <class E, class R>
struct Tensors {
  struct Direction {
    std::vector<R> gates, cells, h, c;
    std::vector<E> cell_output, d_gates, d_output;
  };
  Direction direction[kDirections];
  std::vector<E> y;
};

template <class P>
class Layer {
 public:
  using E = typename P::Element;
  using R = typename P::Real;
  using Tensors = ::Tensors<E, R>;

  Layer(const Case& sizes, const char* products)
      : case_(sizes),
        products_(products),
        cell_(cell_facts(sizes.cell)),
        hidden_(size_t(sizes.hidden)),
        output_(size_t(sizes.output)),
        batch_(size_t(sizes.batch)),
        offsets_{0} {
    for (long long b = 0; b < sizes.batch; ++b) {
      lengths_.push_back(sizes.steps - (sizes.packed ? b * sizes.steps / sizes.batch : 0));
    }
    for (long long t = 0; t < sizes.steps; ++t) {
      const auto alive = [&](long long length) { return length > t; };
      offsets_.push_back(offsets_[size_t(t)] +
                         std::count_if(lengths_.begin(), lengths_.end(), alive));
    }
    rows_ = size_t(offsets_.back());
    for (Given& given : given_) {
      given.w_hh = random<E>(gates() * hidden_ * output_, 2 / std::sqrt(double(output_)));
      if (projected()) given.w_hr = random<E>(output_ * hidden_, 2 / std::sqrt(double(hidden_)));
      given.terms = random<R>(rows_ * gates() * hidden_, 1);
      given.apart_bias = random<R>(size_t(cell_.apart) * hidden_, 1);
      given.h = random<E>(batch_ * output_, 1);
      given.c = random<R>(batch_ * hidden_, 1);
      given.d_h = random<R>(batch_ * output_, 1);
      given.d_c = random<R>(batch_ * hidden_, 1);
    }
    d_y_ = random<E>(rows_ * kDirections * output_, 1);
  }

  Tensors forward(const char* place) {
    Tensors to;
    to.y = unwritten<E>(rows_ * kDirections * output_);
    const size_t stride = gate_stride();
    for (int d = 0; d < kDirections; ++d) {
      const Given& given = given_[d];
      auto& own = to.direction[d];
      own.gates = unwritten<R>(rows_ * stride);
      for (size_t row = 0; row < rows_; ++row) {
        std::copy_n(&given.terms[row * gates() * hidden_], gates() * hidden_,
                    &own.gates[row * stride]);
      }
      for (const E h : given.h) own.h.push_back(widen(h));
      if (cell_.states > 1) {
        own.c = given.c;
        own.cells = unwritten<R>(rows_ * hidden_);
      }
      if (projected()) own.cell_output = unwritten<E>(rows_ * hidden_);
    }
    run(place, false, to);
    return to;
  }

  // `to`: of a forward call.
  Tensors backward(const char* place, Tensors to) {
    for (int d = 0; d < kDirections; ++d) {
      auto& own = to.direction[d];
      own.h = given_[d].d_h;
      if (cell_.states > 1) own.c = given_[d].d_c;
      own.d_gates = unwritten<E>(rows_ * (gates() + size_t(cell_.apart)) * hidden_);
      if (projected()) own.d_output = unwritten<E>(rows_ * output_);
    }
    run(place, true, to);
    return to;
  }

 private:
  struct Given {
    std::vector<E> w_hh, w_hr, h;
    std::vector<R> terms, apart_bias, c, d_h, d_c;
  };
  struct Workspace {
    std::vector<E> weights, projection, exchange, exchange_projected;
    std::vector<int> flags;
  };

  size_t gates() const { return size_t(cell_.gates); }
  size_t gate_stride() const { return size_t(std::max(cell_.gates, cell_.saved)) * hidden_; }
  bool projected() const { return hidden_ != output_; }

  // Weights as python/fastcell/cuda.py packs them: [units / 8][k chunk][group][8][64 bytes], zero
  // beside the `units` and `k` that `weight` (group, unit, k) has.
  template <class Weight>
  static std::vector<E> pack(size_t groups, size_t units, size_t k, size_t columns, size_t width,
                             const Weight& weight) {
    const size_t chunk = kChunkBytes / sizeof(E), group = kGroup;
    std::vector<E> packed(columns * groups * width);
    for (size_t g = 0; g < groups; ++g) {
      for (size_t u = 0; u < units; ++u) {
        for (size_t j = 0; j < k; ++j) {
          const size_t at = (u / group * (width / chunk) + j / chunk) * groups + g;
          Operand<P>::from(widen(weight(g, u, j)),
                           packed[(at * group + u % group) * chunk + j % chunk]);
        }
      }
    }
    return packed;
  }

  Workspace workspace(const Plan& plan, const Given& given, const std::vector<R>& h) const {
    const size_t units = size_t(plan.unit_warps) * kGroup, rows = size_t(plan.row_warps) * kWarpRows;
    const size_t columns = size_t(plan.unit_blocks) * units, samples = size_t(plan.tiles) * rows;
    const size_t width = size_t(plan.width), projected_width = size_t(plan.projected_width);
    const auto w_hh = [&](size_t g, size_t u, size_t k) {
      return given.w_hh[(g * hidden_ + u) * output_ + k];
    };
    // k over blocks of 8 units, in them gates, in them units.
    const auto by_unit = [&](size_t, size_t p, size_t k) {
      const size_t u = k / (kGroup * gates()) * kGroup + k % kGroup;
      return u < hidden_ ? w_hh(k / kGroup % gates(), u, p) : E{};
    };
    const auto w_hr = [&](size_t, size_t p, size_t k) { return given.w_hr[p * hidden_ + k]; };
    const auto transposed = [&](size_t, size_t u, size_t k) { return w_hr(0, k, u); };

    Workspace made;
    made.exchange.resize(2 * samples * width);
    made.exchange_projected.resize(samples * projected_width);
    made.flags.resize(size_t(plan.tiles * plan.unit_blocks));
    if (plan.sizes.backward) {
      const size_t k = (hidden_ + kGroup - 1) / kGroup * kGroup * gates();
      made.weights = pack(1, output_, k, columns, width, by_unit);
      if (projected()) {
        made.projection = pack(1, hidden_, output_, columns, projected_width, transposed);
      }
      return made;
    }
    made.weights = pack(gates(), hidden_, output_, columns, width, w_hh);
    if (projected()) made.projection = pack(1, output_, hidden_, columns, projected_width, w_hr);
    for (size_t i = 0; i < h.size(); ++i) {
      Operand<P>::from(h[i], made.exchange[i / output_ * width + i % output_]);
    }
    return made;
  }

  void run(const char* place, bool backward, Tensors& to) {
    const Plan plan = choose_plan(0, case_.cell, products_,
                                  {backward, case_.steps, case_.batch, case_.hidden, case_.output,
                                   kDirections, projected()},
                                  place);
    const bool grid = plan.place == Place::kGrid;
    several_blocks |= grid && plan.unit_blocks > 1;
    several_tiles_at_once |= grid && plan.tiles_at_once > 1;
    tiles_in_turn |= grid && plan.tiles_at_once < plan.tiles;

    Workspace work[kDirections];
    int status = 0;
    Sweep sweep{};
    for (int d = 0; d < kDirections; ++d) {
      Given& given = given_[d];
      auto& own = to.direction[d];
      work[d] = workspace(plan, given, own.h);
      Side& side = sweep.side[d];
      side.weights = work[d].weights.data();
      side.projection = work[d].projection.data();
      side.gates = own.gates.data();
      side.apart_bias = given.apart_bias.data();
      side.carry[0] = own.h.data();
      side.carry[1] = own.c.data();
      side.exchange = work[d].exchange.data();
      side.exchange_projected = work[d].exchange_projected.data();
      side.cells = own.cells.data();
      side.first[0] = given.h.data();
      side.first[1] = given.c.data();
      side.cell_output = own.cell_output.data();
      side.d_gates = own.d_gates.data();
      side.d_output = own.d_output.data();
      side.flags = work[d].flags.data();
    }
    if (case_.packed) {
      sweep.offsets = offsets_.data();
      sweep.lengths = lengths_.data();
    }
    sweep.gate_stride = int(gate_stride());
    sweep.y = to.y.data();
    sweep.d_y = backward ? d_y_.data() : nullptr;
    sweep.keep = true;
    sweep.finish = backward;
    sweep.status = &status;
    sweep.patience = 1LL << 40;
    fastcell::cuda::run(plan, sweep, nullptr);
  }

  const Case case_;
  const char* products_;
  const CellFacts& cell_;
  const size_t hidden_, output_, batch_;
  std::vector<long long> lengths_, offsets_;
  size_t rows_;
  Given given_[kDirections];
  std::vector<E> d_y_;
};

// Whether there are numbers everywhere, near the expected ones.
template <class T>
bool close(const std::vector<T>& found, const std::vector<T>& expected, double tolerance) {
  for (size_t i = 0; i < found.size(); ++i) {
    const double x = widen(found[i]), y = widen(expected[i]);
    // (False where one of them is NaN.)
    if (!(std::abs(x - y) <= tolerance * std::max(1.0, std::abs(y)))) return false;
  }
  return true;
}

template <class E, class R>
std::string differing(const Tensors<E, R>& found, const Tensors<E, R>& expected, double tolerance) {
  std::string names;
  const auto check = [&](const char* name, const auto& one, const auto& other) {
    if (!close(one, other, tolerance)) names += std::string(" ") + name;
  };
  check("y", found.y, expected.y);
  for (int d = 0; d < kDirections; ++d) {
    const auto &one = found.direction[d], &other = expected.direction[d];
    check("gates", one.gates, other.gates);
    check("cells", one.cells, other.cells);
    check("h", one.h, other.h);
    check("c", one.c, other.c);
    check("cell_output", one.cell_output, other.cell_output);
    check("d_gates", one.d_gates, other.d_gates);
    check("d_output", one.d_output, other.d_output);
  }
  return names;
}

template <class P>
void test(const Case& sizes, const char* products, double tolerance) {
  emulated::pretend({90, 2, 227 << 10, true, 16});
  Layer<P> layer(sizes, products);
  const auto forward = layer.forward("step");
  const auto backward = layer.backward("step", forward);
  for (const char* place : {"step", "grid", "cluster"}) {
    emulated::pretend({90, sizes.multiprocessors, 227 << 10, true, 16});
    if (std::string(place) != "step" && !products_facts(products).persistent) continue;
    const bool again = std::string(place) == "step";
    const std::string names[] = {
        differing(again ? forward : layer.forward(place), forward, tolerance),
        differing(again ? backward : layer.backward(place, forward), backward, tolerance)};
    for (const std::string& pass : names) {
      ++passes;
      if (pass.empty()) continue;
      ++failures;
      std::printf("%s%s, %s, %s%s, %s: wrong%s\n", sizes.cell,
                  sizes.hidden != sizes.output ? " projected" : "", products, place,
                  sizes.packed ? ", packed" : "", &pass == names ? "forward" : "backward",
                  pass.c_str());
    }
  }
}

}  // namespace

int main() {
  // More units than a block has at most, more samples than the fewest that one has.
  const Case cases[] = {
      {"rnn_tanh", 37, 37, 4, 19, false, 8}, {"rnn_relu", 37, 37, 4, 19, true, 4},
      {"lstm", 37, 37, 4, 19, true, 8},      {"lstm", 37, 21, 4, 19, false, 12},
      {"gru", 37, 37, 4, 19, true, 6},
  };
  for (const Case& sizes : cases) {
    test<Float64>(sizes, "float64", 0);
    test<Float32>(sizes, "float32", 1e-5);
    test<Tf32>(sizes, "tf32", 4e-3);
    test<Brain>(sizes, "bfloat16", 3e-2);
    test<Half>(sizes, "float16", 4e-3);
  }
  if (!several_blocks || !several_tiles_at_once || !tiles_in_turn) {
    std::printf("no grid has several blocks (%d), several tiles at once (%d), in turn (%d)\n",
                several_blocks, several_tiles_at_once, tiles_in_turn);
    ++failures;
  }
  std::printf("%d passes, %d failures\n", passes, failures);
  return failures ? 1 : 0;
}
