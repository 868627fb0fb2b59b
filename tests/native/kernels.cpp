// The kernels without Python: forward against plain loops in double, backward against finite
// differences, float against double. For targets that have no Python at hand, such as an emulator
// (make test-aarch64).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/noise.h"
#include "cpu/engine.h"
#include "reservoir.h"

using namespace fastcell;

namespace {

struct Case {
  const char* cell;
  int64_t steps, batch, input, hidden, proj;
  int layers, directions;
  bool bias, ragged;
  Schedule schedule;
  bool extras;  // resets, factors of h in the recurrent products, drawn zoneout
};

using Values = std::vector<double>;

std::uint64_t random_state = 88172645463325252ull;
double random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return double(random_state >> 11) / double(1ull << 53) * 2 - 1;
}
Values random_values(int64_t count, double size = 1) {
  Values v(static_cast<size_t>(count));
  for (double& x : v) x = size * random_number();
  return v;
}

// All that a call takes and gives, in double.
struct Problem {
  Stack stack;
  Timeline time;
  std::vector<int64_t> offsets;
  Values x;
  std::vector<Values> weights;
  Values state[kMaxStates];
  bool extras;
  Values factors;
  std::vector<std::uint8_t> reset;
  std::uint64_t seed;
};

struct Result {
  Values y, final_state[kMaxStates];
};

struct Gradients {
  Values d_x;
  std::vector<Values> d_weights;
  Values d_state[kMaxStates];
};

bool has_options(const std::string& cell) {
  return cell == "independent" || cell == "gru_before" ||
         cell.find("_general") != std::string::npos;
}

// Of the cells that have options, each other ones. With a projection no h can be held.
CellOptions options_for(const Case& c) {
  if (!has_options(c.cell)) return {};
  const int number = int(std::strlen(c.cell));
  const bool clips = !std::strncmp(c.cell, "lstm", 4);
  return {Activation(number % kActivations),
          Activation((number + 1) % kActivations),
          clips,
          0.9,
          {c.proj ? 0 : 0.25, clips ? 0.5 : 0}};
}

