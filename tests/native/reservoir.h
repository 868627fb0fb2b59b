// The reservoir's kernels without Python: against plain loops in double, and samples together
// against each alone, bit for bit. All memory is as large as it must be, and no larger.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/reservoir_call.h"

namespace reservoir_test {

using namespace fastcell;

// A reservoir whose units have any number of connections, none among them.
template <class T>
struct Weights {
  int64_t units, inputs;
  std::vector<std::vector<std::pair<int32_t, T>>> rows;
  std::vector<T> input, bias, alpha;  // (units, inputs), (units), (units)

  Weights(int64_t units, int64_t inputs, std::mt19937& random)
      : units(units), inputs(inputs), rows(size_t(units)) {
    std::uniform_real_distribution<T> weight(-1, 1), part(0, 1);
    for (auto& row : rows) {
      const int64_t count = std::uniform_int_distribution<int64_t>(0, units)(random) / 2;
      for (int64_t k = 0; k < count; ++k) {
        const auto column = std::uniform_int_distribution<int64_t>(0, units - 1)(random);
        row.emplace_back(int32_t(column), weight(random) / T(units));
      }
    }
    for (int64_t i = 0; i < units * inputs; ++i) input.push_back(weight(random));
    for (int64_t i = 0; i < units; ++i) bias.push_back(weight(random));
    for (int64_t i = 0; i < units; ++i) alpha.push_back(part(random));
  }
};

// As the kernels want it.
template <class T>
struct Packed {
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> columns;
  std::vector<T> values, input, bias, alpha;

