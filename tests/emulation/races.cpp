// The CUDA kernels as threads of this machine, without Python: for ThreadSanitizer, and to see that
// a layer has the same results in every place (step, grid, cluster).
//
// Defects that were put into the kernels, one at a time, and that it was seen to report: no barrier
// of the block after the parts of k, before publishing, after the flags, at the begin; a relaxed
// acquire, a relaxed release, a flag set before the barrier; no cluster barrier where h is sent or
// at the begin, or the block's in its place; one slot of the exchange for reading and writing, in
// each pass and place; waiting for one publication too few, for one's own flag alone, not at all
// before the projection; no barrier before, or after, the rows of a norm's sums. Not reported: no
// cluster barrier at the end, since the emulated blocks' shared memory lives on after them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/gpu_emulated.h"
#include "cuda/normed_run.h"
#include "cuda/products.h"
#include "cuda/run.h"

namespace {

using namespace fastcell::cuda;

struct Case {
  const char* cell;
  int hidden, output;  // a projection where they differ
  int directions;
  long long batch;
  bool packed;          // samples of different lengths, as in a PackedSequence
  int multiprocessors;  // of the emulated device
};
// Both slots of the exchange are written again and read again, and a launch begins with the second.
constexpr long long kSteps = 6, kFirstPart = 3;

// What is wrong on purpose, to see that the sanitizer finds it.
enum class Wrong { kNothing, kExchange, kStates } wrong = Wrong::kNothing;

std::mt19937 generator(1);

template <class T>
std::vector<T> random(size_t count, double size) {
  std::vector<T> made(count);
  for (T& x : made) {
    narrow(decltype(widen(x))(size * (double(generator()) / 0x1p31 - 1)), x);
  }
  return made;
}

template <class T>
std::vector<T> unwritten(size_t count) {
  T nan;
  narrow(std::numeric_limits<decltype(widen(nan))>::quiet_NaN(), nan);
  return std::vector<T>(count, nan);
}

// What the passes of one direction read and write, besides weights and workspace.
template <class E, class R>
struct Tensors {
  std::vector<R> gates, cells, h, c;
  std::vector<E> cell_output, d_gates, d_output;
};
template <class E, class R>
struct Results {
  std::vector<E> y;
  std::vector<Tensors<E, R>> of;  // each direction
};

template <class P>
class Layer {
 public:
  using E = typename P::Element;
  using R = typename P::Real;

  Layer(const Case& sizes, const char* products)
      : case_(sizes),
        products_(products),
        cell_(cell_facts(sizes.cell)),
        hidden_(size_t(sizes.hidden)),
        output_(size_t(sizes.output)),
        gates_(size_t(cell_.gates)),
        y_width_(size_t(sizes.directions) * output_),
        gate_stride_(size_t(std::max(cell_.gates, cell_.saved)) * hidden_),
        offsets_{0} {
    for (long long b = 0; b < sizes.batch; ++b) {
      lengths_.push_back(kSteps - (sizes.packed ? b * kSteps / sizes.batch : 0));
    }
    for (long long t = 0; t < kSteps; ++t) {
      const auto alive = [&](long long length) { return length > t; };
      offsets_.push_back(offsets_.back() + std::count_if(lengths_.begin(), lengths_.end(), alive));
    }
    rows_ = size_t(offsets_.back());
    const size_t batch = size_t(sizes.batch);
    for (int d = 0; d < sizes.directions; ++d) {
      given_.push_back({random<E>(gates_ * hidden_ * output_, 2 / std::sqrt(double(output_))),
                        random<E>(output_ * hidden_, 2 / std::sqrt(double(hidden_))),
                        random<E>(batch * output_, 1), random<R>(batch * output_, 1),
                        random<R>(rows_ * gates_ * hidden_, 1),
                        random<R>(size_t(cell_.apart) * hidden_, 1), random<R>(batch * hidden_, 1),
                        random<R>(batch * output_, 1), random<R>(batch * hidden_, 1)});
    }
    d_y_ = random<E>(rows_ * y_width_, 1);
    for (size_t row = 0; row < rows_; ++row) reset_.push_back(generator() % 4 == 0);
  }

  Results<E, R> forward(const char* place) {
    Results<E, R> to{unwritten<E>(rows_ * y_width_), {}};
    for (const Given& given : given_) {
      Tensors<E, R> own;
      own.gates = unwritten<R>(rows_ * gate_stride_);
      for (size_t row = 0; row < rows_; ++row) {
        std::copy_n(&given.terms[row * gates_ * hidden_], gates_ * hidden_,
                    &own.gates[row * gate_stride_]);
      }
      for (const E h : given.h) own.h.push_back(widen(h));
      if (cell_.states > 1) {
        own.c = given.c;
        own.cells = unwritten<R>(rows_ * hidden_);
      }
      if (projected()) own.cell_output = unwritten<E>(rows_ * hidden_);
      to.of.push_back(own);
    }
    run(place, false, to);
    return to;
  }