Problem make_problem(const Case& c, const CellKernels& cell) {
  Problem p;
  const bool projected = c.proj > 0;
  p.stack = {
      DType::kFloat64, Products::kExact, c.input,  c.hidden,     projected ? c.proj : c.hidden,
      projected,       c.bias,           c.layers, c.directions, cell.parameters,
      cell.recurrent,  options_for(c)};
  int64_t rows = c.steps * c.batch;
  if (c.ragged) {
    // Samples end one after the other, some together.
    p.offsets.push_back(0);
    for (int64_t t = 0; t < c.steps; ++t) {
      const int64_t alive = c.batch - (c.batch - 1) * t / c.steps;
      p.offsets.push_back(p.offsets.back() + alive);
    }
    rows = p.offsets.back();
  }
  p.time = {c.steps, c.batch, rows, c.ragged ? p.offsets.data() : nullptr};
  p.x = random_values(rows * c.input);
  const double size = 1 / std::sqrt(double(c.hidden));
  for (int layer = 0; layer < c.layers; ++layer) {
    for (int dir = 0; dir < c.directions; ++dir) {
      const int64_t gates = cell.gates * c.hidden;
      p.weights.push_back(random_values(gates * p.stack.layer_input(layer), size));
      const int64_t recurrent = cell.recurrent ? gates : cell.parameters;
      p.weights.push_back(random_values(recurrent * p.stack.output, size));
      if (c.bias) {
        p.weights.push_back(random_values(gates, size));
        p.weights.push_back(random_values(gates, size));
      }
      if (projected) p.weights.push_back(random_values(p.stack.output * c.hidden, size));
      if (cell.parameters && cell.recurrent) {
        p.weights.push_back(random_values(cell.parameters * c.hidden, size));
      }
    }
  }
  for (int i = 0; i < cell.states; ++i) {
    p.state[i] = random_values(c.layers * c.directions * c.batch * p.stack.state_size(i));
  }
  p.extras = c.extras;
  p.factors = random_values(c.layers * c.directions * c.batch * p.stack.output, 2);
  for (int64_t row = 0; row < rows; ++row) p.reset.push_back(random_number() < -0.5);
  p.seed = 0x123456789abcdefull;
  return p;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double activate(Activation which, double x) {
  switch (which) {
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kRelu:
      return std::fmax(0.0, x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kIdentity:
      return x;
    case Activation::kSoftsign:
      return x / (1 + std::fabs(x));
    case Activation::kElu:
      return x < 0 ? std::expm1(x) : x;
  }
  return NAN;
}

// One unit's step: input terms x[gate], recurrent terms h[gate], both with their biases, and the
// unit's own parameters p. What zoneout does comes after it.
void step(const std::string& name, const CellOptions& options, const double* x, const double* h,
          const double* p, double& out, double& c) {
  const std::string cell = name.substr(0, name.find("_general"));
  const auto phi = [&](double a) { return activate(options.activation, a); };
  if (cell == "rnn_tanh") {
    out = std::tanh(x[0] + h[0]);
  } else if (cell == "rnn_relu") {
    out = std::fmax(0.0, x[0] + h[0]);
  } else if (cell == "rnn") {
    out = phi(x[0] + h[0]);
  } else if (cell == "independent") {
    out = phi(x[0] + h[0] + p[0] * out);
  } else if (cell == "leaky_tanh" || cell == "leaky_relu") {
    const double a = x[0] + h[0];
    const double v = cell == "leaky_tanh" ? std::tanh(a) : std::fmax(0.0, a);
    out = p[0] * out + (1 - p[0]) * v;
  } else if (cell.compare(0, 4, "lstm") == 0) {
    const bool coupled = cell.find("coupled") != std::string::npos;
    const bool peephole = cell.find("peephole") != std::string::npos;
    const int g = coupled ? 1 : 2, o = g + 1;
    const auto bounded = [&](double a) {
      return options.clips ? std::fmax(-options.clip, std::fmin(options.clip, a)) : a;
    };
    const auto seen = [&](int gate, int row) {
      return bounded(x[gate] + h[gate] + (peephole ? p[row] * c : 0));
    };
    const double i = sigmoid(seen(0, 0));
    const double f = coupled ? 1 - i : sigmoid(seen(1, 1));
    c = f * c + i * phi(bounded(x[g] + h[g]));
    out = sigmoid(seen(o, o - 1)) * activate(options.output_activation, c);
  } else if (cell == "gru") {
    const double r = sigmoid(x[0] + h[0]), z = sigmoid(x[1] + h[1]);
    out = (1 - z) * phi(x[2] + r * h[2]) + z * out;
  } else if (cell == "gru_before") {  // h[2]: the product with what the reset gate left of h
    const double z = sigmoid(x[1] + h[1]);
    out = (1 - z) * phi(x[2] + h[2]) + z * out;
  } else {
    std::printf("no plain step for the cell %s: write one\n", name.c_str());
    std::exit(1);
  }
}

// The part of a unit's state that stays.
double held(const Problem& p, int at, int state, int64_t row, int64_t unit) {
  const double part = p.stack.options.zoneout[state];
  if (!p.extras) return part;
  const noise::Bits own = noise::state_key(p.seed, noise::Bits(at), noise::Bits(state));
  const noise::Bits key = noise::row_key(own, noise::Counter(row));
  return noise::draw(key, noise::Bits(unit)) < noise::threshold(part) ? 1 : 0;
}

// What a product sees of a row.
using Seen = Values (*)(const double* row, int64_t count);
Values as_it_is(const double* row, int64_t count) { return Values(row, row + count); }

double to_bfloat16(double x) {
  const float value = float(x);
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, 4);
  return rounded;
}
Values rounded(const double* row, int64_t count) {
  Values v(row, row + count);
  for (double& x : v) x = to_bfloat16(x);
  return v;
}

double scale_of(const double* row, int64_t count) {
  double most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::fmax(most, std::fabs(row[i]));
  return most / 127;
}
Values quantized(const double* row, int64_t count) {
  const double scale = scale_of(row, count);
  Values v(row, row + count);
  for (double& x : v) x = scale > 0 ? scale * std::nearbyint(x / scale) : 0;
  return v;
}

Result plain_forward(const Problem& p, const CellKernels& cell, Seen seen = as_it_is) {
  const Stack& s = p.stack;
  const int64_t width = s.directions * s.output, H = s.hidden;
  Result result;
  Values input = p.x;
  for (int i = 0; i < cell.states; ++i) result.final_state[i] = p.state[i];
  for (int layer = 0; layer < s.layers; ++layer) {
    const int64_t features = s.layer_input(layer);
    result.y.assign(size_t(p.time.rows * width), 0);
    for (int dir = 0; dir < s.directions; ++dir) {
      const int at = layer * s.directions + dir;
      const Values* w = &p.weights[size_t(at * s.weights_each())];
      double* const h = &result.final_state[0][size_t(at * p.time.batch * s.output)];
      double* const c =
          cell.states > 1 ? &result.final_state[1][size_t(at * p.time.batch * H)] : nullptr;
      for (int64_t i = 0; i < p.time.steps; ++i) {
        const int64_t t = dir ? p.time.steps - 1 - i : i;
        for (int64_t b = 0; b < p.time.alive(t); ++b) {
          const int64_t row = p.time.first(t) + b;
          if (p.extras && p.reset[size_t(row)]) {
            std::fill_n(h + b * s.output, s.output, 0);
            if (c) std::fill_n(c + b * H, H, 0);
          }
          const Values x = seen(&input[size_t(row * features)], features);
          Values h_seen = seen(h + b * s.output, s.output);
          for (int64_t k = 0; p.extras && k < s.output; ++k) {
            h_seen[size_t(k)] *= p.factors[size_t((at * p.time.batch + b) * s.output + k)];
          }
          Values next(static_cast<size_t>(H));
          const auto terms = [&](int g, int64_t unit, const Values& taken, double& of_x,
                                 double& of_h) {
            const int64_t line = g * H + unit;
            of_x = s.bias ? w[2][size_t(line)] : 0;
            of_h = s.bias ? w[3][size_t(line)] : 0;
            for (int64_t k = 0; k < features; ++k) {
              of_x += w[0][size_t(line * features + k)] * x[size_t(k)];
            }
            for (int64_t k = 0; s.recurrent && k < s.output; ++k) {
              of_h += w[1][size_t(line * s.output + k)] * taken[size_t(k)];
            }
          };
          const bool reset_before = !std::strcmp(cell.name, "gru_before");
          Values left = h_seen;  // of h, by the reset gate
          for (int64_t unit = 0; reset_before && unit < H; ++unit) {
            double of_x, of_h;
            terms(0, unit, h_seen, of_x, of_h);
            left[size_t(unit)] *= sigmoid(of_x + of_h);
          }
          for (int64_t unit = 0; unit < H; ++unit) {
            double x_terms[4], h_terms[4];
            for (int g = 0; g < cell.gates; ++g) {
              terms(g, unit, reset_before && g == 2 ? left : h_seen, x_terms[g], h_terms[g]);
            }
            double none = 0;
            next[size_t(unit)] = s.projected ? 0 : h[b * s.output + unit];
            double own[3] = {};
            for (int k = 0; k < cell.parameters; ++k) {
              own[k] = w[s.parameters_at()][size_t(k * H + unit)];
            }
            double& memory = c ? c[b * H + unit] : none;
            const double before[] = {next[size_t(unit)], memory};
            step(cell.name, s.options, x_terms, h_terms, own, next[size_t(unit)], memory);
            double* const after[] = {&next[size_t(unit)], &memory};
            for (int i = 0; i < cell.states; ++i) {
              const double hold = held(p, at, i, row, unit);
              *after[i] = hold * before[i] + (1 - hold) * *after[i];
            }
          }
          const Values m = seen(next.data(), H);
          for (int64_t j = 0; j < s.output; ++j) {
            double value = s.projected ? 0 : next[size_t(j)];
            for (int64_t k = 0; s.projected && k < H; ++k) {
              value += w[s.projection_at()][size_t(j * H + k)] * m[size_t(k)];
            }
            h[b * s.output + j] = result.y[size_t(row * width + dir * s.output + j)] = value;
          }
        }
      }
    }
    input = result.y;
  }
  return result;
}

// A buffer of T, with NaN in what nobody has written and a guard behind it.
template <class T>
struct Buffer {
  explicit Buffer(size_t count)
      : values(count + 16, std::numeric_limits<T>::quiet_NaN()), n(count) {}
  explicit Buffer(const Values& from) : Buffer(from.size()) {
    for (size_t i = 0; i < n; ++i) values[i] = T(from[i]);
  }
  T* data() { return values.data(); }
  Values read() const {
    for (size_t i = n; i < values.size(); ++i) {
      if (values[i] == values[i]) {
        std::printf("written past the end of a buffer\n");
        std::exit(1);
      }
    }
    return Values(values.begin(), values.begin() + std::ptrdiff_t(n));
  }
  std::vector<T> values;
  size_t n;
};

struct Aligned {
  explicit Aligned(int64_t bytes) : p(std::aligned_alloc(64, size_t(bytes + 127) / 64 * 64)) {
    std::memset(p, 0xff, size_t(bytes));  // NaN
  }
  ~Aligned() { std::free(p); }
  void* p;
};

template <class Call>
void run(const Call& call, void (*kernel)(const Call&, const Team&, Barrier*)) {
  struct Job {
    const Call& call;
    void (*kernel)(const Call&, const Team&, Barrier*);
  } job{call, kernel};
  run_team(
      call.schedule.threads(),
      [](const Team& team, Barrier* barriers, const void* context) {
        const Job& job = *static_cast<const Job*>(context);
        job.kernel(job.call, team, barriers);
      },
      &job);
}

// `factors`: the problem's, in the dtype of the call.
Extras extras_of(const Problem& p, const void* factors) {
  if (!p.extras) return {};
  return {nullptr, p.stack.recurrent ? factors : nullptr, p.reset.data(), &p.seed};
}

// The kernels at T; with `gradients` also backward, of sum(y * d_y) + sum(final * d_final).
template <class T>
Result run_kernels(const Problem& p, const CellKernels& cell, const Schedule& schedule,
                   const Result* d_result, Gradients* gradients) {
  Stack s = p.stack;
  s.dtype = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
  const int64_t width = s.directions * s.output;
  std::vector<Buffer<T>> weights;
  for (const Values& w : p.weights) weights.emplace_back(w);
  std::vector<const void*> pointers;
  for (Buffer<T>& w : weights) pointers.push_back(w.data());
  Buffer<T> x(p.x), y(size_t(p.time.rows * width));
  std::vector<Buffer<T>> initial, final_state;
  for (int i = 0; i < cell.states; ++i) {
    initial.emplace_back(p.state[i]);
    final_state.emplace_back(p.state[i].size());
  }
  Aligned packed(cell.packed_bytes(s));
  cell.pack(s, pointers.data(), packed.p, Team{});

  ForwardCall call{};
  call.stack = s;
  call.time = p.time;
  call.schedule = schedule;
  call.x = {reinterpret_cast<const char*>(x.data()), p.time.batch * s.input, s.input,
            p.time.offsets != nullptr};
  for (int i = 0; i < cell.states; ++i) {
    call.state[i] = initial[size_t(i)].data();
    call.final_state[i] = final_state[size_t(i)].data();
  }
  call.y = y.data();
  call.packed = packed.p;
  Buffer<T> factors(p.factors);
  call.extras = extras_of(p, factors.data());
  const int64_t kept = ReserveLayout(s, cell.saved, cell.states).row_elements * p.time.rows;
  Aligned reserve(kept * int64_t(sizeof(T)));
  if (gradients) call.reserve = reserve.p;
  Aligned workspace(cell.forward_workspace(call, schedule.threads()));
  call.workspace = workspace.p;
  run(call, cell.forward);
  Result result;
  result.y = y.read();
  for (int i = 0; i < cell.states; ++i) result.final_state[i] = final_state[size_t(i)].read();
  if (!gradients) return result;

  Buffer<T> d_y(d_result->y), d_x(p.x.size());
  std::vector<Buffer<T>> d_final, d_initial, d_weights;
  for (int i = 0; i < cell.states; ++i) {
    d_final.emplace_back(d_result->final_state[i]);
    d_initial.emplace_back(p.state[i].size());
  }
  for (const Values& w : p.weights) d_weights.emplace_back(w.size());
  std::vector<void*> d_pointers;
  for (Buffer<T>& w : d_weights) d_pointers.push_back(w.data());
  BackwardCall back{};
  back.stack = s;
  back.time = p.time;
  back.schedule = schedule;
  back.x = call.x;
  back.d_x = {reinterpret_cast<char*>(d_x.data()), call.x.step, call.x.row, call.x.packed};
  back.d_y = {reinterpret_cast<const char*>(d_y.data()), p.time.batch * width, width,
              call.x.packed};
  for (int i = 0; i < cell.states; ++i) {
    back.state[i] = initial[size_t(i)].data();
    back.d_final[i] = d_final[size_t(i)].data();
    back.d_state[i] = d_initial[size_t(i)].data();
  }
  back.weights = pointers.data();
  back.d_weights = d_pointers.data();
  back.extras = call.extras;
  back.reserve = reserve.p;
  Aligned back_workspace(cell.backward_workspace(back, schedule.threads()));
  back.workspace = back_workspace.p;
  run(back, cell.backward);
  gradients->d_x = d_x.read();
  for (int i = 0; i < cell.states; ++i) gradients->d_state[i] = d_initial[size_t(i)].read();
  for (Buffer<T>& w : d_weights) gradients->d_weights.push_back(w.read());
  return result;
}

// Inference with narrow products. `p`'s matrices hold numbers that the narrow ones hold exactly.
Result run_narrow(const Problem& p, const CellKernels& cell, const Schedule& schedule,
                  Products products) {
  Stack s = p.stack;
  s.dtype = DType::kFloat32;
  const int each = s.weights_each();
  s.products = products;
  std::vector<std::vector<std::uint16_t>> halves;
  std::vector<std::vector<std::int8_t>> bytes;
  std::vector<Buffer<float>> floats;
  std::vector<const void*> pointers;
  floats.reserve(4 * p.weights.size());
  halves.reserve(p.weights.size());
  bytes.reserve(p.weights.size());
  for (size_t at = 0; at < p.weights.size(); at += size_t(each)) {
    std::vector<const void*> scales;
    for (int i = 0; i < each; ++i) {
      const Values& w = p.weights[at + size_t(i)];
      const bool matrix = i < 2 || (s.projected && i == s.projection_at());
      if (!matrix) {
        floats.emplace_back(w);
        pointers.push_back(floats.back().data());
      } else if (products == Products::kBFloat16) {
        halves.emplace_back();
        for (double x : w) {
          const float value = float(x);
          std::uint32_t bits;
          std::memcpy(&bits, &value, 4);
          halves.back().push_back(std::uint16_t(bits >> 16));
        }
        pointers.push_back(halves.back().data());
      } else {
        const int layer = int(at / size_t(each)) / s.directions;
        const int64_t columns = i == 0 ? s.layer_input(layer) : i == 1 ? s.output : s.hidden;
        Values scale;
        bytes.emplace_back();
        for (size_t row = 0; row < w.size(); row += size_t(columns)) {
          scale.push_back(scale_of(&w[row], columns));
          for (int64_t k = 0; k < columns; ++k) {
            bytes.back().push_back(std::int8_t(std::lround(w[row + size_t(k)] / scale.back())));
          }
        }
        pointers.push_back(bytes.back().data());
        floats.emplace_back(scale);
        scales.push_back(floats.back().data());
      }
    }
    pointers.insert(pointers.end(), scales.begin(), scales.end());
  }
  Aligned packed(cell.packed_bytes(s));
  cell.pack(s, pointers.data(), packed.p, Team{});
  Buffer<float> x(p.x), y(size_t(p.time.rows * s.directions * s.output));
  std::vector<Buffer<float>> initial, final_state;
  ForwardCall call{};
  call.stack = s;
  call.time = p.time;
  call.schedule = schedule;
  call.x = {reinterpret_cast<const char*>(x.data()), p.time.batch * s.input, s.input,
            p.time.offsets != nullptr};
  for (int i = 0; i < cell.states; ++i) {
    initial.emplace_back(p.state[i]);
    final_state.emplace_back(p.state[i].size());
  }
  for (int i = 0; i < cell.states; ++i) {
    call.state[i] = initial[size_t(i)].data();
    call.final_state[i] = final_state[size_t(i)].data();
  }
  call.y = y.data();
  call.packed = packed.p;
  Aligned workspace(cell.forward_workspace(call, schedule.threads()));
  call.workspace = workspace.p;
  run(call, cell.forward);
  Result result;
  result.y = y.read();
  for (int i = 0; i < cell.states; ++i) result.final_state[i] = final_state[size_t(i)].read();
  return result;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double largest_difference(const Values& a, const Values& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    const double d = std::fabs(a[i] - b[i]);
    if (!(d <= largest)) largest = d;  // NaN too
  }
  return largest;
}

int failures = 0;

void check(const Case& c, const char* what, double error, double bound) {
  if (error <= bound) return;
  ++failures;
  std::printf("%s T%d B%d I%d H%d P%d layers %d directions %d%s: %s is off by %.3g, bound %.3g\n",
              c.cell, int(c.steps), int(c.batch), int(c.input), int(c.hidden), int(c.proj),
              c.layers, c.directions, c.ragged ? " ragged" : "", what, error, bound);
}

void run_case(const Case& c, const CellKernels& wide, const CellKernels& narrow) {
  const Problem p = make_problem(c, wide);
  const Result expected = plain_forward(p, wide);
  Result d;
  d.y = random_values(int64_t(expected.y.size()));
  for (int i = 0; i < wide.states; ++i)
    d.final_state[i] = random_values(int64_t(p.state[i].size()));

  Gradients gradients, gradients32;
  const Result found = run_kernels<double>(p, wide, c.schedule, &d, &gradients);
  const Result inferred = run_kernels<double>(p, wide, c.schedule, nullptr, nullptr);
  const Result found32 = run_kernels<float>(p, narrow, c.schedule, &d, &gradients32);
  check(c, "output", largest_difference(found.y, expected.y), 1e-12);
  check(c, "output (inference)", largest_difference(inferred.y, found.y), 0);
  check(c, "output (float)", largest_difference(found32.y, expected.y), 2e-5);
  for (int i = 0; i < wide.states; ++i) {
    check(c, "final state", largest_difference(found.final_state[i], expected.final_state[i]),
          1e-12);
    check(c, "final state (float)",
          largest_difference(found32.final_state[i], expected.final_state[i]), 5e-5);
  }

  // Along one direction that moves everything at once.
  const double move = 3e-7;  // small, so that hardly a unit passes a kink on the way
  double slope = 0;
  const auto loss = [&](double sign) {
    std::uint64_t kept = random_state;
    Problem q = p;
    const auto shift = [&](Values& v, const Values& gradient) {
      const Values direction = random_values(int64_t(v.size()));
      if (sign > 0) slope += dot(gradient, direction);
      for (size_t i = 0; i < v.size(); ++i) v[i] += sign * move * direction[i];
    };
    shift(q.x, gradients.d_x);
    for (size_t i = 0; i < q.weights.size(); ++i) shift(q.weights[i], gradients.d_weights[i]);
    for (int i = 0; i < wide.states; ++i) shift(q.state[i], gradients.d_state[i]);
    random_state = kept;
    const Result r = plain_forward(q, wide);
    double sum = dot(r.y, d.y);
    for (int i = 0; i < wide.states; ++i) sum += dot(r.final_state[i], d.final_state[i]);
    return sum;
  };
  const double measured = (loss(1) - loss(-1)) / (2 * move);
  const bool kinked = !std::strcmp(c.cell, "rnn_relu");  // a unit may pass 0 on the way
  check(c, "gradient", std::fabs(measured - slope),
        (kinked ? 1e-2 : 1e-6) * (1 + std::fabs(slope)));

  double size = 1;
  for (double g : gradients.d_x) size = std::fmax(size, std::fabs(g));
  check(c, "input gradient (float)", largest_difference(gradients32.d_x, gradients.d_x),
        1e-4 * size);
  for (size_t i = 0; i < gradients.d_weights.size(); ++i) {
    size = 1;
    for (double g : gradients.d_weights[i]) size = std::fmax(size, std::fabs(g));
    check(c, "weight gradient (float)",
          largest_difference(gradients32.d_weights[i], gradients.d_weights[i]), 1e-4 * size);
  }
}

// Narrow products against loops that round rows in the same way. After the first step a rounding
// may fall to the other side.
void run_narrow_case(const Case& c, const CellKernels& wide, const CellKernels& narrow,
                     Products products) {
  const Seen seen = products == Products::kInt8 ? quantized : rounded;
  Problem p = make_problem(c, wide);
  const int each = p.stack.weights_each();
  for (size_t i = 0; i < p.weights.size(); ++i) {
    const int which = int(i) % each, layer = int(i) / each / c.directions;
    if (which >= 2 && !(p.stack.projected && which == p.stack.projection_at())) continue;
    const int64_t columns = which == 0   ? p.stack.layer_input(layer)
                            : which == 1 ? p.stack.output
                                         : p.stack.hidden;
    for (size_t row = 0; row < p.weights[i].size(); row += size_t(columns)) {
      const Values line = seen(&p.weights[i][row], columns);
      std::copy(line.begin(), line.end(), p.weights[i].begin() + std::ptrdiff_t(row));
    }
  }
  const Result expected = plain_forward(p, wide, seen);
  const Result found = run_narrow(p, narrow, c.schedule, products);
  const bool once = c.steps == 1 && c.layers == 1 && !p.stack.projected;
  const char* const name = products == Products::kInt8 ? "output (int8)" : "output (bfloat16)";
  check(c, name, largest_difference(found.y, expected.y), once ? 1e-5 : 0.03);
  for (int i = 0; i < wide.states; ++i) {
    check(c, "final state (narrow)",
          largest_difference(found.final_state[i], expected.final_state[i]), once ? 2e-5 : 0.05);
  }
}

// The contract of csrc/cpu/math.h on a sample of all floats: at most 3 ULP.
void check_function(const char* name, void (*kernel)(DType, const void*, void*, int64_t),
                    double (*exact)(double)) {
  std::vector<float> x, y;
  for (std::uint32_t bits = 0; bits < 0x7f800000u; bits += 20011) {
    float value;
    std::memcpy(&value, &bits, 4);
    x.push_back(value);
    x.push_back(-value);
  }
  y.resize(x.size());
  kernel(DType::kFloat32, x.data(), y.data(), int64_t(x.size()));
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double truth = exact(x[i]), size = std::fabs(truth);
    if (size < double(std::numeric_limits<float>::min())) continue;
    const double ulp = std::ldexp(1.0, std::ilogb(size) - 23);
    const double error = std::fabs(y[i] - truth) / ulp;
    if (!(error <= worst)) worst = error;
  }
  std::printf("%s: at most %.2f ULP\n", name, worst);
  if (!(worst <= 3)) ++failures;
}

}  // namespace