  Packed(const Weights<T>& w, int lanes) {
    for (int64_t first = 0; first < w.units; first += lanes) {
      const auto valid = [&](int lane) { return first + lane < w.units; };
      const auto row = [&](int lane) { return w.rows[size_t(first + lane)]; };
      size_t width = 0;
      for (int lane = 0; lane < lanes && valid(lane); ++lane) {
        width = std::max(width, row(lane).size());
      }
      for (size_t k = 0; k < width; ++k) {
        for (int lane = 0; lane < lanes; ++lane) {
          const bool there = valid(lane) && k < row(lane).size();
          columns.push_back(there ? row(lane)[k].first : int32_t(first + lane));
          values.push_back(there ? row(lane)[k].second : T(0));
        }
      }
      offsets.push_back(offsets.back() + int64_t(width));
      for (int64_t i = 0; i < w.inputs; ++i) {
        for (int lane = 0; lane < lanes; ++lane) {
          input.push_back(valid(lane) ? w.input[size_t((first + lane) * w.inputs + i)] : T(0));
        }
      }
      for (int lane = 0; lane < lanes; ++lane) {
        bias.push_back(valid(lane) ? w.bias[size_t(first + lane)] : T(0));
        alpha.push_back(valid(lane) ? w.alpha[size_t(first + lane)] : T(0));
      }
    }
  }
};

template <class T>
using Sequences = std::vector<std::vector<T>>;

// The states of all samples; `state` is replaced.
template <class T>
Sequences<T> run(const ReservoirKernels& kernels, const Weights<T>& w, const Sequences<T>& x,
                 const std::vector<int64_t>& lengths, std::vector<T>& state, Schedule schedule) {
  const Packed<T> packed(w, kernels.lanes);
  Sequences<T> states;
  std::vector<const void*> x_pointers;
  std::vector<void*> state_pointers;
  for (int64_t length : lengths) {
    states.emplace_back(size_t(length * w.units), std::numeric_limits<T>::quiet_NaN());
  }
  for (const auto& one : x) x_pointers.push_back(one.data());
  for (auto& one : states) state_pointers.push_back(one.data());
  ReservoirCall call{w.units,
                     w.inputs,
                     packed.offsets.data(),
                     packed.columns.data(),
                     packed.values.data(),
                     packed.input.data(),
                     packed.bias.data(),
                     packed.alpha.data(),
                     int64_t(lengths.size()),
                     lengths.data(),
                     x_pointers.data(),
                     state_pointers.data(),
                     state.data(),
                     schedule,
                     nullptr};
  std::vector<char> workspace(size_t(kernels.workspace_bytes(call, schedule.threads())), char(-1));
  call.workspace = workspace.data();
  struct Job {
    const ReservoirCall& call;
    const ReservoirKernels& kernels;
  } job{call, kernels};
  run_team(
      schedule.threads(),
      [](const Team& team, Barrier* barriers, const void* context) {
        const Job& job = *static_cast<const Job*>(context);
        job.kernels.run(job.call, team, barriers);
      },
      &job);
  return states;
}

template <class T>
std::vector<T> in_loops(const Weights<T>& w, const std::vector<T>& x, int64_t length,
                        const T* initial) {
  std::vector<double> h(initial, initial + w.units), v(h);
  std::vector<T> states;
  for (int64_t t = 0; t < length; ++t) {
    for (size_t u = 0; u < h.size(); ++u) {
      double sum = w.bias[u];
      for (size_t i = 0; i < size_t(w.inputs); ++i) {
        sum += double(w.input[u * size_t(w.inputs) + i]) * double(x[size_t(t * w.inputs) + i]);
      }
      for (const auto& [column, value] : w.rows[u]) sum += double(value) * h[size_t(column)];
      v[u] = double(w.alpha[u]) * h[u] + (1 - double(w.alpha[u])) * std::tanh(sum);
    }
    h = v;
    states.insert(states.end(), h.begin(), h.end());
  }
  return states;
}

template <class T>
int check(const ReservoirKernels& kernels, int64_t units, int64_t inputs,
          std::vector<int64_t> lengths, Schedule schedule) {
  std::mt19937 random(unsigned(units * 31 + inputs));
  std::uniform_real_distribution<T> number(-1, 1);
  const Weights<T> w(units, inputs, random);
  Sequences<T> x;
  for (int64_t length : lengths) {
    x.emplace_back(size_t(length * inputs));
    for (T& value : x.back()) value = number(random);
  }
  std::vector<T> initial(lengths.size() * size_t(units));
  for (T& value : initial) value = number(random);
  std::vector<T> state = initial;
  const Sequences<T> states = run(kernels, w, x, lengths, state, schedule);
  int failures = 0;
  for (size_t b = 0; b < lengths.size(); ++b) {
    const T* const first = initial.data() + b * size_t(units);
    std::vector<T> own(first, first + units);
    const Sequences<T> alone = run<T>(kernels, w, {x[b]}, {lengths[b]}, own, {1, 1, 1});
    const bool same =
        !std::memcmp(alone[0].data(), states[b].data(), sizeof(T) * alone[0].size()) &&
        !std::memcmp(own.data(), &state[b * size_t(units)], sizeof(T) * own.size());
    const std::vector<T> expected = in_loops(w, x[b], lengths[b], first);
    T worst = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const T error = std::fabs(expected[i] - states[b][i]);
      if (!(error <= worst)) worst = error;
    }
    const double terms = double(inputs + units) * double(lengths[b]);
    const T allowed = T(4 * std::ceil(std::log2(terms + 1))) * std::numeric_limits<T>::epsilon();
    if (same && worst <= allowed) continue;
    std::printf("reservoir of %d units, sample %d of %d: off by %g, %s bits\n", int(units), int(b),
                int(lengths.size()), double(worst), same ? "same" : "other");
    ++failures;
  }
  return failures;
}

// How many samples are wrong.
inline int failures(const ReservoirKernels* kernels) {
  int found = 0;
  const auto both = [&](int64_t units, int64_t inputs, const std::vector<int64_t>& lengths,
                        Schedule schedule) {
    found += check<float>(kernels[0], units, inputs, lengths, schedule);
    found += check<double>(kernels[1], units, inputs, lengths, schedule);
  };
  both(1, 1, {1}, {1, 1, 1});
  both(5, 3, {4, 2}, {1, 1, 1});
  both(33, 2, {7}, {1, 1, 3});
  both(40, 7, {9, 9, 9, 8, 5, 1}, {1, 1, 2});
  both(67, 1, std::vector<int64_t>(33, 6), {1, 2, 1});
  both(130, 4, {5, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1}, {1, 2, 2});
  return found;
}

}  // namespace reservoir_test