  // `to`: as a forward call left it.
  Results<E, R> backward(const char* place, Results<E, R> to) {
    for (size_t d = 0; d < given_.size(); ++d) {
      Tensors<E, R>& own = to.of[d];
      own.h = given_[d].d_h;
      if (cell_.states > 1) own.c = given_[d].d_c;
      own.d_gates = unwritten<E>(rows_ * (gates_ + size_t(cell_.apart)) * hidden_);
      if (projected()) own.d_output = unwritten<E>(rows_ * output_);
    }
    run(place, true, to);
    return to;
  }

 private:
  struct Given {
    std::vector<E> w_hh, w_hr, h;
    std::vector<R> factors, terms, apart_bias, c, d_h, d_c;
  };
  struct Workspace {
    std::vector<E> weights, projection, exchange, exchange_projected;
    std::vector<int> flags;
  };

  bool projected() const { return hidden_ != output_; }

  // Weights as python/fastcell/cuda_weights.py packs them: [units / 8][k chunk][group][8][64
  // bytes], zero beside the `units` and `k` that `weight` (group, unit, k) has.
  template <class Weight>
  static std::vector<E> pack(size_t groups, size_t units, size_t k, size_t columns, int width,
                             const Weight& weight) {
    const size_t chunk = kChunkBytes / sizeof(E), chunks = size_t(width) / chunk;
    std::vector<E> packed(columns * groups * size_t(width));
    for (size_t g = 0; g < groups; ++g) {
      for (size_t u = 0; u < units; ++u) {
        for (size_t j = 0; j < k; ++j) {
          const size_t group = (u / kGroup * chunks + j / chunk) * groups + g;
          Operand<P>::from(widen(weight(g, u, j)),
                           packed[(group * kGroup + u % kGroup) * chunk + j % chunk]);
        }
      }
    }
    return packed;
  }

  Workspace workspace(const Plan& plan, const Given& given, const std::vector<R>& h,
                      bool reverse) const {
    const size_t columns = size_t(plan.unit_blocks * plan.unit_warps) * kGroup;
    const size_t samples = size_t(plan.tiles * plan.row_warps) * kWarpRows;
    const auto w_hh = [&](size_t g, size_t u, size_t k) {
      return given.w_hh[(g * hidden_ + u) * output_ + k];
    };
    // k over blocks of 8 units, in them gates, in them units.
    const auto by_unit = [&](size_t, size_t p, size_t k) {
      const size_t u = k / (kGroup * gates_) * kGroup + k % kGroup;
      return u < hidden_ ? w_hh(k / kGroup % gates_, u, p) : E{};
    };
    const auto w_hr = [&](size_t, size_t p, size_t k) { return given.w_hr[p * hidden_ + k]; };
    const auto transposed = [&](size_t, size_t u, size_t k) { return w_hr(0, k, u); };

    Workspace made;
    made.exchange.resize(2 * samples * size_t(plan.stride));
    made.exchange_projected.resize(samples * size_t(plan.projected_stride));
    made.flags.resize(size_t(plan.tiles * plan.unit_blocks));
    if (plan.sizes.backward) {
      const size_t k = (hidden_ + kGroup - 1) / kGroup * kGroup * gates_;
      made.weights = pack(1, output_, k, columns, plan.width, by_unit);
      if (projected()) {
        made.projection = pack(1, hidden_, output_, columns, plan.projected_width, transposed);
      }
      return made;
    }
    made.weights = pack(gates_, hidden_, output_, columns, plan.width, w_hh);
    if (projected()) {
      made.projection = pack(1, output_, hidden_, columns, plan.projected_width, w_hr);
    }
    const size_t first = reverse ? kSteps - 1 : 0;  // step
    for (size_t i = 0; i < h.size(); ++i) {
      const size_t sample = i / output_;
      const bool alive = lengths_[sample] > (long long)(first);
      if (alive && reset_[size_t(offsets_[first]) + sample]) continue;
      Operand<P>::from(h[i] * given.factors[i],
                       made.exchange[sample * size_t(plan.stride) + i % output_]);
    }
    return made;
  }