#include "trees.h"

int main() {
  const char* error = nullptr;
  const Kernels* kernels = choose_kernels(std::getenv("FASTCELL_ISA"), &error);
  if (!kernels) {
    std::printf("FASTCELL_ISA %s\n", error);
    return 2;
  }
  int count = 0;
  const auto run_all = [&](const CellTable& wide_cells, const CellTable& narrow_cells,
                           const CellTable* of_products) {
    for (int i = 0; i < wide_cells.count; ++i) {
      const CellKernels &wide = wide_cells.cells[i], &narrow = narrow_cells.cells[i];
      const bool lstm = !std::strncmp(wide.name, "lstm", 4);
      const Case cases[] = {
          {wide.name, 1, 7, 19, 38, 0, 1, 1, true, false, {1, 1, 1}, false},
          {wide.name, 1, 1, 1, 1, 0, 1, 1, true, false, {1, 1, 1}, false},
          {wide.name, 5, 3, 7, 17, 0, 1, 1, true, false, {1, 1, 2}, false},
          {wide.name, 4, 33, 3, 9, 0, 1, 1, false, false, {1, 2, 1}, false},
          {wide.name, 6, 5, 4, 13, 0, 2, 2, true, false, {2, 1, 1}, false},
          {wide.name, 9, 6, 5, 11, 0, 2, 2, true, true, {1, 1, 2}, false},
          {wide.name, 40, 20, 6, 20, 0, 1, 2, true, true, {1, 1, 1}, false},
          {wide.name, 6, 4, 5, 33, lstm ? 10 : 0, 2, 2, true, true, {1, 1, 2}, false},
          {wide.name, 3, 130, 2, 70, 0, 1, 1, true, false, {1, 1, 2}, false},
          {wide.name, 6, 5, 4, 13, 0, 2, 2, false, false, {2, 1, 1}, true},
          {wide.name, 9, 6, 5, 33, 0, 2, 2, true, true, {1, 1, 2}, true},
          {wide.name, 9, 21, 5, 18, lstm ? 10 : 0, 1, 2, true, true, {1, 2, 1}, true},
      };
      for (const Case& c : cases) {
        run_case(c, wide, narrow);
        for (const Products products : {Products::kBFloat16, Products::kInt8}) {
          if (!of_products || c.extras) break;
          run_narrow_case(c, wide, of_products[int(products)].cells[i], products);
        }
        ++count;
      }
    }
  };
  constexpr int kDouble = int(DType::kFloat64), kFloat = int(DType::kFloat32);
  run_all(kernels->narrow_cells[kDouble][0], kernels->narrow_cells[kFloat][0],
          kernels->narrow_cells[kFloat]);
  run_all(kernels->other_cells[kDouble], kernels->other_cells[kFloat], nullptr);
  check_trees(*kernels);
  failures += reservoir_test::failures(kernels->reservoir);
  check_function("tanh", kernels->tanh, [](double x) { return std::tanh(x); });
  check_function("sigmoid", kernels->sigmoid, sigmoid);
  std::printf("%s: %d cases, %d failures\n", kernels->isa, count, failures);
  return failures ? 1 : 0;
}