  void run(const char* place, bool backward, Results<E, R>& to) {
    const Sizes sizes{backward,     kSteps,           case_.batch, case_.hidden,
                      case_.output, case_.directions, projected()};
    const Plan plan = choose_plan(0, cell_, products_, sizes, place);
    std::vector<Workspace> work;
    int status = 0;
    Sweep sweep{};
    for (size_t d = 0; d < given_.size(); ++d) {
      Given& given = given_[d];
      Tensors<E, R>& own = to.of[d];
      work.push_back(workspace(plan, given, own.h, d == 1));
      Side& side = sweep.side[d];
      side.weights = work[d].weights.data();
      side.projection = work[d].projection.data();
      side.gates = own.gates.data();
      side.factors = given.factors.data();
      side.apart_bias = given.apart_bias.data();
      side.carry[0] = wrong == Wrong::kStates ? own.c.data() : own.h.data();
      side.carry[1] = own.c.data();
      side.exchange = work[wrong == Wrong::kExchange ? 0 : d].exchange.data();
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
    sweep.reset = reset_.data();
    sweep.gate_stride = int(gate_stride_);
    sweep.y = to.y.data();
    sweep.d_y = backward ? d_y_.data() : nullptr;
    sweep.keep = true;
    sweep.finish = backward;
    sweep.status = &status;
    sweep.patience = 1LL << 40;
    // In two parts, as a wavefront of layers runs it.
    fastcell::cuda::run(plan, sweep, 0, kFirstPart, nullptr);
    fastcell::cuda::run(plan, sweep, kFirstPart, kSteps, nullptr);
  }

  const Case case_;
  const char* products_;
  const CellFacts& cell_;
  const size_t hidden_, output_, gates_, y_width_, gate_stride_;
  std::vector<long long> lengths_, offsets_;
  size_t rows_;
  std::vector<Given> given_;
  std::vector<E> d_y_;
  std::vector<unsigned char> reset_;  // of each row
};

// The names of what is not near the expected numbers; NaN is near nothing.
template <class E, class R>
std::string differing(const Results<E, R>& found, const Results<E, R>& expected, double tolerance) {
  std::string names;
  const auto check = [&](const char* name, const auto& some, const auto& others) {
    const auto near = [&](auto a, auto b) {
      const double x = widen(a), y = widen(b);
      return std::abs(x - y) <= tolerance * std::max(1.0, std::abs(y));
    };
    if (!std::equal(some.begin(), some.end(), others.begin(), others.end(), near)) {
      names += std::string(" ") + name;
    }
  };
  check("y", found.y, expected.y);
  for (size_t d = 0; d < found.of.size(); ++d) {
    const Tensors<E, R>&one = found.of[d], &other = expected.of[d];
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

int passes = 0, failures = 0;

template <class P>
void test(const Case& sizes, const char* products, double tolerance) {
  const auto pretend = [](int multiprocessors) {
    emulated::pretend({90, multiprocessors, 227 << 10, true, 16});
  };
  pretend(1);  // few blocks: what a step's launch has it shares with no other
  Layer<P> layer(sizes, products);
  const auto forward = layer.forward("step");
  const auto backward = layer.backward("step", forward);
  const auto report = [&](const char* place, const char* pass, const std::string& names) {
    ++passes;
    if (names.empty()) return;
    ++failures;
    std::printf("%s%s, %s, %s, %s:%s\n", sizes.cell,
                sizes.hidden == sizes.output ? "" : " projected", products, place, pass,
                names.c_str());
  };
  report("step", "forward", differing(forward, forward, tolerance));
  report("step", "backward", differing(backward, backward, tolerance));
  if (!products_facts(products).persistent) return;
  pretend(sizes.multiprocessors);
  for (const char* place : {"grid", "cluster"}) {
    report(place, "forward", differing(layer.forward(place), forward, tolerance));
    report(place, "backward", differing(layer.backward(place, forward), backward, tolerance));
  }
}

// A layer with layer normalisation, both passes; `projection`: to how many numbers, or 0. What it
// finds is finite, whatever lay in memory; test_cuda_layer_norm.py says whether it is right.
template <class P>
void test_normed(const char* cell, const char* products, int projection) {
  using E = typename P::Element;
  using R = typename P::Real;
  emulated::pretend({90, 1, 227 << 10, true, 16});
  constexpr int kHidden = 37;
  constexpr long long kBatch = 3;
  const bool lstm = std::string(cell) == "lstm";
  const size_t wide = (lstm ? 4 : 3) * kHidden, units = kHidden, batch = kBatch;
  const size_t outputs = projection > 0 ? size_t(projection) : units;
  const size_t rows = kSteps * batch, norms = 2;
  const auto terms = random<R>(rows * wide, 1), gain = random<R>(wide, 1);
  const auto bias = random<R>(wide, 1), cell_norm = random<R>(2 * units, 1);
  const auto d_y = random<E>(rows * outputs, 1);
  auto y = unwritten<E>(rows * outputs), d_sums = unwritten<E>(rows * wide), before = y;
  auto cell_output = unwritten<E>(rows * units), d_output = y;
  auto normed = unwritten<R>(rows * wide), gates = unwritten<R>(rows * 4 * units);
  auto cells = unwritten<R>(2 * rows * units), scales = unwritten<R>(rows * norms);
  auto d_terms = normed, d_normed = normed, d_cell = unwritten<R>(rows * units);
  std::vector<unsigned char> reset;
  for (size_t row = 0; row < rows; ++row) reset.push_back(generator() % 4 == 0);
  NormedStep step{};
  step.reset = reset.data();
  step.terms = terms.data();
  step.gain = gain.data();
  step.bias = bias.data();
  step.cell_norm = cell_norm.data();
  step.y = y.data();
  step.normed = normed.data();
  step.gates = gates.data();
  step.cells = lstm ? cells.data() : nullptr;
  step.scales = scales.data();
  step.d_y = d_y.data();
  step.d_terms = d_terms.data();
  step.d_normed = d_normed.data();
  step.d_sums = d_sums.data();
  step.d_cell = d_cell.data();
  step.before = before.data();
  if (projection > 0) {
    step.cell_output = cell_output.data();
    step.d_output = d_output.data();
  }
  for (const bool backward : {false, true}) {
    const NormedPlan plan =
        choose_normed_plan(0, cell, products, backward, kSteps, kBatch, kHidden, projection);
    std::vector<E> weights[2], operands[2];
    const auto prepare = [&](int i, const Plan& product) {
      weights[i] = random<E>(size_t(columns_of(product) * product.width), 0.1);
      operands[i].resize(size_t(samples_of(product) * product.width));
    };
    prepare(0, plan.product);
    if (plan.projection) prepare(1, *plan.projection);
    auto sums = unwritten<R>(batch * (backward ? units : wide));
    std::vector<R> h(batch * outputs), c(batch * units);
    step.carry[0] = h.data();
    step.carry[1] = c.data();
    step.sums = sums.data();
    step.operand = operands[0].data();
    step.projected = plan.projection ? operands[1].data() : nullptr;
    const fastcell::Timeline time{kSteps, kBatch, int64_t(rows), nullptr};
    fastcell::cuda::run(plan, step, time, false, weights[0].data(), weights[1].data(), nullptr);
    const auto finite = [](const auto& some) {
      return std::all_of(some.begin(), some.end(),
                         [](auto x) { return std::isfinite(double(widen(x))); });
    };
    ++passes;
    if (finite(h) && finite(c) && finite(y) &&
        (!backward || (finite(sums) && finite(d_terms) && finite(d_normed) && finite(d_sums) &&
                       (projection == 0 || (finite(cell_output) && finite(d_output)))))) {
      continue;
    }
    ++failures;
    std::printf("normed %s%s, %s, %s\n", cell, projection > 0 ? " projected" : "", products,
                backward ? "backward" : "forward");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string argument = count > 1 ? arguments[1] : "";
  if (argument == "exchange") {  // two directions have one between them
    wrong = Wrong::kExchange;
    Layer<Float32>({"gru", 37, 37, 2, 16, false, 4}, "float32").forward("grid");
    return 0;
  }
  if (argument == "states") {  // one block's threads write h and c to one place
    wrong = Wrong::kStates;
    Layer<Float32>({"lstm", 8, 6, 1, 16, false, 1}, "float32").forward("step");
    return 0;
  }
  // More units than a block can have, more samples than a block may have.
  const Case cases[] = {
      {"rnn_tanh", 37, 37, 1, 19, false, 4}, {"rnn_relu", 37, 37, 1, 19, true, 2},
      {"lstm", 37, 37, 1, 19, true, 4},      {"gru", 69, 69, 1, 19, true, 6},
      {"lstm", 37, 21, 2, 19, false, 8},
  };
  for (const Case& sizes : cases) {
    test<Float64>(sizes, "float64", 0);
    test<Float32>(sizes, "float32", 1e-5);
    test<Tf32>(sizes, "tf32", 4e-3);
    test<Brain>(sizes, "bfloat16", 3e-2);
    test<Half>(sizes, "float16", 4e-3);
  }
  const auto test_norms = [](const char* cell, int projection) {
    test_normed<Float64>(cell, "float64", projection);
    test_normed<Float32>(cell, "float32", projection);
    test_normed<Tf32>(cell, "tf32", projection);
    test_normed<Brain>(cell, "bfloat16", projection);
    test_normed<Half>(cell, "float16", projection);
  };
  test_norms("lstm", 0);
  test_norms("gru", 0);
  test_norms("lstm", 21);
  std::printf("%d passes, %d failures\n", passes, failures);
  return failures ? 1 : 0;
}
